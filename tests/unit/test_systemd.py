"""The systemd units are ones that systemd accepts; the daemon's hides no mount from the host."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "systemd"
UNIT = FOLDER / "twfs@.service"
TIMER = FOLDER / "twfs-scrub@.timer"
# Each of these gives a unit a mount namespace of its own (systemd.exec(5)).
NAMESPACED = (
    "PrivateTmp", "PrivateDevices", "PrivateMounts", "ProtectSystem", "ProtectHome",
    "ProtectKernelTunables", "ProtectControlGroups", "ReadOnlyPaths", "BindPaths",
)  # fmt: skip


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("name", [path.name for path in sorted(FOLDER.glob("*@.*"))])
def test_systemd_accepts_the_unit(tmp_path: Path, name: str) -> None:
    # The paths that need not exist here are those of the installed programs.
    for unit in FOLDER.glob("*@.*"):
        text = re.sub(r"/usr/bin/twfsd?\b", sys.executable, unit.read_text())
        (tmp_path / unit.name.replace("@", "@demo")).write_text(text)
    named = name.replace("@", "@demo")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / named)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "@demo" in line]
    assert not complaints
    assert done.returncode == 0, done.stderr


def test_the_timer_is_weekly_spread_and_makes_up_for_missed_turns() -> None:
    lines = TIMER.read_text().splitlines()
    assert {"OnCalendar=weekly", "RandomizedDelaySec=24h", "Persistent=true"} <= set(lines)


def test_the_scrub_unit_never_opens_the_warehouse_itself() -> None:
    text = (FOLDER / "twfs-scrub@.service").read_text()
    assert "Requisite=twfs@%i.service\n" in text
    assert re.search(r"^ExecStart=/usr/bin/twfs scrub \S+ --socket \S+", text, re.MULTILINE)


@pytest.mark.parametrize("setting", NAMESPACED)
def test_mount_stays_visible_to_the_host(setting: str) -> None:
    assert not any(line.startswith(f"{setting}=") for line in UNIT.read_text().splitlines())
