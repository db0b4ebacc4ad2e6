"""Every upsampler behind a frozen ViT-Ti/16 on CamVid: trains what is missing, writes the results.

    python -m resfu_jax.data prepare camvid && python -m resfu_jax.data prepare camvid/clean
    python -m scripts.camvid_results --workdir runs/camvid_vit

Each run is `train.py --config configs/camvid_vit_frozen.py:NAME`, or camvid_vit_augmented.py in one
of the experiments; complete ones in the workdir are not repeated, a killed one continues.
`--missing` trains only what docs/results.json does not have yet, `--report` nothing; tables are of
what is recorded there and in the workdir. The backbone is fetched from Hugging Face (`pip install
-e ".[hub]"`); `--pretrained FILE` takes a file. Written are docs/results.json, the tables in
docs/results.md and README.md, docs/results_curves.png and docs/results_predictions.png.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
from flax import nnx

from configs import camvid_vit_frozen
from resfu_jax import training
from resfu_jax.heads import create_head
from resfu_jax.training import read_metrics
from resfu_jax.visualize import compare_predictions
from scripts.pages import DOCS, ROOT, between, recorded, spread

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEMBERS = ("nearest", "bilinear", "carafe", "dysample", "sapa", "fade", "lda_aqu", "resfu")
RARE = ("Pole", "SignSymbol", "Fence")
SHOWN = ("bilinear", "carafe", "fade", "resfu")  # in the picture
RECORD = DOCS / "results.json"


class Experiment(NamedTuple):
    """Members trained alike.

    Attributes:
      title: of its tables.
      config: file in configs/.
      data: name of the dataset.
      members: upsamplers.
      seeds: runs of each.
    """

    title: str
    config: str
    data: str
    members: tuple[str, ...]
    seeds: int


EXPERIMENTS = {
    "camvid": Experiment("`camvid`", "camvid_vit_frozen", "camvid", MEMBERS, 3),
    "camvid/clean": Experiment("`camvid/clean`", "camvid_vit_frozen", "camvid/clean", MEMBERS, 3),
    "camvid/augmented": Experiment(
        "`camvid` at twice the size, augmented",
        "camvid_vit_augmented",
        "camvid",
        ("bilinear", "resfu"),
        1,
    ),
    "camvid/no_gate": Experiment(
        "`camvid`, FADE without its gate", "camvid_vit_frozen", "camvid", ("semishift",), 1
    ),
}


def directory(root: pathlib.Path, experiment: str, member: str, seed: int) -> pathlib.Path:
    """Where a run is."""
    return root / experiment.replace("/", "_") / f"{member}_{seed}"


def load(root: pathlib.Path, experiment: str, member: str, seed: int) -> dict | None:
    """What a finished run left; None if it is not finished."""
    path = directory(root, experiment, member, seed)
    history = read_metrics(path / "metrics.jsonl")
    evaluations = [line for line in history if "val/miou" in line]
    if not evaluations:
        return None
    steps = json.loads((path / "config.json").read_text())["steps"]
    if evaluations[-1]["step"] < steps:
        return None
    losses = [(line["step"], round(line["loss"], 4)) for line in history if "loss" in line]
    return dict(seed=seed, steps=steps, losses=losses, **evaluations[-1])


def measure(member: str, repeats: int = 10) -> dict[str, float]:
    """Parameters and milliseconds of the head for one image: features in, logits out."""
    config = camvid_vit_frozen.get_config(member)
    options = training.model_arguments(config.model)["head"]
    head = create_head(**options, in_features=(192,), num_classes=11, rngs=nnx.Rngs(0))
    run = jax.jit(lambda head, x, images: head((x,), images))
    height, width = config.data.crop_size
    x = jax.random.normal(jax.random.key(0), (1, height // 16, width // 16, 192))
    images = jax.random.normal(jax.random.key(1), (1, height, width, 3))
    arguments = nnx.view(head, deterministic=True, raise_if_not_found=False), x, images
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(head, nnx.Param)))
    return {"parameters": parameters, "milliseconds": 1e3 * statistics.median(times)}


def table(results: dict[str, list[dict]], costs: dict[str, dict], baseline: str) -> str:
    """Markdown: a row for every member, best mIoU last."""
    columns = ["mIoU", "boundary IoU", "accuracy", *RARE, "seeds", "parameters", "ms"]
    rows = [f"| upsampler | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    keys = ["miou", "boundary_iou", "pixel_accuracy", *(f"iou/{name}" for name in RARE)]
    order = sorted(results, key=lambda m: np.mean([r["val/miou"] for r in results[m]]))
    for member in order:
        runs = results[member]
        cells = [spread([r[f"val/{key}"] for r in runs]) for key in keys]
        cost = costs[member]
        cells += [str(len(runs)), f"{cost['parameters']:,}", f"{cost['milliseconds']:.0f}"]
        name = f"**{member}**" if member == baseline else member
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def classes(results: dict[str, list[dict]]) -> str:
    """Markdown: IoU of every class, a row each."""
    any_run = next(iter(results.values()))[0]
    names = [key.removeprefix("val/iou/") for key in any_run if key.startswith("val/iou/")]
    rows = [f"| IoU | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    for name in names:
        cells = [
            f"{np.mean([r[f'val/iou/{name}'] for r in runs]):.3f}" for runs in results.values()
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def curves(results: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Training loss over the steps (one seed), mIoU and boundary IoU of every run at the end.

    Of the oldest records only the end is known.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    colours = dict(zip(MEMBERS, plt.colormaps["tab10"].colors, strict=False))
    for i, (member, runs) in enumerate(results.items()):
        losses = [run["losses"] for run in runs if "losses" in run]
        if losses:
            axes[0].plot(*zip(*losses[-1], strict=True), color=colours[member], label=member)
        for key, marker in (("val/miou", "o"), ("val/boundary_iou", "s")):
            values = [run[key] for run in runs]
            style = dict(color=colours[member], marker=marker, linestyle="none", alpha=0.7)
            axes[1].plot([i] * len(values), values, **style)
    axes[0].set(title="training loss", xlabel="step", yscale="log")
    axes[0].legend(fontsize=8)
    axes[1].set(title="validation: mIoU (circles), boundary IoU (squares)")
    axes[1].set_xticks(range(len(results)), list(results), rotation=30)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def pictures(root: pathlib.Path, path: pathlib.Path, rows: int = 3) -> None:
    """Image | label | prediction of some members, for the first validation images.

    The pictures are in the workdirs: without a run of each member there, the file stays as it is.
    """
    runs = {m: sorted(root.glob(f"camvid/{m}_*/predictions/step*_0.png")) for m in SHOWN}
    if not all(runs.values()):
        print(f"{path.name} stays: it needs a run of {', '.join(SHOWN)} in {root}")
        return

    files = {
        m: [f.with_name(f.name.replace("_0.png", f"_{i}.png")) for i in range(rows)]
        for m, (*_, f) in runs.items()
    }
    compare_predictions(path, files, width=1.8)


def report(root: pathlib.Path) -> None:
    """Writes record, tables, curves and pictures."""
    record = recorded(RECORD)
    found = {}
    for name, experiment in EXPERIMENTS.items():
        for member in experiment.members:
            runs = record.get(name, {}).get(member, {})
            seeds = range(experiment.seeds)
            runs |= {s: run for s in seeds if (run := load(root, name, member, s))}
            if runs:
                found.setdefault(name, {})[member] = [runs[seed] for seed in sorted(runs)]
    members = dict.fromkeys(member for runs in found.values() for member in runs)
    costs = {member: measure(member) for member in members}
    RECORD.write_text(
        json.dumps({"runs": found, "heads": costs, "jax": jax.__version__}, indent=1) + "\n"
    )
    text = []
    for name, results in found.items():
        title = EXPERIMENTS[name].title
        text += [f"## {title}", table(results, costs, "resfu"), classes(results)]
    main = found["camvid"]
    curves(main, DOCS / "results_curves.png")
    pictures(root, DOCS / "results_predictions.png")
    for name in ("curves", "predictions"):
        text.append(f"![{name}](results_{name}.png)")
    between(DOCS / "results.md", "tables", "\n\n".join(text))
    between(ROOT / "README.md", "results", table(main, costs, "resfu"))


def main() -> None:
    """Trains what is missing, then writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/camvid_vit"))
    parser.add_argument("--pretrained", help="file of the backbone's weights")
    members = sorted({member for e in EXPERIMENTS.values() for member in e.members})
    parser.add_argument("--members", nargs="+", default=members, choices=members)
    parser.add_argument("--experiments", nargs="+", default=EXPERIMENTS, choices=EXPERIMENTS)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--missing", action="store_true", help="not what is recorded already")
    args, overrides = parser.parse_known_args()
    record = recorded(RECORD) if args.missing else {}
    for seed in range(0 if args.report else max(e.seeds for e in EXPERIMENTS.values())):
        for name in args.experiments:
            experiment = EXPERIMENTS[name]
            for member in experiment.members if seed < experiment.seeds else ():
                if member not in args.members or seed in record.get(name, {}).get(member, {}):
                    continue
                if load(args.workdir, name, member, seed):
                    continue
                workdir = directory(args.workdir, name, member, seed)
                command = [
                    *(sys.executable, ROOT / "train.py", "--workdir", workdir),
                    f"--config={ROOT}/configs/{experiment.config}.py:{member}",
                    *(f"--config.seed={seed}", f"--config.data.name={experiment.data}"),
                    *overrides,
                ]
                if args.pretrained:
                    command.append(f"--config.model.backbone.pretrained={args.pretrained}")
                subprocess.run(command, check=True)
    report(args.workdir)


if __name__ == "__main__":
    main()
