"""Which process a request comes from, and whether that was killed: asked of /proc.

A file that is being written is seen by name by its own process alone, with all its threads.
"""

from contextlib import suppress
from pathlib import Path
from typing import Final

PF_SIGNALED: Final = 0x400  # of linux/sched.h: a signal ends it
FLAGS_FIELD: Final = 6  # of /proc/PID/stat, counted behind the name


def writer_of(pid: int, uid: int) -> int:
    """The process that the thread *pid* belongs to; one number for all of *uid* that are unknown.

    Of processes in other PID namespaces the kernel may tell no number: 0.
    """
    if pid > 0:
        with suppress(OSError, ValueError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("Tgid:"):
                    return int(line.split()[1])
        return pid
    return -1 - uid


def was_killed(writer: int) -> bool:
    """Tell whether a signal is just ending the process *writer*, or has ended it."""
    if writer <= 0:
        return False
    with suppress(OSError, ValueError, IndexError):
        stat = Path(f"/proc/{writer}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return bool(int(fields[FLAGS_FIELD]) & PF_SIGNALED)
    return False
