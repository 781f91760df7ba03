"""Benchmarks: `python -m bench` (see docs/benchmarks.md). They import the packages; nothing but the tests imports them."""
