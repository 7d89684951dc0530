"""A scrubber in a process of its own, to be killed: `python -m support.scrubwork DIRECTORY`.

It goes on with the pass that was interrupted, or begins one; small batches, a commit after each.
"""

import sys
from pathlib import Path

from twfs.checking import scrubbing
from twfs.warehouse import Warehouse


def main(directory: str) -> None:
    """Run one pass to its end and print how many bad blocks it has found."""
    scrubbing.BATCH_BLOCKS, scrubbing.SAVE_SECONDS = 4, 0.0  # type: ignore[misc]
    with Warehouse.open(Path(directory)) as warehouse:
        warehouse.scrubber.start(1 << 40)
        thread = warehouse.scrubber._thread
        assert thread is not None
        thread.join()
        sys.stdout.write(f"{warehouse.scrubber.status()['bad_blocks']}\n")


if __name__ == "__main__":
    main(sys.argv[1])
