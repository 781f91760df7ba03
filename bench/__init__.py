"""Benchmarks: `python -m bench` (see README.md here). They import the packages; nothing but the tests imports them."""
