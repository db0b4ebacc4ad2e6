"""Every upsampler on embedded depth and matting data: trains what is missing, writes the results.

    python -m scripts.task_results --workdir runs/tasks
    python -m scripts.task_results --workdir runs/tasks --tasks depth --members bilinear resfu

Each run is `train.py` with configs/shapes_depth.py or configs/matting.py:soft_shapes and
`--config.model.head.upsampler=NAME`; nothing else differs but the seed.
Runs that are in docs/task_results.json or complete in the workdir are not repeated, a killed one
continues. `--report` trains nothing. Written are docs/task_results.json, the tables in
docs/depth.md and docs/matting.md, and docs/depth.png and docs/matting.png.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from PIL import Image

from resfu_jax import tasks, training
from resfu_jax.training import read_metrics
from resfu_jax.visualize import save_grid
from scripts.pages import DOCS, ROOT, between, recorded, spread

RECORD = DOCS / "task_results.json"
MEMBERS = (
    *("nearest", "bilinear", "bicubic", "deconv", "pixel_shuffle"),
    *("carafe", "dysample", "lda_aqu", "sapa", "fade", "fade_lite", "semishift", "resfu"),
    *("freqfusion", "jbu", "naf", "jafar", "anyup", "raysup", "featup", "loftup", "uplift"),
)
SHOWN = ("nearest", "bilinear", "carafe", "fade", "resfu")  # in the pictures
SEEDS = 3


class Experiment(NamedTuple):
    """Members trained alike.

    Attributes:
      config: as train.py is told it.
      metrics: of a row: name in metrics.jsonl under val/, title, digits behind the point.
      panels: numbers of the pictures of truth and prediction beside each other in a file.
      gap: pixels between them.
    """

    config: str
    metrics: tuple[tuple[str, str, int], ...]
    panels: tuple[int, int]
    gap: int


EXPERIMENTS = {
    "depth": Experiment(
        "configs/shapes_depth.py",
        (("abs_rel", "AbsRel", 4), ("rmse", "RMSE", 3), ("silog", "SILog", 2))
        + (("delta1", "delta1", 3),),
        panels=(1, 2),
        gap=4,
    ),
    "matting": Experiment(
        "configs/matting.py:soft_shapes",
        (("sad", "SAD", 4), ("mse", "MSE", 4), ("grad", "Grad", 4), ("conn", "Conn", 4)),
        panels=(2, 3),
        gap=0,
    ),
}


def load(workdir: pathlib.Path, seed: int) -> dict | None:
    """What a finished run left; None if it is not finished."""
    history = read_metrics(workdir / "metrics.jsonl")
    evaluations = [line for line in history if any(key.startswith("val/") for key in line)]
    if not evaluations:
        return None
    steps = json.loads((workdir / "config.json").read_text())["steps"]
    return dict(seed=seed, **evaluations[-1]) if evaluations[-1]["step"] == steps else None


def parameters(task: str, member: str) -> int:
    """Number of parameters of the member's model."""
    config = training.load_config(str(ROOT / EXPERIMENTS[task].config))
    config.model.head.upsampler = member
    model = nnx.eval_shape(lambda: tasks.create_task(config).create_model(nnx.Rngs(0)))
    return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def table(task: str, results: dict[str, list[dict]]) -> str:
    """Markdown: a row for every member, best first."""
    first, *_ = metrics = EXPERIMENTS[task].metrics
    columns = [title for _, title, _ in metrics] + ["seeds", "parameters"]
    rows = [f"| upsampler | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    means = {m: np.mean([run[f"val/{first[0]}"] for run in runs]) for m, runs in results.items()}
    for member in sorted(means, key=means.__getitem__):
        runs, cells = results[member], []
        for key, _, digits in metrics:
            cells.append(spread([run[f"val/{key}"] for run in runs], digits))
        cells += [str(len(runs)), f"{parameters(task, member):,}"]
        rows.append(f"| `{member}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def picture(task: str, root: pathlib.Path, path: pathlib.Path, rows: int = 3) -> None:
    """Image | truth | prediction of some members, for the first validation images, of seed 0.

    The pictures are in the workdirs: without a run of each member there, the file stays as it is.
    """
    experiment = EXPERIMENTS[task]
    found = {m: sorted((root / task / f"{m}_0" / "predictions").glob("step*.png")) for m in SHOWN}
    if not all(found.values()):
        print(f"{path.name} stays: it needs a run of {', '.join(SHOWN)} in {root / task}")
        return
    panels = []
    for row in range(rows):
        for member in SHOWN:
            file = [f for f in found[member] if f.stem.endswith(f"_{row}")][-1]
            with Image.open(file) as opened:
                pixels = np.asarray(opened.convert("RGB"))
            side = (pixels.shape[1] - 3 * experiment.gap) // 4
            image, truth, prediction = (
                pixels[:side, i * (side + experiment.gap) :][:, :side]
                for i in (0, *experiment.panels)
            )
            shown = [("image", image), ("truth", truth)] if member == SHOWN[0] else []
            for title, panel in (*shown, (member, prediction)):
                panels.append(("" if row else title, panel))
    save_grid(path, panels, columns=2 + len(SHOWN), width=1.2)


def report(root: pathlib.Path) -> None:
    """Writes record, tables and pictures."""
    record, found = recorded(RECORD), {}
    for task in EXPERIMENTS:
        for member in MEMBERS:
            runs = record.get(task, {}).get(member, {})
            for seed in range(SEEDS):
                if run := load(root / task / f"{member}_{seed}", seed):
                    runs[seed] = run
            if runs:
                found.setdefault(task, {})[member] = [runs[seed] for seed in sorted(runs)]
    RECORD.write_text(json.dumps({"runs": found, "jax": jax.__version__}, indent=1) + "\n")
    for task, results in found.items():
        between(DOCS / f"{task}.md", "results", table(task, results))
        picture(task, root, DOCS / f"{task}.png")


def main() -> None:
    """Trains what is missing, then writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/tasks"))
    parser.add_argument("--members", nargs="+", default=MEMBERS, choices=MEMBERS)
    parser.add_argument("--tasks", nargs="+", default=tuple(EXPERIMENTS), choices=EXPERIMENTS)
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    record = recorded(RECORD)
    for seed in range(0 if args.report else SEEDS):
        for member in args.members:
            for task in args.tasks:
                workdir = args.workdir / task / f"{member}_{seed}"
                if seed in record.get(task, {}).get(member, {}) or load(workdir, seed):
                    continue
                command = [
                    *(sys.executable, ROOT / "train.py", "--workdir", workdir),
                    f"--config={ROOT / EXPERIMENTS[task].config}",
                    *(f"--config.model.head.upsampler={member}", f"--config.seed={seed}"),
                ]
                subprocess.run(command, check=True)
    report(args.workdir)


if __name__ == "__main__":
    main()
