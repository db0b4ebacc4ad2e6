"""What docs/mirl.md shows of deep ViTs: time to compile, what their blocks know, what they are for.

    python -m scripts.mirl_analysis compile
    python -m scripts.mirl_analysis depth MIRL=runs/mirl_camvid MAE=runs/mae_camvid random= \\
        --data-dir DIR --out depth.json
    python -m scripts.mirl_analysis figure depth.json docs/mirl.png \\
        MIRL=runs/deep_mirl_0,runs/deep_mirl_1,runs/deep_mirl_2 MAE=... random=...

`compile` takes the processor time of XLA for the gradient of a ViT of 384 channels, with the
outputs of six segments. `depth` fits a ridge regression from the tokens of every fourth block to
the class that most pixels of a patch have, on CamVid's training images at half their size, and
measures the mIoU of patches on the validation images. `figure` draws both beside the mIoU of the
runs that start from the encoders, and prints their table.
"""

import argparse
import io
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from configs import mirl_camvid
from resfu_jax import data, training
from resfu_jax.backbones import ViT
from resfu_jax.data import transforms
from resfu_jax.model import evaluating, normalise
from resfu_jax.tasks import create_task

CLASSES, SIZE, PATCH = 11, (176, 240), 16
LAYERS = (3, 7, 11, 15, 19, 23)
RIDGE = 1e-2  # times the number of patches


def compile_times() -> None:
    """Prints seconds of processor time, of the blocks in a scan and one by one."""
    for depth, scan in ((12, True), (54, True), (12, False), (54, False)):
        layers = tuple(range(depth // 6 - 1, depth, depth // 6))
        vit = nnx.eval_shape(
            lambda d=depth, s=scan, n=layers: ViT(
                "s54", depth=d, scan=s, layers=n, rngs=nnx.Rngs(0)
            )
        )
        graphdef, state = nnx.split(evaluating(vit))
        params, rest = nnx.split_state(state, nnx.Param, ...)

        def energy(params, rest, images, graphdef=graphdef):
            return sum(y.sum() for y in nnx.merge(graphdef, params, rest)(images))

        images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
        start = time.process_time()
        lowered = jax.jit(jax.grad(energy)).lower(params, rest, images)
        traced = time.process_time()
        lowered.compile()
        done = time.process_time()
        lines = len(lowered.as_text().splitlines())
        print(
            f"{depth} blocks, {'scan' if scan else 'one by one':10}  "
            f"traced in {traced - start:5.1f} s, compiled in {done - traced:6.1f} s, {lines} lines",
            flush=True,
        )


def encoder_of(workdir: str) -> ViT:
    """The best encoder of a run; without one, its random beginning."""
    config = mirl_camvid.get_config()
    if workdir:
        config = training.read_config(pathlib.Path(workdir))
    task = create_task(config)
    model = task.create_model(nnx.Rngs(config.seed))
    if workdir:
        checkpoints = training.Checkpoints(pathlib.Path(workdir) / "checkpoints", read_only=True)
        arrays = checkpoints.read_weights(checkpoints.find("best"))
        checkpoints.close()
        state = [
            (path, variable.replace(jnp.asarray(arrays[".".join(map(str, path))])))
            for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        ]
        nnx.update(model, nnx.from_flat_state(state))
    return evaluating(model.backbone)


def patches_of(split: str, directory: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Images at half their size, and the class of most pixels of every patch, 255 if of none."""
    source = data.open_source("camvid", split, directory)
    images, classes = [], []
    for index in np.unique(np.linspace(0, len(source) - 1, most).astype(int)):
        example = source[int(index)]
        image, label = (
            transforms.middle(np.asarray(Image.open(io.BytesIO(example[name]))), SIZE, method)
            for name, method in (
                ("image", Image.Resampling.BILINEAR),
                ("label", Image.Resampling.NEAREST),
            )
        )
        h, w = SIZE[0] // PATCH, SIZE[1] // PATCH
        blocks = label.reshape(h, PATCH, w, PATCH).swapaxes(1, 2).reshape(h * w, -1)
        votes = np.stack([(blocks == k).sum(axis=1) for k in range(CLASSES)], axis=1)
        images.append(image)
        classes.append(np.where(votes.max(axis=1) > 0, votes.argmax(axis=1), 255))
    return np.stack(images), np.concatenate(classes)


def miou(prediction: np.ndarray, label: np.ndarray) -> float:
    """The mean over the classes that occur."""
    pairs = np.bincount(label * CLASSES + prediction, minlength=CLASSES**2)
    confusion = pairs.reshape(CLASSES, CLASSES)
    right, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return float((right / np.maximum(union, 1))[union > 0].mean())


def depth_curves(runs: dict[str, str], directory: str) -> dict[str, list[float]]:
    """The mIoU of patches after each of `LAYERS`, by the name of the run."""
    config = mirl_camvid.get_config()
    splits = (("train", directory, 367), ("validation", directory, 101))
    sets = [patches_of(*split) for split in splits]
    curves = {}
    for name, workdir in runs.items():
        vit = encoder_of(workdir)
        run = jax.jit(lambda x, vit=vit: vit.maps_and_class_tokens(x, LAYERS)[0])
        features = []
        for images, _ in sets:
            found = [
                run(normalise(jnp.asarray(batch), config.model.mean, config.model.std))
                for batch in np.array_split(images, -(-len(images) // 16))
            ]
            features.append(
                [
                    np.concatenate([np.asarray(maps[i], np.float64) for maps in found])
                    for i in range(len(LAYERS))
                ]
            )
        curves[name] = []
        for train, test in zip(*features, strict=True):
            (x, y), (u, v) = (
                (f.reshape(-1, f.shape[-1])[label < 255], label[label < 255])
                for f, (_, label) in zip((train, test), sets, strict=True)
            )
            mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
            x, u = ((f - mean) / deviation for f in (x, u))
            x, u = (np.concatenate([f, np.ones((len(f), 1))], axis=1) for f in (x, u))
            gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
            weights = np.linalg.solve(gram, x.T @ np.eye(CLASSES)[y])
            curves[name].append(miou((u @ weights).argmax(axis=1), v))
        print(name, " ".join(f"{value:.3f}" for value in curves[name]), flush=True)
    return curves


def figure(curves: dict[str, list[float]], path: str, runs: dict[str, list[str]]) -> None:
    """Writes the picture, and prints the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {}
    for name, workdirs in runs.items():
        found = [training.read_metrics(pathlib.Path(w) / "metrics.jsonl") for w in workdirs]
        results[name] = [
            [line["val/miou"] for line in lines if "val/miou" in line][-1] for lines in found
        ]
    print("| start | mIoU of each seed | mean |\n|---|---|---|")
    for name, values in results.items():
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"| {name} | {each} | {np.mean(values):.3f} |")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 2))
    for name, values in curves.items():
        left.plot([i + 1 for i in LAYERS], values, marker="o", label=name)
    left.set(xlabel="block", ylabel="mIoU of patches", title="Ridge regression on frozen tokens")
    left.set_xticks([i + 1 for i in LAYERS])
    left.legend()
    for place, (_name, values) in enumerate(results.items()):
        right.bar(place, np.mean(values), color=f"C{place}", alpha=0.5)
        right.plot([place] * len(values), values, "o", color=f"C{place}")
    right.set(ylabel="mIoU", title="Trained with ReSFU, three seeds")
    right.set_xticks(range(len(results)), list(results))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("compile")
    depth = commands.add_parser("depth")
    depth.add_argument("runs", nargs="+", help="NAME=WORKDIR; NAME= for a random encoder")
    depth.add_argument("--data-dir", required=True)
    depth.add_argument("--out", required=True)
    drawing = commands.add_parser("figure")
    drawing.add_argument("curves")
    drawing.add_argument("picture")
    drawing.add_argument("runs", nargs="+", help="NAME=WORKDIR,WORKDIR,...")
    arguments = parser.parse_args()
    if arguments.command == "compile":
        compile_times()
        return
    runs = dict(run.split("=", 1) for run in arguments.runs)
    if arguments.command == "depth":
        curves = depth_curves(runs, arguments.data_dir)
        pathlib.Path(arguments.out).write_text(json.dumps(curves))
        return
    curves = json.loads(pathlib.Path(arguments.curves).read_text())
    figure(curves, arguments.picture, {name: given.split(",") for name, given in runs.items()})


if __name__ == "__main__":
    main()
