"""The quality study: which objective to choose, on pairs of small models whose mismatch is dialled. `python -m bench.quality`."""
