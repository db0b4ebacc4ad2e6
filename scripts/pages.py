"""What scripts that measure and write pages of docs/ share."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

Runs = dict[str, dict[str, dict[int, dict]]]


def recorded(record: pathlib.Path) -> Runs:
    """The runs of a file, {"runs": {GROUP: {MEMBER: [RUN, ..]}}}, by group, member and seed."""
    runs = json.loads(record.read_text())["runs"] if record.exists() else {}
    return {
        group: {member: {run["seed"]: run for run in found} for member, found in members.items()}
        for group, members in runs.items()
    }


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, with the standard deviation where there are several."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def between(page: pathlib.Path, mark: str, text: str) -> None:
    """Replaces what stands between `<!-- mark -->` and `<!-- /mark -->`."""
    head, _, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    _, end, tail = rest.partition(f"<!-- /{mark} -->\n")
    if not end:
        raise ValueError(f"{page} has no <!-- {mark} --> ... <!-- /{mark} -->")
    page.write_text(f"{head}<!-- {mark} -->\n{text}\n{end}{tail}")
