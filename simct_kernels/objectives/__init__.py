"""Objectives other than SimCT's over the same rows. A new one is a new file here."""
