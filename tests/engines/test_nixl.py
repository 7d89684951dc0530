"""docs/nixl.md: NIXL's own POSIX back end reads published blocks where they lie.

On an image file by the API, and on a block device by what getfattr says. The page's program and
commands run as they stand. Of a block that is lost the program prints nothing.
"""

import re
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import xxhash

from support.daemon import running_daemon
from support.engines import engine_environment, engine_python
from support.faultrules import Act, Op, Rule
from support.faultydisks import faulty_disks, needs_faults
from support.loops import loop_device, needs_loops
from support.mounting import mounted, shell, store
from support.snippets import run_lines, snippets_of
from twfs.devices.formatting import DeviceSpec
from twfs.layout import Arrangement, Group, Layout
from twfs.store import iterate_heads
from twfs.units import ALIGN, ByteCount
from twfs.warehouse import Warehouse

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

BLOCKS: Final = 6
# Blocks of 69,120 bytes: no multiple of 4 KiB, so what is read is longer than the payload.
LAYOUT: Final = Layout(
    "m", (Group(3, 2, 36, arrangement=Arrangement.LAYER_KV_TOKEN_HEAD),), 80
)  # fmt: skip


def program() -> str:
    """The page's Python, whole."""
    (text,) = snippets_of("nixl.md", "python")
    return text


def run(source: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run *source* in NIXL's environment."""
    return subprocess.run(
        [engine_python("nixl"), "-c", source, *map(str, arguments)],
        env=engine_environment(), capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


def run_inside(source: str, *arguments: object) -> str:
    """Run *source* in NIXL's environment and return what it prints."""
    done = run(source, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.root
@needs_loops
@pytest.mark.parametrize("kind", ["image", "block device"])
def test_the_pages_program_reads_what_was_put(scratch: Path, kind: str) -> None:
    with ExitStack() as stack:
        path, size = scratch / "disk.img", 64 << 20
        spec = DeviceSpec(path, ByteCount(size))
        if kind == "block device":
            spec = DeviceSpec(stack.enter_context(loop_device(path, size)))
        Warehouse.create(scratch / "warehouse", [spec])
        daemon = stack.enter_context(running_daemon(scratch / "warehouse"))
        with daemon.client() as client:
            model = client.open_model("tiny", LAYOUT)
            names = model.chain().extend(range(BLOCKS * LAYOUT.block_tokens)).names()
            payloads = [
                np.random.default_rng(index).integers(0, 256, LAYOUT.block_bytes(), np.uint8)
                for index in range(BLOCKS)
            ]
            assert client.put(model, names, payloads).held == BLOCKS
        said = run_inside(program(), daemon.socket, "tiny", BLOCKS * LAYOUT.block_tokens + 5)
        whole = b"".join(payload.tobytes() for payload in payloads)
        assert said == f"{BLOCKS} {len(whole)} {xxhash.xxh3_128_hexdigest(whole)}"
        status, listed = run_lines("nixl.md", 2, **{"/var/lib/twfs": str(daemon.directory)})
        assert re.search(rf"^counters.matched_blocks +{BLOCKS}$", status, re.MULTILINE), status
        assert re.search(r"^leases.leases_granted +1$", status, re.MULTILINE), status
        assert "read by" not in status
        assert f"1 sessions, {BLOCKS} blocks" in listed, listed


@pytest.mark.root
@pytest.mark.fuse
@needs_faults
@pytest.mark.parametrize(
    ("act", "error"), [(Act.FLIP, "AssertionError"), (Act.EIO, "NIXL_ERR_BACKEND")]
)
def test_the_pages_program_gives_no_bytes_of_a_block_that_is_lost(
    scratch: Path, act: Act, error: str
) -> None:
    with faulty_disks(scratch / "disks", {"a": 64 << 20}) as disks:
        Warehouse.create(scratch / "warehouse", [DeviceSpec(disks.loops["a"])])
        with running_daemon(scratch / "warehouse") as daemon, daemon.client() as client:
            model = client.open_model("tiny", LAYOUT)
            names = model.chain().extend(range(BLOCKS * LAYOUT.block_tokens)).names()
            payloads = [np.full(LAYOUT.block_bytes(), index, np.uint8) for index in range(BLOCKS)]
            assert client.put(model, names, payloads).held == BLOCKS
            (head,) = iterate_heads(client, model.id)
            low = client.chain_of(model.id, head)[2].block.extents[0].offset + ALIGN
            disks.set_rules(Rule(disk="a", op=Op.READ, act=act, low=low, high=low + 1))
            done = run(program(), daemon.socket, "tiny", BLOCKS * LAYOUT.block_tokens)
            disks.lift()
    assert done.returncode == 1
    assert error in done.stderr
    verified = program().partition("block.checksums.xxh3")[0].count("\n") + 1  # the line of it
    assert (f"line {verified}, in" in done.stderr) == (act is Act.FLIP)


# Reads one run: path, offset, length, payload bytes. The page's own function does it.
BY_NAME: Final = """
path, offset, length, size = sys.argv[1], *map(int, sys.argv[2:])
memory = mmap.mmap(-1, length)
agent = nixl_agent("reader", nixl_agent_config(backends=["POSIX"]))
assert read(path, offset, length, ctypes.addressof(ctypes.c_char.from_buffer(memory)))
print(xxhash.xxh3_128_hexdigest(memory[:size]))
"""


@pytest.mark.root
@pytest.mark.fuse
@needs_loops
def test_what_getfattr_says_is_enough_to_read_a_block(scratch: Path) -> None:
    commands = snippets_of("nixl.md", "sh")[1].splitlines()
    assert len(commands) == 2
    imports, _, rest = program().partition("\nsocket, name")
    function = "def read" + rest.partition("def read")[2].partition("\n\n\n")[0]
    with loop_device(scratch / "disk.img", 64 << 20) as device:
        Warehouse.create(scratch / "warehouse", [DeviceSpec(device)])
        with mounted(scratch / "warehouse", scratch / "tw") as mount:
            _, names = store(mount, "tiny", LAYOUT, 5 * BLOCKS)  # sixteen tokens each
            files = sorted(mount.session("tiny", names).glob("*.kv"))
            assert len(files) == BLOCKS
            for file in files:
                place, checksum = (
                    shell("sh", "-c", command.replace("/tw/MODEL/HEAD/00000.kv", str(file)))
                    for command in commands
                )
                path, _, run = place.rpartition(":")
                offset, _, length = run.partition("+")
                assert Path(path).is_block_device()
                source = f"{imports}\n{function}\n{BY_NAME}"
                found = run_inside(source, path, offset, length, file.stat().st_size)
                assert found == checksum == xxhash.xxh3_128_hexdigest(file.read_bytes())
