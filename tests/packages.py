"""What ships inside packages that may not be installed."""

import pytest


def or_skip(load, *arguments):
    """What `load` returns; skips where the package that it reads is not installed."""
    try:
        return load(*arguments)
    except ImportError as error:
        pytest.skip(str(error))
