"""Results of probes: a JSON file that collects them, and tables."""

import json
import os
from collections.abc import Sequence
from typing import Any

from resfu_jax._checks import need
from resfu_jax._files import local_path, write_whole

PathLike = str | os.PathLike[str]


def record(path: PathLike, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds a probe to a file of results, `{"probes": [...]}`, and returns all that it holds.

    An entry of the same upsampler, dataset, settings and facts is replaced.

    Args:
      path: a JSON file; it need not exist.
      entry: of `probe`.

    Raises:
      ValueError: the file holds something else.
    """
    file = local_path(path, "path")
    probes = read_results(file) if file.exists() else []
    changing = ("protocols", "seconds", "versions")

    def key(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entry.items() if name not in changing}

    probes = [other for other in probes if key(other) != key(entry)] + [entry]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"probes": probes}, indent=1) + "\n")
    return probes


def read_results(path: PathLike) -> list[dict[str, Any]]:
    """The entries of a file that `record` wrote.

    Raises:
      ValueError: the file holds something else.
    """
    file = local_path(path, "path")
    try:
        probes = json.loads(file.read_text())["probes"]
        fits = all("protocols" in entry and "upsampler" in entry for entry in probes)
    except (ValueError, KeyError, TypeError):
        fits = False
    need(fits, f"{file} does not hold results of a probe; give another file")
    return probes


def markdown(probes: Sequence[dict[str, Any]], classes: Sequence[str] = ()) -> str:
    """A table of results: a row for every upsampler and protocol, in the order of `probes`.

    Those of depth have a table of their own, with other columns.

    Args:
      probes: entries of `probe`.
      classes: names of classes whose IoU is shown, too.

    Raises:
      ValueError: a class that no entry has.
    """
    names = _OF_CLASSES | {}
    for name in classes:
        has = any(f"iou/{name}" in p["mean"] for e in probes for p in e["protocols"].values())
        need(has, f"classes must be names of classes that were scored, got {name!r}")
        names[f"iou/{name}"] = name
    depths = [e for e in probes if any("abs_rel" in p["mean"] for p in e["protocols"].values())]
    others = [e for e in probes if e not in depths]
    kinds = [(others, names)] * bool(others or not depths) + [(depths, _OF_DEPTHS)] * bool(depths)
    return "\n".join(_table(entries, columns) for entries, columns in kinds)


_OF_CLASSES = {"miou": "mIoU", "boundary_iou": "boundary IoU", "pixel_accuracy": "accuracy"}
_OF_DEPTHS = {"delta1": "delta1", "abs_rel": "AbsRel", "rmse": "RMSE", "log10": "log10"}


def _table(probes: Sequence[dict[str, Any]], names: dict[str, str]) -> str:
    lines = [
        f"| upsampler | dataset | protocol | {' | '.join(names.values())} | seeds |",
        "|---" * (len(names) + 4) + "|",
    ]
    for entry in probes:
        for method, result in entry["protocols"].items():
            cells = []
            for name in names:
                mean, std = (result.get(kind, {}).get(name) for kind in ("mean", "std"))
                text = "-" if mean is None else f"{mean:.3f}"
                cells.append(text if std is None else f"{text} ± {std:.3f}")
            start = f"| {entry['upsampler']} | {entry['dataset']} | {method} "
            lines.append(f"{start}| {' | '.join(cells)} | {len(result['runs'])} |")
    return "\n".join(lines) + "\n"
