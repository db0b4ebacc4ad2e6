"""How time and temporary memory grow with the output's pixels, the ratio and the channels."""

import os
from collections.abc import Iterable
from typing import Any

from benchmarks.workloads import Workload

_CHANNELS, _RATIO, _OUTPUT = 64, 4, 256
# Along what, its value in a row, and the value that the other panels hold it at.
_PANELS = (
    ("output pixels", lambda row: (row["size"][0] * row["scale"]) ** 2, _OUTPUT**2),
    ("ratio", lambda row: row["scale"], _RATIO),
    ("channels", lambda row: row["channels"], _CHANNELS),
)
_COSTS = (("ms", "milliseconds"), ("temporary_mb", "temporary memory, MB"))
_STYLES = {"forward": "-", "forward+backward": "--"}


def sweep() -> dict[str, Workload]:
    """Workloads along three axes from one common point: square, guide 32."""

    def one(channels=_CHANNELS, output=_OUTPUT, ratio=_RATIO):
        side = output // ratio
        return f"{channels}ch_{side}_x{ratio}", Workload(channels, (side, side), ratio, 32)

    return dict(
        [one(output=n) for n in (64, 128, 256, 512)]
        + [one(ratio=n) for n in (2, 4, 8, 16)]
        + [one(channels=n) for n in (64, 128, 256, 512, 1024)]
    )


def draw(rows: Iterable[dict[str, Any]], path: str | os.PathLike) -> None:
    """Draws the rows of `sweep`, log-log; grey lines grow linearly.

    Args:
      rows: as `measure.compare` gives them.
      path: of the PNG.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "ms" in row]
    names = list(dict.fromkeys(row["upsampler"] for row in rows))
    figure, axes = plt.subplots(2, 3, figsize=(11, 7), sharex="col", sharey="row")
    for (cost, label), line in zip(_COSTS, axes, strict=True):
        for (along, value, _), ax in zip(_PANELS, line, strict=True):
            others = [(at, common) for other, at, common in _PANELS if other != along]
            shown = [row for row in rows if all(at(row) == common for at, common in others)]
            for i, name in enumerate(names):
                for direction, style in _STYLES.items():
                    points = sorted(
                        (value(row), row[cost])
                        for row in shown
                        if (row["upsampler"], row["direction"]) == (name, direction)
                    )
                    ax.plot(
                        [x for x, _ in points],
                        [y for _, y in points],
                        style,
                        marker=".",
                        color=f"C{i}",
                        label=name if style == "-" else None,
                    )
            ticks = sorted({value(row) for row in shown})
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xticks(ticks, [f"{n}" for n in ticks], rotation=30)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            if along != "ratio" and ticks:  # what is linear rises as steeply as this
                low = min(row[cost] for row in shown) or 1.0
                ax.plot(ticks, [low * n / ticks[0] for n in ticks], ":", color="grey", zorder=0)
            if cost == _COSTS[-1][0]:
                ax.set_xlabel(along)
        line[0].set_ylabel(label)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("forward (solid), forward + backward (dashed); dotted: linear growth")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
