"""Checks: the invariants over a snapshot of the tables, and the scrubber over the payloads."""
