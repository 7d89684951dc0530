"""Hostile inputs to every parser; see test_fuzz.py and run.py."""
