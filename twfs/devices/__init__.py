"""Devices and the extents on them: formatted, read, written, flushed, allocated and wiped."""
