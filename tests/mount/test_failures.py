"""A bug in one request is an error of that request: logged, counted, and the mount goes on."""

import errno
import os
import sys
from pathlib import Path

import pytest

from support.mounting import Mount, names_in, refused, store
from support.warehouses import MHA, make_warehouse
from twfs_tools.process import start_daemon

pytestmark = pytest.mark.fuse

BROKEN_DAEMON = """
import sys
from twfs.vfs.tree import Tree
from twfs_mount.main import main

def described(self, node):
    raise KeyError("a bug")

Tree.described = described
sys.exit(main(sys.argv[1:]))
"""


def test_bug_in_a_handler_does_not_end_the_mount(scratch: Path) -> None:
    directory, path = scratch / "warehouse", scratch / "mnt"
    make_warehouse(directory)
    path.mkdir()
    log = directory / "daemon.log"
    command = [sys.executable, "-c", BROKEN_DAEMON, str(directory), str(path)]
    mount = Mount(directory, path, start_daemon(command, log), log)
    try:
        _, names = store(mount, "tiny", MHA, 1)
        session = mount.session("tiny", names)
        for _ in range(3):
            with refused(errno.EIO):
                os.getxattr(session, "user.twfs.hash")
        assert len(names_in(session)) == 2
        assert mount.statistics()["mount"]["failed_requests"] == 3
        assert "KeyError: 'a bug'" in log.read_text()
    finally:
        assert mount.stop() == 0
