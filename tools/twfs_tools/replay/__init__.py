"""`twfs replay`: public traces of real sessions, through the real warehouse."""

from twfs_tools.replay.command import replay

__all__ = ["replay"]
