"""docs/files.md is true: its commands run, on a real mount."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support.mounting import mounted

DOCUMENT: Final = Path(__file__).parents[2] / "docs/files.md"


@pytest.mark.fuse
@pytest.mark.root
def test_the_commands_of_the_page_run(scratch: Path, tmp_path: Path) -> None:
    commands = re.findall(r"^```sh\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    with mounted(scratch, tmp_path / "tw") as mount:
        script = "set -eux\n" + "".join(commands).replace("/tw/", f"{mount.path}/")
        script = script.replace("/var/lib/twfs", str(mount.directory))
        search = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        done = subprocess.run(
            ["bash", "-c", script], env={**os.environ, "PATH": search}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert 'user.twfs.class="durable"' in done.stdout
        assert 'user.twfs.extents="0:' in done.stdout
        for counter in ("counters.mount_reads +1", "counters.mount_read_bytes +[1-9].*",
                        "records.files +3", "retention.durable.bytes +[1-9].*"):  # fmt: skip
            assert re.search(rf"^{counter}$", done.stdout, re.MULTILINE), done.stdout + counter
