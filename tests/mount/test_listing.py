"""`ls`, `stat`, `du`, `df`, `find` and `getfattr` show what is; shared blocks count once."""

import errno
import json
import os
from pathlib import Path

import pytest

from support.mounting import Mount, expected, names_in, refusal, refused, shell, store, until
from support.warehouses import HYBRID, MHA, SHARDED, payloads_of
from twfs.store import Retention
from twfs.units import ByteCount
from twfs.vfs.describing import PREFIX

pytestmark = pytest.mark.fuse


def attribute(path: Path, name: str) -> str:
    return os.getxattr(path, f"{PREFIX}{name}").decode()


def test_root_lists_models_and_control_directory(mount: Mount) -> None:
    store(mount, "tiny", MHA, 1)
    store(mount, "cut", SHARDED, 1)
    assert names_in(mount.path) == [".twfs", "cut", "files", "tiny"]
    assert names_in(mount.path / ".twfs") == ["layouts", "metrics", "stats.json"]
    layout = json.loads((mount.path / ".twfs/layouts/tiny.json").read_text())
    assert layout == {"fingerprint": MHA.fingerprint.hex(), "layout": MHA.to_dict()}


def test_session_lists_its_blocks_in_chain_order(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 3)
    session = mount.session("tiny", names)
    assert names_in(mount.path / "tiny") == sorted([session.name, "detached"])
    assert names_in(session) == ["00000.kv", "00001.kv", "00002.kv", "chain.json"]
    assert names_in(mount.path / "tiny/detached") == []
    for index in range(3):
        assert (session / f"{index:05d}.kv").read_bytes() == expected(MHA, names, index)


def test_shards_and_groups_have_files_of_their_own(mount: Mount) -> None:
    _, cut = store(mount, "cut", SHARDED, 2)
    assert names_in(mount.session("cut", cut)) == [
        "00000.s0.kv", "00000.s1.kv", "00001.s0.kv", "00001.s1.kv", "chain.json",
    ]  # fmt: skip
    assert (mount.session("cut", cut) / "00001.s1.kv").read_bytes() == expected(
        SHARDED, cut, 1, shard=1
    )
    _, hybrid = store(mount, "hybrid", HYBRID, 1)
    assert names_in(mount.session("hybrid", hybrid)) == [
        "00000.g0.kv", "00000.g2.kv", "00000.kv", "chain.json",
    ]  # fmt: skip
    assert (mount.session("hybrid", hybrid) / "00000.g2.kv").read_bytes() == expected(
        HYBRID, hybrid, 0, group=2
    )


def test_stat_says_what_a_block_is_and_takes(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 1)
    found = (mount.session("tiny", names) / "00000.kv").stat()
    assert found.st_size == MHA.block_bytes()
    assert found.st_blocks * 512 == 4096 + -(-MHA.block_bytes() // 4096) * 4096
    assert found.st_nlink == 1
    assert found.st_mtime_ns <= found.st_atime_ns
    assert oct(found.st_mode) == "0o100440"
    directory = mount.session("tiny", names).stat()
    assert oct(directory.st_mode) == "0o40750"
    assert directory.st_nlink == 1


def test_block_of_two_sessions_is_one_inode_with_two_links(mount: Mount) -> None:
    _, one = store(mount, "tiny", MHA, 3)
    _, two = store(mount, "tiny", MHA, 4, seed=7, fork=2)
    first, second = mount.session("tiny", one), mount.session("tiny", two)
    for index, links in ((0, 2), (1, 2), (2, 1)):
        name = f"{index:05d}.kv"
        assert (first / name).stat().st_nlink == links
        assert ((first / name).stat().st_ino == (second / name).stat().st_ino) is (links == 2)


def test_du_counts_shared_blocks_once_and_agrees_with_df(mount: Mount) -> None:
    store(mount, "tiny", MHA, 5)
    store(mount, "tiny", MHA, 6, seed=3, fork=4)
    device_bytes = 4096 + -(-MHA.block_bytes() // 4096) * 4096
    du = int(shell("du", "-s", "--block-size=1", mount.path).split()[0])
    assert du == 7 * device_bytes
    size, used = map(int, shell(
        "df", "--block-size=1", "--output=size,used", mount.path
    ).splitlines()[1].split())  # fmt: skip
    assert used == du
    assert size > used


def test_find_sees_every_name(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 20)
    found = shell("find", mount.session("tiny", names), "-name", "*.kv").split()
    assert len(found) == 20


def test_chain_json_names_and_proves_every_file(mount: Mount) -> None:
    model, names = store(mount, "cut", SHARDED, 2, retention=Retention.DURABLE)
    text = (mount.session("cut", names) / "chain.json").read_bytes()
    assert len(text) == (mount.session("cut", names) / "chain.json").stat().st_size
    chain = json.loads(text)
    assert chain["fingerprint"] == SHARDED.fingerprint.hex()
    assert chain["layout"] == SHARDED.to_dict()
    assert (chain["model"], chain["epoch"]) == ("cut", model.epoch)
    assert chain["head"] == names.hash_at(1).hex()
    lines = chain["blocks"]
    assert [line["file"] for line in lines] == [
        "00000.s0.kv", "00000.s1.kv", "00001.s0.kv", "00001.s1.kv",
    ]  # fmt: skip
    assert {line["class"] for line in lines} == {"durable"}
    assert lines[2]["parent"] == lines[0]["hash"] == names.hash_at(0).hex()
    assert text == (mount.session("cut", names) / "chain.json").read_bytes()


def test_extended_attributes_describe_blocks_and_sessions(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 2)
    session = mount.session("tiny", names)
    block = session / "00001.kv"
    assert attribute(block, "hash") == names.hash_at(1).hex()
    assert attribute(block, "parent") == names.hash_at(0).hex()
    assert attribute(block, "digest") == names.digests[32:].hex()
    assert attribute(block, "index") == "1"
    assert attribute(block, "position") == "32"
    assert attribute(block, "layout") == MHA.fingerprint.hex()
    device, _, run = attribute(block, "extents").partition(":")
    offset, _, length = run.partition("+")
    assert (device, int(offset) % 4096, int(length)) == ("0", 0, block.stat().st_blocks * 512)
    path, _, run = attribute(block, "payload").rpartition(":")
    at, _, length = run.partition("+")
    with Path(path).open("rb") as device_file:
        device_file.seek(int(at))
        assert device_file.read(int(length))[: block.stat().st_size] == block.read_bytes()
    assert attribute(session, "tokens") == "32"
    assert attribute(session, "blocks") == "2"
    listed = shell("getfattr", "-d", "--absolute-names", block)
    assert all(f"user.twfs.{name}=" in listed for name in ("checksum", "lanes", "generation"))
    with refused(errno.ENODATA):
        os.getxattr(block, "user.other")


@pytest.mark.parametrize("target", [".", "00000.kv"])
def test_retention_class_can_be_set_and_nothing_else(mount: Mount, target: str) -> None:
    _, names = store(mount, "tiny", MHA, 1)
    path = mount.session("tiny", names) / target
    shell("setfattr", "-n", "user.twfs.class", "-v", "pinned", path)
    assert attribute(path, "class") == "pinned"
    chain = json.loads((mount.session("tiny", names) / "chain.json").read_text())
    assert chain["blocks"][0]["class"] == "pinned"
    assert "Invalid argument" in refusal("setfattr", "-n", "user.twfs.class", "-v", "gold", path)
    assert "not permitted" in refusal("setfattr", "-n", "user.twfs.hash", "-v", "0", path)
    shell("setfattr", "-n", "user.twfs.class", "-v", "standard", path)
    assert attribute(path, "class") == "standard"


def test_detached_blocks_are_listed_apart_until_their_parent_comes(mount: Mount) -> None:
    model, names = store(mount, "tiny", MHA, 1)
    grown = model.chain().extend(list(range(900, 900 + 48))).names()
    with mount.client() as client:
        payloads = payloads_of(MHA, grown)
        assert client.put(model, grown.slice(1, 3), payloads[1:]).held == 2
        detached = mount.path / "tiny/detached"
        assert names_in(detached) == sorted(f"{grown.hash_at(i).hex()}.kv" for i in (1, 2))
        first = detached / f"{grown.hash_at(1).hex()}.kv"
        assert first.read_bytes() == expected(MHA, grown, 1)
        assert not mount.session("tiny", grown).exists()
        assert client.put(model, grown.head(1), payloads[:1]).held == 1
    assert names_in(detached) == []
    assert len(names_in(mount.session("tiny", grown))) == 4
    assert names_in(mount.session("tiny", names)) == ["00000.kv", "chain.json"]


def test_grown_session_keeps_its_old_name_for_who_stands_in_it(mount: Mount) -> None:
    _, short = store(mount, "tiny", MHA, 2)
    old = mount.session("tiny", short)
    here = os.open(old, os.O_RDONLY | os.O_DIRECTORY)
    file = (old / "00001.kv").open("rb")
    try:
        _, long = store(mount, "tiny", MHA, 4)
        listed = names_in(mount.path / "tiny")
        assert mount.session("tiny", long).name in listed
        assert old.name not in listed
        assert sorted(found.name for found in os.scandir(here)) == [
            "00000.kv",
            "00001.kv",
            "chain.json",
        ]
        assert len(names_in(old)) == 3
        assert file.read() == expected(MHA, short, 1)
        assert shell("sh", "-c", "ls | wc -l; cat 00000.kv | wc -c", cwd=old).split() == [
            "3", str(MHA.block_bytes()),
        ]  # fmt: skip
    finally:
        file.close()
        os.close(here)


def test_evicted_tail_leaves_the_shorter_prefix(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 3)
    whole = mount.session("tiny", names)
    assert len(names_in(whole)) == 4
    with mount.client() as client:
        client.evict(ByteCount(whole.joinpath("00002.kv").stat().st_blocks * 512))
    until(lambda: not whole.exists(), "the old name goes")
    listed = [name for name in names_in(mount.path / "tiny") if name != "detached"]
    assert len(listed) == 1
    assert "00002.kv" not in names_in(mount.path / "tiny" / listed[0])


def test_statistics_and_metrics_can_be_read_and_not_written(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 1)
    (mount.session("tiny", names) / "00000.kv").read_bytes()
    assert mount.statistics()["mount"]["payload_reads"] == 1
    lines = (mount.path / ".twfs/metrics").read_text().splitlines()
    values = dict(line.split(" ") for line in lines)
    assert values["twfs_mount_payload_reads"] == "1"
    assert all(name.startswith("twfs_") and float(value) >= 0 for name, value in values.items())
    assert "not permitted" in refusal("sh", "-c", f"echo 1 > {mount.path}/.twfs/stats.json")


def test_new_epoch_empties_the_model(mount: Mount) -> None:
    model, names = store(mount, "tiny", MHA, 2)
    assert mount.session("tiny", names).exists()
    with mount.client() as client:
        client.new_epoch(model)
    until(lambda: not mount.session("tiny", names).exists(), "blocks of the old epoch go")
    until(lambda: names_in(mount.path / "tiny") == ["detached"], "the model is empty")


def test_long_chain_is_listed_whole(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 1500)
    session = mount.session("tiny", names)
    assert len(names_in(session)) == 1501
    assert len(json.loads((session / "chain.json").read_text())["blocks"]) == 1500
    assert (session / "01499.kv").read_bytes() == expected(MHA, names, 1499)


@pytest.mark.parametrize(
    "name", ["absent", "0" * 31, "0" * 32, "A" * 32, "ä", "detached2", "x" * 255]
)
def test_names_that_are_none_are_not_found(mount: Mount, name: str) -> None:
    _, names = store(mount, "tiny", MHA, 1)
    for directory in (mount.path, mount.path / "tiny", mount.session("tiny", names)):
        with pytest.raises(FileNotFoundError):
            (directory / name).stat()
