"""Guaranteed: whatever is wrong with LMDB's pages, the daemon and the tools say so and do not die.

LMDB's pages have no checksums, and it aborts on some damage. Pages of a real data.mdb are spoilt at
random: bits, words, headers, whole pages in each other's places. Opened in a child each time, it
ends with one of our errors, with findings or with none, never by a signal or a traceback. For more:
`TWFS_DAMAGES=2000 TWFS_DAMAGES_SEED=7 ./run test tests/crash/test_metadata_damage.py`.
"""

import os
import random
import signal
import traceback
from collections import Counter
from pathlib import Path

import pytest

from fuzz.sample import Copy, look_at_everything
from support.cli import assert_refused, twfs
from support.warehouses import make_warehouse, stop_tending
from twfs.errors import CorruptMetadata, TwfsError
from twfs.metadata.metafile import scout
from twfs.units import ALIGN
from twfs.warehouse import Warehouse

TIMES = int(os.environ.get("TWFS_DAMAGES", "40"))
SEED = int(os.environ.get("TWFS_DAMAGES_SEED", "1"))
HANG_S = 60


def spoilt(chance: random.Random, content: bytes) -> bytes:
    """*content* with one to four places changed."""
    data = bytearray(content)
    how = chance.randrange(4)
    for _ in range(chance.choice((1, 1, 4))):
        at = chance.randrange(len(data))
        start, other = at // ALIGN * ALIGN, chance.randrange(len(data) // ALIGN) * ALIGN
        if how == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            data[at : at + 8] = chance.randbytes(8)
        elif how == 2:
            data[start : start + ALIGN] = data[other : other + ALIGN]
        else:
            data[start : start + 16] = chance.randbytes(16)
    return bytes(data[: len(content)])


def outcome(directory: Path) -> str:
    """What becomes of a child that opens the warehouse and asks it everything."""
    child = os.fork()
    if not child:
        signal.alarm(HANG_S)
        code = 3
        try:
            with Warehouse.open(directory, wary=True) as warehouse:
                stop_tending(warehouse)
                look_at_everything(warehouse)
            code = 0
        except TwfsError:
            code = 1
        except BaseException:  # noqa: BLE001 - that is what must not be
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {0: "opened", 1: "refused", 3: "traceback"}.get(code, f"signal {-code}")


def outcomes(seed: int, times: int) -> Counter[str]:
    """Spoil and open so often."""
    chance, copy, seen = random.Random(seed), Copy(), Counter[str]()
    content = copy.database.read_bytes()
    for _ in range(times):
        copy.renew()
        copy.database.write_bytes(spoilt(chance, content))
        seen[outcome(copy.directory)] += 1
    return seen


@pytest.mark.slow
def test_no_damage_of_pages_ends_who_opens_them_warily() -> None:
    seen = outcomes(SEED, TIMES)
    assert set(seen) == {"opened", "refused"}, seen


def aborting(content: bytes) -> bytes:
    """*content* with the pages of its largest tree called pages of a branch: LMDB aborts on it."""
    data = bytearray(content)
    for start in range(2 * ALIGN, len(data), ALIGN):
        flags = int.from_bytes(data[start + 10 : start + 12], "little")
        if flags == 2:  # a leaf
            data[start + 10] = 1
    return bytes(data)


def test_damage_that_kills_lmdb_is_one_sentence_of_the_tools(tmp_path: Path) -> None:
    copy = Copy(tmp_path / "w")
    copy.database.write_bytes(aborting(copy.database.read_bytes()))
    with pytest.raises(CorruptMetadata, match="made anew"):
        scout(copy.directory / "meta")
    for command in ("check", "status"):
        assert_refused(twfs(command, copy.directory), CorruptMetadata.exit_code)
    done = twfs(copy.directory, "--no-mount", module="twfs_mount.main")
    assert done.returncode == CorruptMetadata.exit_code, done.stderr
    assert "Traceback" not in done.stderr


def test_a_scout_changes_nothing(scratch: Path) -> None:
    make_warehouse(scratch)
    before = (scratch / "meta" / "data.mdb").read_bytes()
    scout(scratch / "meta")
    assert (scratch / "meta" / "data.mdb").read_bytes() == before
    scout(scratch / "nothing")
