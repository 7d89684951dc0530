"""Guaranteed: kvikio brings the same bytes, finds the same damage, and keeps to a deadline.

kvikio is the real one, under a stand-in for libcuda.so.1 where there is no GPU.
"""

from pathlib import Path

import pytest

from support import fakecuda
from support.faultydisks import needs_faults

pytest.importorskip("kvikio")
TRY = "from support.cufiles import main; main()"


@pytest.mark.parametrize("payload_bytes", [14_240, 65_536, 1 << 20, 3_000_001])
@pytest.mark.parametrize("memory", ["host", "gpu"])
def test_kvikio_brings_the_same_bytes_and_finds_the_same_damage(
    scratch: Path, memory: str, payload_bytes: int
) -> None:
    folder = fakecuda.build(scratch)
    out = fakecuda.run_under(folder, TRY, str(scratch), memory, str(payload_bytes))
    assert out.startswith("read ")


@pytest.mark.root
@pytest.mark.fuse
@needs_faults
@pytest.mark.parametrize("payload_bytes", [65_536, 3_000_001])
def test_a_device_that_hangs_is_left_at_the_deadline(scratch: Path, payload_bytes: int) -> None:
    folder = fakecuda.build(scratch)
    out = fakecuda.run_under(folder, TRY, str(scratch), "hang", str(payload_bytes))
    assert out.startswith("read ")
