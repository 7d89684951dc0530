"""The commands do what they say, offline and through a daemon, and their JSON adds up."""

import json
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from support.cli import LAYOUT, document, layout_file, made_warehouse, running_daemon, twfs
from twfs.client import connect
from twfs.layout import Layout
from twfs.prefix import Names
from twfs.warehouse import Warehouse

BLOCKS = 12
SHARED = 4
STEP = 16


def tokens_of(session: int) -> list[int]:
    """The token ids of one of two sessions that begin alike."""
    return [
        *range(SHARED * STEP),
        *range(1000 * session, 1000 * session + (BLOCKS - SHARED) * STEP),
    ]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, list[Names]]:
    """A warehouse with two sessions of 12 blocks that share 4."""
    made = made_warehouse(tmp_path / "tw")
    layout = Layout.from_dict(LAYOUT)
    names = []
    store = Warehouse.open(made)
    try:
        model = store.open_model("tiny", layout)
        for session in (1, 2):
            names.append(model.chain().extend(tokens_of(session)).names())
            payloads = [
                np.random.default_rng(index).bytes(layout.block_bytes()) for index in range(BLOCKS)
            ]
            assert store.put(model, names[-1], payloads).held == BLOCKS
    finally:
        store.close()
    return made, names


@contextmanager
def served(made: Path, how: str) -> Iterator[None]:
    """Have a daemon during the block, or none."""
    if how == "offline":
        yield
        return
    with running_daemon(made):
        yield


both_ways = pytest.mark.parametrize("how", ["offline", "daemon"])


def test_create_says_what_it_made_and_leaves_it_whole(tmp_path: Path) -> None:
    made = document("create", tmp_path / "tw", "--size", "64M")
    assert made["devices"] == [str(tmp_path / "tw" / "device0.img")]
    assert 60 << 20 < made["free_bytes"] <= made["total_bytes"] <= 64 << 20
    assert document("check", tmp_path / "tw", "--data")["ok"]


def test_create_takes_several_images(tmp_path: Path) -> None:
    images = [tmp_path / "a.img", tmp_path / "b.img", tmp_path / "c.img"]
    given = [f"{images[0]}:64M,{images[1]}:32M", "--device", f"{images[2]}:32M"]
    made = document("create", tmp_path / "tw", "--device", *given)
    assert made["devices"] == [str(image) for image in images]
    assert [image.stat().st_size for image in images] == [64 << 20, 32 << 20, 32 << 20]
    assert made["total_bytes"] > 100 << 20


@both_ways
def test_listed_bytes_add_up(stored: tuple[Path, list[Names]], how: str) -> None:
    made, names = stored
    payload = Layout.from_dict(LAYOUT).block_bytes()
    device = 4096 + -(-payload // 4096) * 4096
    with served(made, how):
        [model] = document("ls", made)["models"]
        assert document("ls", made, "tiny")["models"] == [model]
        status = document("status", made)
    assert (status["daemon_pid"] is None) == (how == "offline")
    sessions = {each["head"]: each for each in model["sessions"]}
    assert set(sessions) == {each.hash_at(BLOCKS - 1).hex() for each in names}
    for each in sessions.values():
        assert each["tokens"] == BLOCKS * STEP
        assert each["blocks"] == BLOCKS
        assert each["payload_bytes"] == BLOCKS * payload
        assert each["own_bytes"] == (BLOCKS - SHARED) * device
        assert each["shared_bytes"] == SHARED * device
    assert model["own_bytes"] == 2 * (BLOCKS - SHARED) * device
    assert model["device_bytes"] == model["own_bytes"] + SHARED * device
    space = status["space"]
    assert space["total_bytes"] - space["free_bytes"] == model["device_bytes"]


@both_ways
def test_explain_names_the_first_block_that_misses(
    stored: tuple[Path, list[Names]], how: str, tmp_path: Path
) -> None:
    made, names = stored
    as_json, raw = tmp_path / "tokens.json", tmp_path / "tokens.u32"
    ids = [*tokens_of(1), *range(3 * STEP)]
    as_json.write_text(json.dumps(ids))
    raw.write_bytes(struct.pack(f"<{len(ids)}I", *ids))
    with served(made, how):
        found = document("explain", made, "tiny", "--tokens", as_json)["explanation"]
        assert document("explain", made, "tiny", "--tokens", raw)["explanation"] == found
        head = names[1].hash_at(BLOCKS - 1).hex()
        whole = document("explain", made, "tiny", "--hash", head)["explanation"]
        salted = document("explain", made, "tiny", "--tokens", raw, "--salt", "aa")["explanation"]
    assert (found["hit_blocks"], found["asked_blocks"]) == (BLOCKS, BLOCKS + 3)
    assert found["hit_tokens"] == BLOCKS * STEP
    assert found["first_miss"] is not None
    assert found["cause"]
    assert (whole["hit_blocks"], whole["asked_blocks"]) == (BLOCKS, BLOCKS)
    assert whole["first_miss"] is None
    assert salted["hit_blocks"] == 0


@both_ways
def test_a_removed_session_leaves_what_others_share(
    stored: tuple[Path, list[Names]], how: str
) -> None:
    made, names = stored
    gone, left = (each.hash_at(BLOCKS - 1).hex() for each in names)
    with served(made, how):
        freed = document("evict", made, "--session", f"tiny/{gone}")["freed_bytes"]
        [model] = document("ls", made)["models"]
    assert [each["head"] for each in model["sessions"]] == [left]
    assert model["blocks"] == BLOCKS
    assert model["sessions"][0]["own_bytes"] == model["device_bytes"]
    assert freed == (BLOCKS - SHARED) * model["device_bytes"] // BLOCKS
    assert document("check", made, "--data")["ok"]


@both_ways
def test_evicting_bytes_frees_at_least_that(stored: tuple[Path, list[Names]], how: str) -> None:
    made, _ = stored
    with served(made, how):
        before = document("status", made)["space"]["free_bytes"]
        freed = document("evict", made, "--bytes", "20K")["freed_bytes"]
        after = document("status", made)["space"]["free_bytes"]
    assert freed >= 20 << 10
    assert after - before == freed
    assert document("check", made, "--data")["ok"]


@both_ways
def test_a_model_is_made_once_and_moves_to_a_new_epoch(tmp_path: Path, how: str) -> None:
    made, layout = made_warehouse(tmp_path / "tw"), layout_file(tmp_path / "layout.json")
    with served(made, how):
        assert document("model", "create", made, "m", "--layout", layout)["made"]
        assert not document("model", "create", made, "m", "--layout", layout)["made"]
        shown = document("model", "show", made, "m")
        assert Layout.from_dict(shown["model"]["layout"]) == Layout.from_dict(LAYOUT)
        assert shown["fingerprint"] == Layout.from_dict(LAYOUT).fingerprint.hex()
        epoch = shown["model"]["epoch"]
        assert document("model", "epoch", made, "m")["epoch"] > epoch
        [listed] = document("model", "list", made)["models"]
    assert listed["name"] == "m"
    assert listed["epoch"] > epoch


@both_ways
def test_check_ends_with_3_and_a_line_per_lost_payload(
    stored: tuple[Path, list[Names]], how: str
) -> None:
    made, names = stored
    store = Warehouse.open(made)
    try:
        info = store.chain_of(store.open_model("tiny").id, names[0].hash_at(BLOCKS - 1))[-1]
    finally:
        store.close()
    with (made / "device0.img").open("r+b") as image:
        image.seek(info.block.extents[0].offset + 4096)
        image.write(b"\x5a" * 64)
    with served(made, how):
        assert document("check", made)["ok"]
        done = twfs("check", made, "--data")
    assert done.returncode == 3, done.stderr
    *findings, summary = done.stdout.splitlines()
    assert findings
    assert all(line.startswith("invariant ") for line in findings)
    assert "payloads verified" in summary
    assert done.stderr == ""


@both_ways
def test_scrub_ends_with_3_once_and_leaves_a_sound_warehouse(
    stored: tuple[Path, list[Names]], how: str
) -> None:
    made, names = stored
    store = Warehouse.open(made)
    try:
        info = store.chain_of(store.open_model("tiny").id, names[0].hash_at(BLOCKS - 1))[-1]
    finally:
        store.close()
    with (made / "device0.img").open("r+b") as image:
        image.seek(info.block.extents[0].offset + 4096)
        image.write(b"\x5a" * 64)
    with served(made, how):
        assert twfs("status", made).stdout.splitlines()[2] == "scrub: never run"
        done = twfs("scrub", made, "--rate", "64M")
        assert done.returncode == 3, done.stderr
        summary, finding = done.stdout.splitlines()
        assert "20 blocks" in summary
        assert "1 bad" in summary
        assert info.key.prefix_hash.hex() in finding
        again = document("scrub", made)["scrub"]
        assert (again["state"], again["pass"], again["bad_blocks"]) == ("idle", 2, 0)
        assert document("status", made)["statistics"]["scrub"]["last"]["blocks"] == 19
        assert document("scrub", made, "--status")["scrub"]["pass"] == 2
        assert document("scrub", made, "--stop")["scrub"]["state"] == "idle"
        assert document("check", made, "--data")["ok"]


def test_a_pass_in_the_background_is_the_daemons(stored: tuple[Path, list[Names]]) -> None:
    made, _ = stored
    with running_daemon(made):
        begun = document("scrub", made, "--background", "--rate", "1")["scrub"]
        assert begun["state"] == "running"
        assert "running" in twfs("scrub", made, "--status").stdout
        assert document("scrub", made, "--stop")["scrub"]["state"] == "unfinished"
        assert document("scrub", made)["scrub"]["pass"] == 1
        assert document("scrub", made, "--whole")["scrub"]["pass"] == 2


def test_a_daemon_whose_memory_for_uploads_is_all_given_out_answers_too(
    stored: tuple[Path, list[Names]],
) -> None:
    made, _ = stored
    with running_daemon(made):
        most = document("status", made)["statistics"]["server"]["arena_bytes_max"]
        with closing(connect(made / "socket", arena_bytes=most)):
            for command in ("status", "ls"):
                done = twfs(command, made)
                assert done.returncode == 0, done.stderr


def test_people_get_tables_of_the_same(stored: tuple[Path, list[Names]]) -> None:
    made, names = stored
    listed = twfs("ls", made).stdout
    assert all(each.hash_at(BLOCKS - 1).hex() in listed for each in names)
    assert "tiny" in twfs("model", "list", made).stdout
    assert "block_tokens" in twfs("model", "show", made, "tiny").stdout
    assert "1 models" in twfs("status", made).stdout
    assert "nothing found" in twfs("check", made).stdout


def test_every_command_explains_itself() -> None:
    top = twfs("--help")
    assert top.returncode == 0
    for name in ("create", "serve", "mount", "unmount", "status", "model", "ls", "evict",
                 "explain", "check", "scrub", "bench", "demo"):  # fmt: skip
        assert name in top.stdout
        helped = twfs(name, "--help")
        assert helped.returncode == 0, helped.stderr
        assert helped.stderr == ""


def test_the_socket_alone_is_enough_to_name_a_warehouse(
    stored: tuple[Path, list[Names]],
) -> None:
    made, _ = stored
    with running_daemon(made):
        [model] = document("ls", made / "socket")["models"]
    assert model["blocks"] == 2 * BLOCKS - SHARED
