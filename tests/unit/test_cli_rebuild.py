"""`twfs create` says what to keep, `rebuild` what is back, `evict --erase` what never will be."""

import json
import os
import pty
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from support.cli import (
    ENVIRONMENT,
    LAYOUT,
    assert_refused,
    document,
    made_warehouse,
    running_daemon,
    tree_of,
    twfs,
)
from twfs.layout import Layout
from twfs.warehouse import Warehouse

BLOCKS = 12


def stored(directory: Path) -> str:
    """A warehouse with one session of 12 blocks; its head."""
    made_warehouse(directory)
    layout = Layout.from_dict(LAYOUT)
    with Warehouse.open(directory) as store:
        model = store.open_model("tiny", layout)
        names = model.chain().extend(list(range(BLOCKS * 16))).names()
        payloads = [
            np.random.default_rng(index).bytes(layout.block_bytes()) for index in range(BLOCKS)
        ]
        assert store.put(model, names, payloads).held == BLOCKS
        return names.hash_at(BLOCKS - 1).hex()


def test_create_says_which_file_to_keep_a_copy_of(tmp_path: Path) -> None:
    done = twfs("create", tmp_path / "w", "--size", "16M")
    assert f"keep a copy of {tmp_path / 'w' / 'secret'}" in done.stdout
    assert document("create", tmp_path / "v", "--size", "16M")["secret"] == str(
        tmp_path / "v" / "secret"
    )


def test_rebuild_says_what_came_back_and_that_there_may_be_more_than_there_was(
    tmp_path: Path,
) -> None:
    home = tmp_path / "w"
    head = stored(home)
    shutil.rmtree(home / "meta")
    assert "twfs rebuild" in assert_refused(twfs("ls", home), 4)
    done = twfs("rebuild", home)
    assert done.returncode == 0, done.stderr
    assert "12 headers found, 12 blocks are back" in done.stdout
    assert "evicted, removed or not yet published may be among" in done.stdout
    assert "12 blocks checked" in done.stdout
    assert head in twfs("ls", home, "tiny", "--json").stdout
    told = document("rebuild", home, "--force", "--device", home / "device0.img")
    assert told["ok"]
    assert told["rebuilt"]["accepted"] == 12
    assert told["rebuilt"]["rejected"] == {}
    assert Path(told["rebuilt"]["old"]).is_dir()


def test_rebuild_refuses_what_is_fine_what_is_in_use_and_what_is_no_device(
    tmp_path: Path,
) -> None:
    home = tmp_path / "w"
    stored(home)
    before = tree_of(home)
    assert "--force" in assert_refused(twfs("rebuild", home), 5)
    assert_refused(twfs("rebuild", home, "--force", "--device", home / "heat"), 9)
    assert_refused(twfs("rebuild", home, "--force", "--device", home / "none"), 8)
    assert_refused(twfs("rebuild", tmp_path / "nowhere"), 4)
    assert tree_of(home) == before
    with running_daemon(home):
        assert_refused(twfs("rebuild", home, "--force"), 6)


def test_rebuild_shows_how_far_it_is_on_a_terminal(tmp_path: Path) -> None:
    home = tmp_path / "w"
    stored(home)
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "twfs_tools.cli", "rebuild", str(home), "--force"]
    shown = b""
    with subprocess.Popen(
        command, env={**ENVIRONMENT, "TERM": "xterm"}, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        with suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(mine, 1 << 16):
                shown += piece
        os.close(mine)
        assert process.stdout is not None
        assert b"12 blocks are back" in process.stdout.read()
    assert process.returncode == 0
    assert b"writing: about 0 s left" in shown
    assert b"of 12 blocks" in shown


@pytest.mark.parametrize("how", ["offline", "daemon"])
def test_what_was_evicted_with_erase_does_not_come_back(tmp_path: Path, how: str) -> None:
    home = tmp_path / "w"
    head = stored(home)
    if how == "daemon":
        with running_daemon(home):
            told = document("evict", home, "--session", f"tiny/{head}", "--erase")
    else:
        told = document("evict", home, "--bytes", "1G", "--erase")
    assert told["freed_bytes"] > 0
    assert told["waiting_blocks"] == 0
    again = json.loads(twfs("rebuild", home, "--force", "--json").stdout)
    assert again["rebuilt"]["headers"] == 0
