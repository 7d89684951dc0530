"""Power cuts in process: a recorded load, cut at random places, and each state opened and checked.

    python tests/crash/powercuts.py --images 10000 --seed 1
    python tests/crash/powercuts.py --images 10000 --seed 1 --durability relaxed
    python tests/crash/powercuts.py --images 10000 --seed 1 --files

A round is one load (support/cutload.py) on two images of 16 MiB, recorded (support/powercut.py),
and states that a cut may leave: any place of the log, what was flushed, and of the rest none, all,
the first, some, or single sectors. Each state is opened as a warehouse, and is bad unless

* LMDB's own checker finds nothing, and the warehouse opens;
* the records are exactly those of one commit that may be the last: in strict the last one that
  was answered or the one under way, in relaxed also the one before;
* all that was answered as published and not removed since is there: in relaxed but for the last
  commit's;
* `check` with every payload finds nothing, and every checksum is that of the bytes of the name;
* no generation that stands in a header, and no model or epoch, is given again; a match of a chain
  reads back right, and ends where its records end; a name that was never offered is a miss;
* of one image in six: what it takes for free can be written, and the checker finds nothing.

With `--files` the load (support/cutfiles.py) makes, writes anew, renames, renames over and removes
mounted files, several at once, and directories; a state is bad unless

* LMDB's own checker finds nothing, and the warehouse opens;
* the tree is that before or behind the change under way, with all bytes: every change that was
  answered is there, and of the other all or nothing; in relaxed the last commit may be undone;
* no file that was not closed is there, and `check` with every payload finds nothing;
* of one image in six: files can be made there, and renamed over each other.

`--broken NAME` runs a writer that is broken on purpose (support/brokenwriters.py): it must be
caught. Prints one JSON document: images tried, bad ones, those of them that lost a publish, those
in which relaxed lost its last commit, seconds. The exit code is 0 if none is bad.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.brokenwriters import BROKEN, BROKEN_FILES
from support.cutting import run
from twfs.store import Durability


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 if no image is bad."""
    parser = argparse.ArgumentParser(description="Cut the power of a recorded load.")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--durability", choices=list(Durability), default="strict")
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--broken", choices=sorted(BROKEN | BROKEN_FILES))
    parser.add_argument("--directory", type=Path, help="default: /dev/shm, or the temporary one")
    report = run(**vars(parser.parse_args(arguments)))
    print(json.dumps(asdict(report), indent=1))  # noqa: T201
    return 1 if report.bad else 0


if __name__ == "__main__":
    sys.exit(main())
