"""Suites of others on the mount; see README.md."""
