"""A tenant's directories are there for its owner and for operators, and for nobody else.

Real users to the kernel: `ls`, `cat`, `stat` and `cp` run as other uids, after the owner has made
the kernel keep names and attributes.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.mounting import Mount, mounted, names_in, until
from support.warehouses import MHA, chain_of, payload_of, payloads_of
from twfs.prefix import Names

ENGINE, OWNER, OTHER = 61_001, 61_003, 61_002
OPTIONS = "allow_other,dir_mode=0777"  # all may come in, and import


def as_user(uid: int, *command: object) -> tuple[int, str]:
    """Run *command* as *uid* without any privilege; its exit code and what it printed."""
    done = subprocess.run(
        list(map(str, command)), user=uid, group=uid, extra_groups=[], capture_output=True,
        text=True, errors="replace", check=False, cwd="/",
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture
def mount(scratch: Path) -> Iterator[Mount]:
    scratch.chmod(0o755)
    with mounted(scratch / "warehouse", scratch / "mnt", OPTIONS) as made:
        with made.client() as root:
            root.operate("tenant-add", name="acme", owner=OWNER, uids=[ENGINE])
            root.operate("tenant-add", name="other", owner=OTHER, uids=[OTHER])
        yield made


def session(mount: Mount, tenant: str | None, blocks: int = 2) -> tuple[Path, Names]:
    """Store a session for *tenant*; its directory."""
    with mount.client() as client:
        model = client.open_model("tiny", MHA, tenant=tenant)
        names = chain_of(model, blocks)
        assert client.put(model, names, payloads_of(MHA, names)).held == blocks
        loose = chain_of(model, 3, 9).slice(2, 3)
        assert client.put(model, loose, payloads_of(MHA, loose)).held == 1
    return mount.session("tiny", names), names


@pytest.mark.fuse
@pytest.mark.root
def test_only_owner_and_operator_see_a_tenants_sessions(mount: Mount) -> None:
    (acme, names), (everybody, _) = session(mount, "acme"), session(mount, None)
    model = acme.parent
    for stranger in (OTHER, ENGINE):  # first, with nothing kept by the kernel
        assert as_user(stranger, "stat", acme)[0] != 0
    for uid, sees in ((0, True), (OWNER, True), (OTHER, False), (ENGINE, False)):
        code, listed = as_user(uid, "ls", model)
        assert code == 0
        assert (acme.name in listed) == sees, uid
        assert everybody.name in listed
        code, listed = as_user(uid, "ls", model / "detached")
        assert (code, len(listed.split())) == (0, 2 if sees else 1)
        code, _ = as_user(uid, "cat", acme / "00000.kv", acme / "chain.json")
        assert (code == 0) == sees, uid
        assert as_user(uid, "cat", everybody / "chain.json")[0] == (0 if uid == 0 else 1)
    # The owner has just looked, so the kernel keeps all of it: modes and owner guard that.
    assert as_user(OWNER, "ls", "-l", acme)[0] == 0
    for stranger in (OTHER, ENGINE):
        for command in ("ls", "cat", "rm -r", "getfattr -d"):
            assert as_user(stranger, *command.split(), acme)[0] != 0
        assert as_user(stranger, "cat", acme / "00000.kv")[0] != 0
    until(lambda: as_user(OTHER, "stat", acme)[0] != 0, "the kernel lets go of the name")
    found, file = acme.stat(), (acme / "00000.kv").stat()
    assert (found.st_uid, oct(found.st_mode)) == (OWNER, "0o40700")
    assert (file.st_uid, oct(file.st_mode)) == (OWNER, "0o100400")
    assert (acme / "00001.kv").read_bytes() == payload_of(MHA, names.hash_at(1)).tobytes()


@pytest.mark.fuse
@pytest.mark.root
def test_attributes_and_chain_json_name_the_tenant(mount: Mount) -> None:
    (acme, _), (everybody, _) = session(mount, "acme"), session(mount, None)
    for place, name in ((acme, "acme"), (everybody, "everybody")):
        for path in (place, place / "00000.kv"):
            shown = subprocess.run(
                ["getfattr", "--only-values", "-n", "user.twfs.tenant", str(path)],
                capture_output=True, check=True, text=True,
            )  # fmt: skip
            assert shown.stdout == name
    assert '"tenant": "acme"' in (acme / "chain.json").read_text()
    assert "tenant" not in (everybody / "chain.json").read_text()


@pytest.mark.fuse
@pytest.mark.root
def test_an_import_is_its_tenants_and_only_for_who_may(mount: Mount, scratch: Path) -> None:
    acme, names = session(mount, "acme", 3)
    copy = scratch / "copy"
    subprocess.run(["cp", "-r", str(acme), str(copy)], check=True)
    subprocess.run(["chmod", "-R", "a+rX", str(copy)], check=True)
    assert as_user(OWNER, "sh", "-c", f"rm {acme}/* && rmdir {acme}")[0] == 0
    assert acme.name not in names_in(acme.parent)
    assert as_user(OTHER, "cp", "-r", copy, acme)[0] != 0
    assert acme.name not in names_in(acme.parent)
    assert as_user(OWNER, "cp", "-r", copy, acme)[0] == 0
    assert acme.stat().st_uid == OWNER
    assert as_user(OTHER, "ls", acme)[0] != 0
    with mount.client() as client:
        model = client.open_model("tiny", tenant="acme")
        assert client.lookup(model, names) == 3
        assert client.chain_of(model.id, names.hash_at(2))[0].block.tenant == 1


@pytest.mark.fuse
@pytest.mark.root
def test_a_pending_import_is_its_makers_alone(mount: Mount) -> None:
    session(mount, None)
    pending = mount.path / "tiny" / ("ab" * 16)
    made = f"mkdir {pending} && head -c 100 /dev/zero > {pending}/00000.kv"
    assert as_user(OWNER, "sh", "-c", made)[0] == 0
    assert as_user(OTHER, "cat", pending / "00000.kv")[0] != 0
    assert pending.name not in as_user(OTHER, "ls", pending.parent)[1]
    assert pending.name in as_user(OWNER, "ls", pending.parent)[1]
    assert as_user(OTHER, "mkdir", pending)[0] != 0
    (pending / "00000.kv").unlink()
    pending.rmdir()
