"""The mount and the daemon: translates FUSE requests into calls on a warehouse, and runs it."""
