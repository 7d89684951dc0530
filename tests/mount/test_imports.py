"""A copied session can be copied back by any tool; one that is not whole or not true is refused."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from support.mounting import Mount, expected, mounted, names_in, refusal, refused, shell, store
from support.warehouses import BIG, HYBRID, MHA, SHARDED, make_warehouse
from twfs.layout import Layout

pytestmark = pytest.mark.fuse

TOOLS = {
    "cp -r": "cp -r {copy} {model}/",
    "cp -a": "cp -a {copy} {model}/",
    "tar": "tar -C {parent} -cf - {name} | tar -C {model} -xf -",
    "tar --xattrs": "tar -C {parent} --xattrs -cf - {name} | tar -C {model} --xattrs -xpf -",
    "rsync -X": "rsync -aX {copy} {model}/",
    "tar as user": "tar -C {parent} -cf - {name} | tar -C {model} --no-same-owner -xpf -",
    "rsync": "rsync -a {copy} {model}/",
    "rsync --inplace": "rsync -a --inplace {copy} {model}/",
    "backwards": "mkdir {model}/{name}; for f in $(ls -r {copy}); do "
    "cat {copy}/$f > {model}/{name}/$f; done",
    "in pieces": "mkdir {model}/{name}; for f in $(ls {copy}); do "
    "dd if={copy}/$f of={model}/{name}/$f bs=1000 status=none; done",
}  # fmt: skip


def exported(mount: Mount, scratch: Path, model: str, layout: Layout, blocks: int = 3) -> Path:
    """A copy of a session that is not in the store any more."""
    _, names = store(mount, model, layout, blocks)
    session = mount.session(model, names)
    shell("cp", "-a", session, scratch)  # with its extended attributes, for tools that bring them
    shell("rm", "-r", session)
    return scratch / session.name


def commanded(tool: str, mount: Mount, copy: Path, model: str) -> None:
    shell("sh", "-ec", TOOLS[tool].format(
        copy=copy, parent=copy.parent, name=copy.name, model=mount.path / model
    ))  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_copied_session_comes_back_by(mount: Mount, scratch: Path, tool: str) -> None:
    copy = exported(mount, scratch, "cut", SHARDED)
    assert not (mount.path / "cut" / copy.name).exists()
    commanded(tool, mount, copy, "cut")
    shell("diff", "-r", copy, mount.path / "cut" / copy.name)
    assert mount.statistics()["imports"] == {
        "pending": 0, "pending_bytes": 0, "published": 1, "dropped": 0, "blocks": 6,
    }  # fmt: skip
    assert (mount.path / "cut" / copy.name / "00000.s0.kv").stat().st_blocks > 0


def test_groups_come_back_with_their_session(mount: Mount, scratch: Path) -> None:
    copy = exported(mount, scratch, "hybrid", HYBRID)
    commanded("cp -r", mount, copy, "hybrid")
    shell("diff", "-r", copy, mount.path / "hybrid" / copy.name)


def test_imported_session_is_a_hit(mount: Mount, scratch: Path) -> None:
    model, names = store(mount, "tiny", MHA, 3)
    session = mount.session("tiny", names)
    shell("cp", "-r", session, scratch)
    shell("rm", "-r", session)
    with mount.client() as client:
        assert client.lookup(model, names) == 0
        shell("cp", "-r", scratch / session.name, mount.path / "tiny")
        assert client.lookup(model, names) == 3


def test_blocks_that_are_there_already_are_kept(mount: Mount, scratch: Path) -> None:
    _, names = store(mount, "tiny", MHA, 4)
    session = mount.session("tiny", names)
    shell("cp", "-r", session, scratch)
    shell("rm", "-r", session)
    store(mount, "tiny", MHA, 2)
    before = (mount.session("tiny", names, 1) / "00000.kv").stat().st_ino
    shell("cp", "-r", scratch / session.name, mount.path / "tiny")
    assert (session / "00000.kv").stat().st_ino == before
    assert (session / "00003.kv").read_bytes() == expected(MHA, names, 3)


def test_known_name_cannot_be_imported_over(mount: Mount) -> None:
    _, names = store(mount, "tiny", MHA, 2)
    for index in (0, 1):
        with pytest.raises(FileExistsError):
            mount.session("tiny", names, index).mkdir()


def test_pending_import_is_listed_and_shows_what_has_come(mount: Mount, scratch: Path) -> None:
    copy = exported(mount, scratch, "tiny", MHA)
    pending = mount.path / "tiny" / copy.name
    pending.mkdir()
    shutil.copyfile(copy / "00001.kv", pending / "00001.kv")
    assert copy.name in names_in(mount.path / "tiny")
    assert names_in(pending) == ["00001.kv"]
    assert (pending / "00001.kv").read_bytes() == (copy / "00001.kv").read_bytes()
    assert mount.statistics()["imports"]["pending"] == 1
    shell("rm", "-r", pending)
    assert not pending.exists()
    assert mount.statistics()["imports"]["pending"] == 0


def spoil(copy: Path, how: str) -> None:  # noqa: PLR0912  (one branch per untruth)
    """Make one thing in *copy* untrue."""
    path = copy / "chain.json"
    chain = json.loads(path.read_text())
    line = chain["blocks"][-1]
    match how:
        case "bytes":
            file = copy / "00001.kv"
            data = bytearray(file.read_bytes())
            data[77] ^= 1
            file.write_bytes(data)
        case "layout":
            chain["fingerprint"] = "ab" * 32
        case "epoch":
            chain["epoch"] += 1
        case "head":
            chain["head"] = "cd" * 16
        case "checksum":
            line["xxh3"] = "00" * 16
        case "gap":
            line["parent"] = "ef" * 16
        case "length":
            line["bytes"] -= 1
        case "name":
            line["file"] = "00009.kv"
        case "missing field":
            del line["digest"]
        case "twice":
            chain["blocks"].append(line)
        case "short hash":
            line["hash"] = line["hash"][:-2]
        case "empty":
            chain["blocks"] = []
        case "no json":
            path.write_text("{")
            return
        case _:
            raise AssertionError(how)
    path.write_text(json.dumps(chain))


@pytest.mark.parametrize(
    "how",
    [
        "bytes", "layout", "epoch", "head", "checksum", "gap", "length", "name", "missing field",
        "twice", "short hash", "empty", "no json",
    ],
)  # fmt: skip
def test_untrue_import_is_refused_and_dropped(mount: Mount, scratch: Path, how: str) -> None:
    copy = exported(mount, scratch, "tiny", MHA)
    spoil(copy, how)
    pending = mount.path / "tiny" / copy.name
    pending.mkdir()
    names = names_in(copy)  # blocks first: the close of chain.json decides
    for name in names[:-1]:
        shutil.copyfile(copy / name, pending / name)
    with refused(errno.EINVAL):
        shutil.copyfile(copy / names[-1], pending / names[-1])
    assert not pending.exists()
    figures = mount.statistics()
    assert (figures["imports"]["pending"], figures["imports"]["dropped"]) == (0, 1)
    assert names_in(mount.path / "tiny") == ["detached"]


def test_cp_reports_a_spoilt_file_itself(mount: Mount, scratch: Path) -> None:
    copy = exported(mount, scratch, "tiny", MHA)
    spoil(copy, "bytes")
    assert "Invalid argument" in refusal("cp", "-r", copy, mount.path / "tiny")
    assert "dropped: 00001.kv does not have the checksum" in mount.log.read_text()


def test_session_under_another_name_is_refused(mount: Mount, scratch: Path) -> None:
    copy = exported(mount, scratch, "tiny", MHA)
    assert "Invalid argument" in refusal("cp", "-rT", copy, mount.path / "tiny" / ("12" * 16))


def test_file_longer_than_a_block_is_refused(mount: Mount) -> None:
    store(mount, "tiny", MHA, 1)
    pending = mount.path / "tiny" / ("12" * 16)
    pending.mkdir()
    with refused(errno.EINVAL):
        (pending / "00000.kv").write_bytes(bytes(MHA.block_bytes() + 1))
    with refused(errno.EINVAL):
        os.truncate(pending / "00000.kv", MHA.block_bytes() + 1)


@pytest.mark.parametrize("name", ["notes.txt", "0.kv", "00000.s1.kv", "00000.g1.kv", ".hidden"])
def test_file_that_no_session_has_is_refused(mount: Mount, name: str) -> None:
    store(mount, "tiny", MHA, 1)
    pending = mount.path / "tiny" / ("12" * 16)
    pending.mkdir()
    with refused(errno.EINVAL):
        (pending / name).write_bytes(b"x")


@pytest.mark.parametrize("name", ["x", "12" * 15, "AB" * 16, "12" * 17])
def test_directory_that_is_no_prefix_hash_is_refused(mount: Mount, name: str) -> None:
    store(mount, "tiny", MHA, 1)
    with refused(errno.EINVAL):
        (mount.path / "tiny" / name).mkdir()


def test_session_larger_than_the_warehouse_is_refused_with_enospc(scratch: Path) -> None:
    make_warehouse(scratch / "large", (160 << 20,))
    with mounted(scratch / "large", scratch / "mnt") as mount:
        copy = exported(mount, scratch, "big", BIG, 200)
    with mounted(scratch / "small", scratch / "mnt") as mount:
        store(mount, "big", BIG, 1, seed=3)
        assert "No space left" in refusal("cp", "-r", copy, mount.path / "big")
        assert not (mount.path / "big" / copy.name).exists()
