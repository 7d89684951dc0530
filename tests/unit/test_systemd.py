"""The systemd unit is one that systemd accepts, and hides no mount from the host."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "systemd" / "twfs@.service"
# Each of these gives a unit a mount namespace of its own (systemd.exec(5)).
NAMESPACED = (
    "PrivateTmp", "PrivateDevices", "PrivateMounts", "ProtectSystem", "ProtectHome",
    "ProtectKernelTunables", "ProtectControlGroups", "ReadOnlyPaths", "BindPaths",
)  # fmt: skip


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    # The one path that need not exist here is the installed daemon's.
    unit = tmp_path / "twfs@demo.service"
    unit.write_text(UNIT.read_text().replace("/usr/bin/twfsd", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "twfs@demo" in line]
    assert not complaints
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("setting", NAMESPACED)
def test_mount_stays_visible_to_the_host(setting: str) -> None:
    assert not any(line.startswith(f"{setting}=") for line in UNIT.read_text().splitlines())
