"""Makes the tables and pictures of docs/ from finished runs.

    python -m scripts.report shapes runs/shapes_*  # workdirs of shapes_{bilinear,resfu}, all seeds
    python -m scripts.report camvid runs/camvid_*  # workdirs of camvid_segformer_b0_*

Writes docs/<name>.md, docs/<name>_curves.png and docs/<name>_predictions.png.
"""

import argparse
import json
import pathlib

import matplotlib
import numpy as np

from resfu_jax.training import read_metrics
from resfu_jax.visualize import compare_predictions
from scripts.pages import DOCS, spread

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"bilinear": "tab:gray", "resfu": "tab:red"}


def load(workdir: pathlib.Path) -> dict:
    """Configuration, last evaluation and history of a run."""
    config = json.loads((workdir / "config.json").read_text())
    history = read_metrics(workdir / "metrics.jsonl")
    evaluations = [line for line in history if "val/miou" in line]
    return dict(
        workdir=workdir,
        upsampler=config["model"]["head"]["upsampler"],
        seed=config["seed"],
        steps=config["steps"],
        losses=[(line["step"], line["loss"]) for line in history if "loss" in line],
        evaluations=evaluations,
        last=evaluations[-1],
        minutes=sum(line.get("seconds", 0) for line in history) / 60,
    )


def table(groups: dict[str, list[dict]]) -> str:
    """Markdown: a row for every metric, a column for every upsampler."""
    keys = [k for k in next(iter(groups.values()))[0]["last"] if k.startswith("val/")]
    rows = [f"| | {' | '.join(groups)} |", "|---|" + "---|" * len(groups)]
    names = {"val/miou": "mIoU", "val/boundary_iou": "boundary IoU"}
    names["val/pixel_accuracy"] = "pixel accuracy"
    for key in keys:
        name = names.get(key, key.removeprefix("val/").replace("_", " ").replace("/", ": "))
        name = name.replace("iou", "IoU")
        cells = [spread([r["last"].get(key, 0.0) for r in runs]) for runs in groups.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    minutes = [f"{np.mean([r['minutes'] for r in runs]):.1f}" for runs in groups.values()]
    rows.append(f"| training minutes (shared machine) | {' | '.join(minutes)} |")
    return "\n".join(rows)


def curves(groups: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Training loss and validation metrics over the steps."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    titles = ("training loss", "validation mIoU", "validation boundary IoU")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    for upsampler, runs in groups.items():
        for i, r in enumerate(runs):
            style = dict(color=COLOURS[upsampler], label=None if i else upsampler, alpha=0.8)
            axes[0].plot(*zip(*r["losses"], strict=True), **style)
            steps = [e["step"] for e in r["evaluations"]]
            for axis, key in zip(axes[1:], ("val/miou", "val/boundary_iou"), strict=True):
                axis.plot(steps, [e[key] for e in r["evaluations"]], marker="o", **style)
    axes[0].set_yscale("log")
    axes[2].legend()
    figure.savefig(path, dpi=110)


TEXT = {
    "shapes": """\
`configs/shapes_resfu.py` and `configs/shapes_bilinear.py`: 600 steps on the embedded dataset (8
classes; filled, thin and touching mottled shapes), a MiT of four single blocks from scratch, head
width 64. 560,094 and 456,552 parameters; everything but the upsampler is equal. The dilation of
boundary IoU is 2 % of the diagonal. Other heads on the same backbone, with FADE and one seed:
UPerNet (`configs/shapes_upernet.py`) 0.589 mIoU and 0.482 boundary IoU, SegFormer stage by stage
with its linear projections (`configs/shapes_stagewise.py`) 0.538 and 0.428. Both, and
`configs/shapes_direct.py`, take any upsampler after a colon.""",
    "camvid": """\
`configs/camvid_segformer_b0_resfu.py` and `configs/camvid_segformer_b0_bilinear.py`: SegFormer-B0
from scratch at half resolution (240x180), 600 steps of 4 images, 3,569,761 and 3,453,163
parameters. The runs are far too short for good absolute numbers; they show the two heads on real
images with the same budget.""",
}


def main() -> None:
    """Reads the runs, writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["shapes", "camvid"])
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    groups: dict[str, list[dict]] = {}
    for run in sorted(map(load, args.workdirs), key=lambda r: (r["upsampler"], r["seed"])):
        groups.setdefault(run["upsampler"], []).append(run)
    DOCS.mkdir(exist_ok=True)
    curves(groups, DOCS / f"{args.name}_curves.png")
    shapes = args.name == "shapes"
    compare_predictions(
        DOCS / f"{args.name}_predictions.png",
        {
            upsampler: [
                runs[0]["workdir"] / "predictions" / f"step{runs[0]['steps']:07d}_{i}.png"
                for i in range(4 if shapes else 3)
            ]
            for upsampler, runs in groups.items()
        },
        width=2.4 if shapes else 4.4,
    )
    seeds = len(next(iter(groups.values())))
    (DOCS / f"{args.name}.md").write_text(
        f"# `{args.name}`: last evaluation, {seeds} seed{'s' * (seeds > 1)}\n\n"
        f"{TEXT[args.name]}\n\n{table(groups)}\n\n"
        f"![curves]({args.name}_curves.png)\n\n![predictions]({args.name}_predictions.png)\n"
    )


if __name__ == "__main__":
    main()
