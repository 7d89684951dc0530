"""Three ways to the same extents: host (O_DIRECT), staged (host, then GPU) and cufile (kvikio).

Import `twfs.readers.select`, which chooses among them; nothing here imports torch or kvikio
before a destination asks for it.
"""
