"""NIXL's POSIX plug-in, unmodified, with files below /files, each way it can do its I/O.

Whole files are read after a restart. Of one that is lost NIXL says "ERR" or raises, whatever it was
lost by; it never says "DONE" with other bytes. With libaio and io_uring that is the end of that
request alone. With POSIX AIO the back end is of no use any more, and may take its process along
(SIGSEGV, seen here): NIXL 1.5 puts a failed I/O into its queue a second time (checkCompleted in
src/plugins/posix/posix_aio_io_queue.cpp), with a pointer to a request that its caller releases.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.asking import Asked
from support.engines import engine_python, until
from support.faultydisks import needs_faults
from support.filefaults import faulty_files
from support.mounting import mounted
from support.snippets import settings_of

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.fuse, pytest.mark.root,
              pytest.mark.timeout(300)]  # fmt: skip

FILES: Final = 16
NUMBERS: Final = list(range(FILES))
BACKEND, *OTHERS = settings_of("files.md", "NIXL")
PARAMS: Final[dict[str, dict[str, str]]] = {
    "libaio": {},
    **{next(iter(each)): each for each in map(json.loads, OTHERS)},
}


def mover_of(directory: Path, how: str) -> Asked:
    """A process of NIXL's; see support.nixlposix."""
    python = engine_python("nixl")
    params = json.dumps(PARAMS[how])
    return Asked([python, "-m", "support.nixlposix", directory, BACKEND, params])


def moved(command: str, directory: Path, how: str) -> int:
    """Files that came out right."""
    with mover_of(directory, how) as mover:
        count: int = mover.ask(do=command)
    assert mover.process.returncode == 0
    return count


@pytest.mark.parametrize("how", PARAMS)
def test_files_are_written_and_read_after_a_restart(
    how: str, scratch: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "mnt/files/kv"
    with mounted(scratch, tmp_path / "mnt"):
        directory.mkdir()
        assert moved("write", directory, how) == FILES
    with mounted(scratch, tmp_path / "mnt") as mount:
        assert moved("read", directory, how) == FILES
        assert mount.statistics()["counters"]["mount_reads"] >= FILES


@contextmanager
def reader_of(directory: Path, how: str) -> Iterator[Asked]:
    """A process that has all files open; it must end well if it can."""
    with mover_of(directory, how) as reader:
        reader.ask(do="open")
        yield reader
    assert reader.process.returncode == 0 or not goes_on(how)


@needs_faults
@pytest.mark.parametrize("how", PARAMS)
def test_what_is_lost_is_an_error_of_its_file_alone(how: str, scratch: Path) -> None:
    with faulty_files(scratch) as files:
        for number, losing in (3, files.rotten), (7, files.unreadable):
            path = written(files.directory, how)[number]
            with reader_of(files.directory, how) as reader, losing(path):
                assert reader.ask(do="together") == "ERR"
                if goes_on(how):
                    others = [other for other in NUMBERS if other != number]
                    assert reader.ask(do="each") == {"done": others, "right": others}
            files.gone(path)
        written(files.directory, how)
        assert moved("read", files.directory, how) == FILES


@needs_faults
@pytest.mark.parametrize("how", PARAMS)
def test_a_mount_killed_during_a_read_is_an_error(how: str, scratch: Path) -> None:
    with faulty_files(scratch) as files:
        written(files.directory, how)
        with reader_of(files.directory, how) as reader:
            files.hang()
            reader.send(do="together")
            files.kill_in_a_read()
            assert reader.answer() == "ERR"
            if goes_on(how):
                assert reader.ask(do="each") == {"done": [], "right": []}  # the dead mount's
            files.mount.start()
            if goes_on(how):
                reader.ask(do="open")
                assert reader.ask(do="each") == {"done": NUMBERS, "right": NUMBERS}
        assert moved("read", files.directory, how) == FILES


def goes_on(how: str) -> bool:
    """Tell whether a back end works on after an error; see the module's docstring."""
    return how != "use_posix_aio"


def written(directory: Path, how: str) -> list[Path]:
    """Have all files written; their paths, when all have their names."""
    paths = [directory / f"obj_{number}.bin" for number in NUMBERS]
    assert moved("write", directory, how) == FILES
    until(lambda: all(path.exists() for path in paths), "all have their names")
    return paths
