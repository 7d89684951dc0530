"""The `twfs` command: tools that parse arguments and print, and do nothing the library cannot.

Not a library: engines import `twfs`. One thread.
"""
