"""What ships inside packages that may not be installed, or with newer ones only."""

import pytest
from transformers.generation.continuous_batching import ContinuousBatchingManager

# The manager's `pause`, and pages of a size of ours.
needs_continuous_batching = pytest.mark.skipif(
    not hasattr(ContinuousBatchingManager, "pause"),
    reason="continuous batching needs transformers 5.18 or newer",
)


def or_skip(load, *arguments):
    """What `load` returns; skips where the package that it reads is not installed."""
    try:
        return load(*arguments)
    except ImportError as error:
        pytest.skip(str(error))
