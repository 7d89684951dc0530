"""The hit-rate curve of `twfs advise` as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from twfs_tools.output import size

WIDTH, HEIGHT = 8.0, 4.8  # inches
TENANTS_MAX: Final = 6  # lines that can be told apart


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """Write the PNG *path* from what `twfs advise --json` prints; its folder is made."""
    import matplotlib as mpl  # noqa: PLC0415 - seconds, where it is wanted only

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend was chosen

    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    curve = document["curve"]
    sizes = [each["bytes"] for each in curve]
    axes.plot(sizes, [100 * each["hit_rate"] for each in curve], marker="o", label="all")
    tenants = [each for each in document["tenants"] if each["curve"]]
    tenants.sort(key=lambda each: -each["asked_tokens"])
    if len(tenants) > 1:
        for tenant in tenants[:TENANTS_MAX]:
            rates = [100 * each["hit_rate"] for each in tenant["curve"]]
            axes.plot(sizes, rates, linewidth=1, label=tenant["name"] or "everybody")
    ceiling = 100 * document["ceiling"]
    axes.axhline(ceiling, color="black", linestyle=":", linewidth=1)
    axes.annotate(
        f"asked for before: {ceiling:.1f} %", (0.01, ceiling),
        xycoords=("axes fraction", "data"), xytext=(2, 3), textcoords="offset points", fontsize=8,
    )  # fmt: skip
    if document["total_bytes"]:
        axes.axvline(document["total_bytes"], color="grey", linestyle="--", linewidth=1)
        axes.plot(
            [document["total_bytes"]], [100 * document["hit_rate"]], marker="*", markersize=12,
            linestyle="", color="black", label="as it was",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(sizes, [size(each) for each in sizes], fontsize=8, rotation=30)
    axes.minorticks_off()
    axes.set_ylim(0, 104)
    axes.set_xlabel("space")
    axes.set_ylabel("tokens held (%)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
