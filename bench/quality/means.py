"""A mean and its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_with_error(values: Sequence[float]) -> tuple[float, float]:
    """Over independent values. NaN for the mean of none, and for the error of fewer than two."""
    n = len(values)
    if not n:
        return math.nan, math.nan
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
