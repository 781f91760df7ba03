"""Benchmarks. They import the packages; nothing imports them."""
