"""Fuzz one target for as long as you like: `python tests/fuzz/run.py TARGET --seconds 600`.

Coverage-guided with atheris where that is installed (`pip install atheris`: CPython 3.11 to 3.13),
else by the same mutations without guidance, which says so. Begins from the target's own seeds and
from tests/fuzz/corpus/TARGET. What breaks the target is written there, shortened as far as it still
breaks it, so that tests/fuzz/test_fuzz.py repeats it for ever; the exit code is then 1.

`--store` keeps the seeds and whatever reached new code in the corpus, at most KEPT_MAX inputs.
"""

import argparse
import hashlib
import importlib.util
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.mutating import BYTES_MAX

CORPUS: Final = Path(__file__).parent / "corpus"
HANG_SECONDS: Final = 10.0  # of one input: all of them end within milliseconds
MEMORY_BYTES: Final = 1 << 30  # above what the sample takes
KEPT_MAX: Final = 40


def parent_directory() -> str | None:
    """Where to put the sample: in memory if that can do O_DIRECT, for each input opens it anew."""
    named = os.environ.get("TWFS_FUZZ_DIR")
    if named is None and os.access("/dev/shm", os.W_OK):
        with suppress(OSError), tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
            return "/dev/shm"
    return named or os.environ.get("TWFS_TEST_DIR")


class Hang(Exception):
    """An input took longer than HANG_SECONDS."""


def _alarm(_: int, frame: FrameType | None) -> None:
    raise Hang(f"still in {frame.f_code.co_qualname if frame else '?'}")


def stored(target: str) -> list[bytes]:
    """The inputs kept for *target*, in order of their names."""
    folder = CORPUS / target
    return [path.read_bytes() for path in sorted(folder.glob("*"))] if folder.is_dir() else []


def keep(target: str, data: bytes, kind: str) -> Path:
    """Keep *data* in the corpus."""
    path = CORPUS / target / f"{kind}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


class Fuzzer:
    """Feeds one target, and remembers what broke it: one input per place."""

    def __init__(self, name: str, seed: int) -> None:
        from fuzz.targets import TARGETS

        self.name = name
        self.target = TARGETS[name]
        self.chance = random.Random(seed)
        self.inputs = [*self.target.seeds(), *stored(name)]
        self.runs = 0
        self.broken: dict[str, bytes] = {}

    def breaks(self, data: bytes) -> str | None:
        """The place where *data* breaks the target, None if it does not."""
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        try:
            self.target.feed(data)
        except Exception as error:  # noqa: BLE001 - whatever it is is what is looked for
            last = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return None

    def try_one(self, data: bytes) -> bool:
        """Feed *data*; note and shorten it if it breaks the target somewhere new."""
        self.runs += 1
        place = self.breaks(data)
        if place is None or place in self.broken:
            return place is None
        self.broken[place] = data = self.shortened(data, place)
        path = keep(self.name, data, "broke")
        print(f"{self.name}: {place}: {path}", file=sys.stderr, flush=True)  # noqa: T201
        return False

    def shortened(self, data: bytes, place: str) -> bytes:
        """A shorter input that breaks at the same *place*, if cutting finds one."""
        step = len(data) // 2
        while step and not place.startswith("Hang"):
            at = 0
            while at < len(data):
                shorter = data[:at] + data[at + step :]
                if self.breaks(shorter) == place:
                    data = shorter
                else:
                    at += step
            step //= 2
        return data

    def mutated(self, data: bytes | None = None) -> bytes:
        """A spoilt form of *data*, or of any input."""
        for _ in range(self.chance.choice((1, 1, 2, 3))):
            data = self.target.mutate(self.chance, data or self.chance.choice(self.inputs))
        return data or b""

    def run_blindly(self, seconds: float) -> None:
        """Mutate without guidance."""
        for data in self.inputs:
            self.try_one(data)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.try_one(self.mutated())

    def run_guided(self, seconds: float, found: Path) -> None:
        """Let atheris choose by coverage; it ends this process itself."""
        import atheris

        seeds = found / "seeds"
        seeds.mkdir()
        for data in self.inputs:
            (seeds / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)

        def mutate(data: bytes, size_max: int, seed: int) -> bytes:
            self.chance.seed(seed)
            if self.chance.random() < 0.2:
                return bytes(atheris.Mutate(data, size_max))
            return self.mutated(data)[:size_max]

        def feed(data: bytes) -> None:
            self.try_one(data)  # and no exception out of it: atheris would end at the first

        options = [
            f"-max_total_time={int(seconds)}", f"-max_len={BYTES_MAX}", "-timeout=60",
            "-rss_limit_mb=8192", f"-artifact_prefix={found}/", "-verbosity=0",
            "-print_final_stats=1", str(seeds),
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *options], feed, custom_mutator=mutate)
        atheris.Fuzz()


def guided(name: str, seconds: float, seed: int) -> None:
    """Fuzz with coverage of our own modules, in a child: atheris does not come back."""
    import atheris

    with tempfile.TemporaryDirectory(prefix="twfs-atheris-", dir=parent_directory()) as folder:
        child = os.fork()
        if child == 0:
            os.environ["TWFS_FUZZ_DIR"] = folder  # the sample goes with it: atheris just exits
            with atheris.instrument_imports(include=["twfs", "twfs_mount", "twfs_tools"]):
                fuzzer = Fuzzer(name, seed)
            signal.signal(signal.SIGALRM, _alarm)
            fuzzer.run_guided(seconds, Path(folder))
        _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{name}: the fuzzed process ended with {status:#x}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one target and return 1 if anything broke it."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blind", action="store_true", help="without atheris")
    parser.add_argument("--store", action="store_true", help="keep the seeds in the corpus")
    given = parser.parse_args(arguments)
    known = set((CORPUS / given.target).glob("broke-*"))
    if given.blind or importlib.util.find_spec("atheris") is None:
        print("without coverage: atheris is not installed, or --blind was given")  # noqa: T201
        blindly(given.target, given.seconds, given.seed, store=given.store)
    else:
        guided(given.target, given.seconds, given.seed)
    found = set((CORPUS / given.target).glob("broke-*")) - known
    print(f"{given.target}: {len(found)} new places broken")  # noqa: T201
    return bool(found)


def blindly(name: str, seconds: float, seed: int, *, store: bool) -> None:
    """Fuzz in this process, without coverage; all that broke before is tried first."""
    signal.signal(signal.SIGALRM, _alarm)
    fuzzer = Fuzzer(name, seed)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # Not RLIMIT_AS: LMDB maps a terabyte of address space, and takes memory as it is filled.
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    if store:
        for data in fuzzer.target.seeds()[:KEPT_MAX]:
            keep(name, data, "seed")
    fuzzer.run_blindly(seconds)
    print(f"{name}: {fuzzer.runs} inputs, {len(fuzzer.broken)} places broken")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
