"""How time and temporary memory grow with the output's pixels, the ratio and the channels."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.workloads import Workload

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A size that one column of panels varies.

    Attributes:
      name: what it is.
      values: what it takes.
      common: what it stays at where another size varies.
      of: its value in a row.
      write: its value as text.
    """

    name: str
    values: tuple[int, ...]
    common: int
    of: Callable[[Row], int]
    write: str


_AXES = (
    _Axis(
        "output pixels",
        (64, 128, 256, 512),
        256,
        lambda row: row["size"][0] * row["scale"],
        "{0}x{0}",
    ),
    _Axis("ratio", (2, 4, 8, 16), 4, lambda row: row["scale"], "x{}"),
    _Axis("channels", (64, 128, 256, 512, 1024), 64, lambda row: row["channels"], "{} channels"),
)
_COSTS = {"ms": "milliseconds", "temporary_mb": "temporary memory, MB"}
_STYLES = {"forward": "-", "forward+backward": "--"}


def sweep() -> dict[str, Workload]:
    """Workloads along each axis from one common point: square, guide 32."""
    workloads = {}
    for varied in _AXES:
        for value in varied.values:
            side, ratio, channels = (value if a is varied else a.common for a in _AXES)
            workload = Workload(channels, (side // ratio, side // ratio), ratio, 32)
            workloads[f"{channels}ch_{side}_x{ratio}"] = workload
    return workloads


def draw(rows: Iterable[Row], path: str | os.PathLike) -> None:
    """Draws the rows of `sweep`, log-log; dotted lines grow linearly with pixels or channels.

    Args:
      rows: as `measure.compare` gives them.
      path: of the PNG.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "ms" in row]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["upsampler"] for r in rows))}
    figure, panels = plt.subplots(2, 3, figsize=(11, 7), sharex="col", sharey="row")
    for (cost, label), line in zip(_COSTS.items(), panels, strict=True):
        line[0].set_ylabel(label)
        for axis, panel in zip(_AXES, line, strict=True):
            others = [a for a in _AXES if a is not axis]
            shown = [r for r in rows if all(a.of(r) == a.common for a in others)]
            shown.sort(key=axis.of)
            for (name, colour), (direction, style) in itertools.product(
                colours.items(), _STYLES.items()
            ):
                mine = [r for r in shown if (r["upsampler"], r["direction"]) == (name, direction)]
                x, y = [axis.of(r) for r in mine], [r[cost] for r in mine]
                panel.plot(x, y, style, marker=".", color=colour)
            if axis.name != "ratio":
                power = 2 if axis.name == "output pixels" else 1
                low = min((r[cost] for r in shown), default=1.0)
                growth = [low * (n / axis.values[0]) ** power for n in axis.values]
                panel.plot(axis.values, growth, ":", color="grey", zorder=0)
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(axis.values, [axis.write.format(n).split()[0] for n in axis.values])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if cost == "ms":
                panel.set_title(", ".join(a.write.format(a.common) for a in others), fontsize=9)
            else:
                panel.set_xlabel(axis.name)
    handles = {name: panels[0, 0].plot([], color=c)[0] for name, c in colours.items()}
    panels[0, 0].legend(handles.values(), handles.keys(), fontsize=8)
    figure.suptitle("forward (solid), forward+backward (dashed); dotted: linear growth")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
