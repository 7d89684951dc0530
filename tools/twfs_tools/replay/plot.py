"""Hit rate against capacity, as a picture: the replayed policies between LRU and the optimum."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from twfs_tools.output import size

WIDTH, HEIGHT = 9.5, 7.2  # inches
COLOURS: Final = ("#1b6ca8", "#c2410c", "#15803d", "#7e22ce", "#b45309")
MARK_STYLES: Final = {
    "optimum": {"color": "#444444", "linestyle": "--", "marker": "v", "markersize": 4},
    "exact lru": {"color": "#8a8a8a", "linestyle": "-", "marker": "s", "markersize": 4},
}


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """Write the PNG *path* from what `twfs replay --json` prints; its folder is made."""
    import matplotlib as mpl  # noqa: PLC0415 - seconds, at the end only

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend was chosen

    rows = document["summary"]
    windows = sorted({row["window_s"] for row in rows})
    figure, panels = plt.subplots(
        2, len(windows), figsize=(max(WIDTH, 5.8 * len(windows)), HEIGHT), layout="constrained",
        sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2),
    )  # fmt: skip
    most = max(row["amplification_max"] for row in rows)
    for column, window_s in enumerate(windows):
        mine = [row for row in rows if row["window_s"] == window_s]
        stream = next(each for each in document["streams"] if each["window_s"] == window_s)
        _hit_rates(panels[0][column], mine, stream, first=column == 0)
        _amplification(panels[1][column], mine, most, first=column == 0)
        if len(windows) > 1:
            panels[0][column].set_title(f"sessions start over {_hours(window_s)}", fontsize=10)
    panels[0][0].legend(loc="lower right", fontsize=9)
    figure.supxlabel(
        "capacity: part of all blocks ever asked for, and as modelled bytes", fontsize=10
    )
    figure.suptitle(_title(document), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _title(document: Mapping[str, Any]) -> str:
    """What was replayed, in two lines."""
    stream, settings = document["streams"][0], document["settings"]
    return (
        f"{', '.join(settings['names'])}: {stream['requests']:,} requests of "
        f"{stream['sessions']:,} sessions, {settings['block_tokens']} tokens a block\n"
        f"{stream['unique_blocks']:,} unique blocks ({size(stream['unique_bytes'])} at "
        f"{settings['token_bytes']:,} bytes a token); {len(settings['seeds'])} start seeds, "
        "shaded from the least to the most"
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:g} h" if seconds >= 3600 else f"{seconds / 60:g} min"


def _curves(rows: Sequence[Mapping[str, Any]]) -> "list[tuple[str, dict[str, Any], list[Any]]]":
    """Every policy with its style and its rows by capacity; marks first, so that they lie below."""
    names = list(dict.fromkeys(row["policy"] for row in rows))
    names.sort(key=lambda name: name not in MARK_STYLES)
    found = []
    colours = iter(COLOURS * 8)
    for name in names:
        style = MARK_STYLES.get(name) or {"color": next(colours), "marker": "o", "linewidth": 2}
        mine = sorted(
            (row for row in rows if row["policy"] == name), key=lambda row: row["capacity_part"]
        )
        found.append((name, dict(style), mine))
    return found


def _line(axes: Any, name: str, style: dict[str, Any], rows: Sequence[Any], key: str) -> None:
    """One policy's mean, and its range over the seeds."""
    x = [100 * row["capacity_part"] for row in rows]
    scale = 100 if key == "hit_rate" else 1
    axes.plot(x, [scale * row[key] for row in rows], label=name, **style)
    if any(row[f"{key}_sd"] for row in rows):
        axes.fill_between(
            x, [scale * row[f"{key}_min"] for row in rows],
            [scale * row[f"{key}_max"] for row in rows], color=style["color"], alpha=0.15, lw=0,
        )  # fmt: skip


def _hit_rates(axes: Any, rows: Sequence[Any], stream: Mapping[str, Any], *, first: bool) -> None:
    """The upper panel."""
    ceiling = 100 * stream["ceiling"]
    axes.axhline(ceiling, color="black", linestyle=":", linewidth=1)
    axes.annotate(
        f"an infinite store: {ceiling:.1f} %", (0.01, ceiling), xycoords=("axes fraction", "data"),
        xytext=(2, 3), textcoords="offset points", fontsize=8,
    )  # fmt: skip
    for name, style, mine in _curves(rows):
        _line(axes, name, style, mine, "hit_rate")
    axes.set_xscale("log")
    axes.set_ylim(0, min(104, ceiling * 1.1))
    axes.grid(visible=True, alpha=0.3)
    if first:
        axes.set_ylabel("token hit rate (%)")


def _amplification(axes: Any, rows: Sequence[Any], most: float, *, first: bool) -> None:
    """The lower panel; *most* of all of them, for they share their axis."""
    for name, style, mine in _curves(rows):
        _line(axes, name, style, mine, "amplification")
    parts = sorted({row["capacity_part"] for row in rows})
    bytes_of = {row["capacity_part"]: row["capacity_bytes"] for row in rows}
    axes.set_yscale("log")
    axes.set_xticks(
        [100 * part for part in parts],
        [f"{100 * part:.3g} %\n{size(bytes_of[part])}" for part in parts], fontsize=7.5,
    )  # fmt: skip
    axes.minorticks_off()
    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50) if tick <= most * 1.2]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(visible=True, alpha=0.3)
    if first:
        axes.set_ylabel("tokens computed again\nto those that had to be")
