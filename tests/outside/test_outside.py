"""Guaranteed: programs of others, and readers that do anything, see right bytes or plain errors.

fio verifies its own pattern through put and mount; stress-ng's stressors of the filesystem are
refused and harm nobody; readers at random read while sessions are stored, evicted and removed. The
longer forms, and pjdfstest, are in suites.py and README.md.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outside.suites import run_stress, serves_on
from support.mounting import Mount, mounted, store
from support.warehouses import BIG, MHA, chain_of, payloads_of
from twfs.store import ReadOutcome
from twfs.units import ByteCount

READERS = 4
SECONDS = 6.0
STRESSORS = ["access", "chmod", "dentry", "dir", "fstat", "getdent", "hdd", "open", "xattr"]

pytestmark = [pytest.mark.fuse, pytest.mark.slow]


def fio(name: str, file: Path, mode: str, size: int) -> subprocess.CompletedProcess[str]:
    """Write or read *file* with crc32c in every 4 KiB."""
    return subprocess.run(
        [
            "fio", f"--name={name}", f"--filename={file}", f"--rw={mode}", "--bs=4k",
            f"--size={size}", "--verify=crc32c", "--verify_fatal=1", "--do_verify=0",
            *(["--readonly"] if mode == "read" else []),
        ],
        capture_output=True, text=True, check=False, cwd=file.parent if mode == "write" else "/",
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
def test_fio_verifies_what_it_wrote_through_put_and_mount(scratch: Path, tmp_path: Path) -> None:
    blocks, size = 3, BIG.block_bytes()
    files = [tmp_path / f"pattern{number}" for number in range(blocks)]
    for file in files:
        assert fio("write", file, "write", size).returncode == 0
    with mounted(scratch / "w", tmp_path / "mount") as mount:
        with mount.client() as client:
            model = client.open_model("m", BIG)
            names = chain_of(model, blocks)
            assert client.put(model, names, [file.read_bytes() for file in files]).held == blocks
        session = mount.session("m", names)
        copy = tmp_path / "copy.kv"
        for number in range(blocks):
            done = fio("read", session / f"{number:05d}.kv", "read", size)
            assert done.returncode == 0, done.stderr
            shutil.copyfile(session / f"{number:05d}.kv", copy)
            assert fio("read", copy, "read", size).returncode == 0
        with copy.open("r+b") as spoilt:  # seen to fail
            spoilt.seek(5000)
            spoilt.write(b"\0\1\2\3")
        assert fio("read", copy, "read", size).returncode != 0


@pytest.mark.skipif(shutil.which("stress-ng") is None, reason="needs stress-ng")
def test_stressors_of_the_filesystem_change_nothing(scratch: Path, tmp_path: Path) -> None:
    with mounted(scratch / "w", tmp_path / "mount") as mount:
        store(mount, "m", MHA, 4)
        before = mount.statistics()
        ended = run_stress(mount.path / "m", STRESSORS)
        assert all(each["exit"] is not None for each in ended.values()), ended
        assert serves_on(mount, before)


def churn(mount: Mount, seconds: float) -> int:
    """Store, evict and remove sessions; the number of rounds."""
    rounds, end = 0, time.monotonic() + seconds
    with mount.client() as client:
        model = client.open_model("m", MHA)
        while time.monotonic() < end:
            rounds += 1
            names = chain_of(model, 3 + rounds % 5, rounds % 7)
            client.put(model, names, payloads_of(MHA, names))
            if rounds % 2:
                client.evict(ByteCount(8192 * (rounds % 9)))
            if rounds % 5 == 0:
                for head in client.heads(model.id)[:1]:
                    client.remove(model.id, head)
        names = chain_of(model, 4, 100)
        assert client.put(model, names, payloads_of(MHA, names)).held == 4
        into = [bytearray(MHA.block_bytes()) for _ in range(4)]
        with client.match(model, names) as match:
            assert set(match.read_into(into).outcomes) == {ReadOutcome.HIT}
    return rounds


def test_readers_at_random_see_right_bytes_or_that_they_are_gone(
    scratch: Path, tmp_path: Path
) -> None:
    with mounted(scratch / "w", tmp_path / "mount") as mount:
        store(mount, "m", MHA, 5)
        readers = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "outside.readers", str(mount.path), str(SECONDS),
                    str(seed),
                ],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            for seed in range(READERS)
        ]  # fmt: skip
        assert churn(mount, SECONDS) > 5
        for reader in readers:
            said, wrong = reader.communicate(timeout=60)
            assert reader.returncode == 0, wrong
            counts = dict(part.split("=") for part in said.split())
            assert int(counts["bytes"]) > 0, said
        figures = mount.statistics()
        assert figures["mount"]["failed_requests"] == 0
