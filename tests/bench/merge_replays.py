"""Put several documents of `twfs replay --json` into one, with a plot: seeds run apart, say.

    python tests/bench/merge_replays.py OUT.json [--plot OUT.png] REPLAY.json...

Replays of the same stream, policy and capacity are taken once, marks and all.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from twfs_tools.replay.figures import summary
from twfs_tools.replay.plot import draw

LISTS = ("seeds", "windows_s", "capacities", "policies")


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of all runs; the settings are the first's, with all that was varied."""
    streams: dict[tuple[Any, ...], Any] = {}
    runs: dict[tuple[Any, ...], Any] = {}
    settings = dict(documents[0]["settings"])
    for document in documents:
        for name in LISTS:
            settings[name] = list(dict.fromkeys(settings[name] + document["settings"][name]))
        for stream in document["streams"]:
            streams[stream["window_s"], stream["seed"]] = stream
        for run in document["runs"]:
            key = (run["policy"], run["window_s"], run["seed"], run["capacity_blocks"])
            runs[key] = run
    settings["seeds"].sort()
    return documents[0] | {
        "settings": settings,
        "streams": list(streams.values()),
        "summary": summary(runs.values()),
        "runs": list(runs.values()),
    }


def main() -> None:
    """Merge what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("replays", type=Path, nargs="+")
    options = parser.parse_args()
    document = merged([json.loads(path.read_text()) for path in options.replays])
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot is not None:
        draw(options.plot, document)


if __name__ == "__main__":
    main()
