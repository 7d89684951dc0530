"""An operator's mistake costs one line on stderr and the right exit code, and changes nothing.

Every case runs the command as a process of its own, and looks at the files before and after.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import (
    ENVIRONMENT,
    assert_refused,
    document,
    layout_file,
    made_warehouse,
    running_daemon,
    tree_of,
    twfs,
)
from twfs.warehouse import Warehouse

ALIGN = 4096


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with one model, for commands that must not change it."""
    root = tmp_path_factory.mktemp("refusals")
    made = made_warehouse(root / "tw")
    layout = layout_file(root / "layout.json")
    assert twfs("model", "create", made, "tiny", "--layout", layout).returncode == 0
    return made


def state_of(warehouse: Path, beside: Path) -> tuple[object, ...]:
    """What must not change: files, device, models and space."""
    store = Warehouse.open(warehouse)
    try:
        models, space = store.models(), store.space()
    finally:
        store.close()
    return tree_of(beside), tree_of(warehouse / "device0.img"), models, space


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["create", "{new}"], 2, "--size"),
        (["create", "{new}", "--size", "lots"], 2, "not a size"),
        (["create", "{new}", "--size", "1M"], 2, "16"),
        (["create", "{new}", "--size", "1P"], 13, "free"),
        (["create", "{new}", "--size", "64M", "--device", "/dev/null"], 2, "either"),
        (["create", "{new}", "--device", "/dev/null"], 2, "/dev/null"),
        (["create", "{new}", "--device", "/dev/nonesuch"], 8, "nonesuch"),
        (["create", "{tw}", "--size", "64M"], 5, "{tw}"),
        (["status", "{new}"], 4, "{new}"),
        (["status", "{empty}"], 4, "{empty}"),
        (["status", "{file}"], 4, "{file}"),
        (["status", "{tw}", "--socket", "{new}"], 21, "twfs serve"),
        (["ls", "{tw}", "nonesuch"], 16, "tiny"),
        (["model", "show", "{tw}", "nonesuch"], 16, "tiny"),
        (["model", "epoch", "{tw}", "nonesuch"], 16, "tiny"),
        (["model", "create", "{tw}", "a/b", "--layout", "{layout}"], 2, "a/b"),
        (["model", "create", "{tw}", "..", "--layout", "{layout}"], 2, ".."),
        (["model", "create", "{tw}", "detached", "--layout", "{layout}"], 2, "detached"),
        (["model", "create", "{tw}", "x" * 201, "--layout", "{layout}"], 2, "200"),
        (["model", "create", "{tw}", "new", "--layout", "{garbage}"], 2, "not JSON"),
        (["model", "create", "{tw}", "new", "--layout", "{list}"], 2, "layout"),
        (["model", "create", "{tw}", "new", "--layout", "{new}"], 1, "{new}"),
        (["model", "create", "{tw}", "new", "--layout", "{empty}"], 1, "{empty}"),
        (["model", "create", "{tw}", "tiny", "--layout", "{other}"], 15, "block_tokens"),
        (["evict", "{tw}"], 2, "--bytes"),
        (["evict", "{tw}", "--bytes", "1G", "--session", "tiny/00"], 2, "either"),
        (["evict", "{tw}", "--bytes", "-1"], 2, "not a size"),
        (["evict", "{tw}", "--session", "tiny"], 2, "MODEL/HASH"),
        (["evict", "{tw}", "--session", "tiny/abc"], 2, "32"),
        (["evict", "{tw}", "--session", "tiny/" + "ab" * 16], 17, "ab"),
        (["scrub", "{tw}", "--background"], 2, "daemon"),
        (["scrub", "{tw}", "--rate", "fast"], 2, "not a size"),
        (["scrub", "{tw}", "--rate", "99E"], 2, "rate"),
        (["scrub", "{tw}", "--status", "--stop"], 2, "stand alone"),
        (["scrub", "{tw}", "--stop", "--rate", "1M"], 2, "stand alone"),
        (["scrub", "{tw}", "--socket", "{new}"], 21, "twfs serve"),
        (["explain", "{tw}", "tiny"], 2, "--tokens"),
        (["explain", "{tw}", "tiny", "--hash", "xyz"], 2, "hex"),
        (["explain", "{tw}", "tiny", "--hash", "ab" * 16], 17, "ab"),
        (["explain", "{tw}", "tiny", "--tokens", "{new}"], 1, "{new}"),
        (["explain", "{tw}", "tiny", "--tokens", "{garbage}"], 2, "token"),
        (["explain", "{tw}", "tiny", "--tokens", "{negative}"], 2, "token"),
        (["explain", "{tw}", "tiny", "--tokens", "{list}", "--salt", "zz"], 2, "hex"),
        (["unmount", "{empty}"], 24, "{empty}"),
        (["nonesuch"], 2, "nonesuch"),
        (["status"], 2, "WAREHOUSE"),
        (["status", "{tw}", "--nonesuch"], 2, "--nonesuch"),
        (["bench", "read", "--directory", "{new}"], 2, "{new}"),
        (["bench", "read", "--rounds", "0"], 2, "rounds"),
        ([], 2, "help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_changes_nothing(
    arguments: list[str], exit_code: int, words: str, warehouse: Path, tmp_path: Path
) -> None:
    places = {
        "tw": warehouse, "new": tmp_path / "new", "empty": tmp_path / "empty",
        "file": tmp_path / "file", "garbage": tmp_path / "garbage", "list": tmp_path / "list",
        "negative": tmp_path / "negative",
        "layout": layout_file(tmp_path / "layout.json"),
        "other": layout_file(tmp_path / "other.json", block_tokens=32),
    }  # fmt: skip
    places["empty"].mkdir()
    places["file"].write_bytes(b"x")
    places["garbage"].write_bytes(b"{]garbage")
    places["list"].write_text("[1, 2, 3]")
    places["negative"].write_text("[1, -2]")
    before = state_of(warehouse, tmp_path)
    said = assert_refused(twfs(*(word.format(**places) for word in arguments)), exit_code)
    assert words.format(**places) in said
    assert state_of(warehouse, tmp_path) == before


def test_a_device_with_a_filesystem_is_left_alone(tmp_path: Path) -> None:
    image = tmp_path / "ext4.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    before = tree_of(image)
    said = assert_refused(twfs("create", tmp_path / "tw", "--device", image), 7)
    assert "ext" in said
    assert tree_of(image) == before
    assert not (tmp_path / "tw" / "meta" / "data.mdb").exists()
    assert twfs("create", tmp_path / "tw", "--device", image, "--force").returncode == 0
    assert document("check", tmp_path / "tw")["ok"]


def test_the_device_of_another_warehouse_is_refused(tmp_path: Path) -> None:
    mine, other = made_warehouse(tmp_path / "mine"), made_warehouse(tmp_path / "other")
    shutil.copyfile(other / "device0.img", mine / "device0.img")
    before = tree_of(mine / "device0.img")
    assert_refused(twfs("status", mine), 8)
    assert tree_of(mine / "device0.img") == before


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    made = made_warehouse(tmp_path / "tw")
    os.truncate(made / "device0.img", 24 << 20)
    assert str(24 << 20) in assert_refused(twfs("status", made), 10)
    assert (made / "device0.img").stat().st_size == 24 << 20


def damage(image: Path, offset: int) -> None:
    """Overwrite 4 KiB of *image* with noise."""
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * ALIGN)


@pytest.mark.parametrize("which", ["first", "last"])
def test_one_bad_superblock_is_noted_and_the_warehouse_works(tmp_path: Path, which: str) -> None:
    made = made_warehouse(tmp_path / "tw")
    image = made / "device0.img"
    damage(image, 0 if which == "first" else image.stat().st_size - ALIGN)
    status = document("status", made)
    assert f"{which} superblock copy" in json.dumps(status)


def test_two_bad_superblocks_are_refused(tmp_path: Path) -> None:
    made = made_warehouse(tmp_path / "tw")
    image = made / "device0.img"
    damage(image, 0)
    damage(image, image.stat().st_size - ALIGN)
    before = tree_of(image)
    assert "device0.img" in assert_refused(twfs("status", made), 9)
    assert tree_of(image) == before


def test_metadata_that_is_truncated_is_refused(tmp_path: Path) -> None:
    made = made_warehouse(tmp_path / "tw")
    data = next((made / "meta").rglob("data.mdb"))
    os.truncate(data, 8192)
    assert_refused(twfs("status", made), 11)
    assert data.stat().st_size == 8192


def test_serving_what_is_no_warehouse_is_refused_by_the_daemon(tmp_path: Path) -> None:
    said = assert_refused(twfs("serve", tmp_path, "--no-mount"), 4, name="twfsd")
    assert str(tmp_path) in said
    assert tree_of(tmp_path) == {}


def test_a_second_daemon_is_refused_and_the_first_goes_on(warehouse: Path) -> None:
    with running_daemon(warehouse) as pid:
        done = twfs("serve", warehouse, "--no-mount")
        assert done.returncode == 6, done.stderr
        assert "Traceback" not in done.stderr
        status = document("status", warehouse)
        assert status["daemon_pid"] == pid


def test_a_locked_warehouse_whose_daemon_does_not_answer_is_busy(warehouse: Path) -> None:
    holder = (
        "import sys; from pathlib import Path; from twfs.warehouse import Warehouse\n"
        "w = Warehouse.open(Path(sys.argv[1])); print('open', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(warehouse)], env=ENVIRONMENT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "open\n"
        assert_refused(twfs("status", warehouse), 6)
        process.stdin.write("\n")
        process.stdin.close()
    assert process.returncode in {0, 1}
    assert twfs("status", warehouse).returncode == 0


def test_a_reader_that_goes_away_is_not_an_error_worth_words(warehouse: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "twfs_tools.cli", "status", str(warehouse), "--json"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode != 0


def test_ctrl_c_is_quiet_and_ends_with_130() -> None:
    interrupted = (
        "import signal, sys; from twfs_tools import cli\n"
        "cli.app.command('wait')(lambda: signal.raise_signal(signal.SIGINT))\n"
        "sys.exit(cli.run(['wait']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", interrupted],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == ""


def test_debug_shows_where_a_refusal_comes_from(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "twfs_tools.cli", "status", str(tmp_path / "none")],
        env={**ENVIRONMENT, "TWFS_DEBUG": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" in done.stderr
    assert "NoSuchWarehouse" in done.stderr
