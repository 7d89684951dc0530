"""The daemon's end of its socket: who may ask what, and the answers."""
