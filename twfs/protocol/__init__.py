"""The daemon's socket: its messages, and the client's end of it."""
