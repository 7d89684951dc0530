"""`twfs replay`: public traces of real sessions, through the real warehouse."""
