"""Upsamplers on frozen features of one tiny encoder, with the same budget each.

    python scripts/toy_analysis.py --workdir runs/toy            # half an hour on two CPU cores
    python scripts/toy_analysis.py --workdir runs/toy --members fade resfu --seeds 0

In the spirit of FADE's toy analysis (Lu et al., ECCV 2022, section 3.1). The encoder is the MiT of
`configs/shapes_bilinear.py`, trained first (if RUN/encoder is not there) and then frozen. Its
stride-16 features (64 channels, 8 x 8) go x4 to stride 4; guided members see the stride-4 features
through a learned linear map to 64 channels. A 1x1 convolution, BatchNorm, ReLU and a linear
classifier read the result, bilinear logits at image size are scored. Only what the member can do
differs: upsampler, guide map and classifier train for the same steps on the same batches.

Finished runs are kept in the workdir; the same command goes on where it stopped, and writes
docs/toy.md and docs/toy_pca.png from what there is.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict as flatten
from flax.traverse_util import unflatten_dict as unflatten
from tqdm import tqdm

import resfu_jax
from resfu_jax import data, training
from resfu_jax.heads._layers import ConvBNReLU
from resfu_jax.model import create_model
from resfu_jax.ops import resize
from resfu_jax.training import count_flops
from resfu_jax.upsamplers import upsampler_entry
from resfu_jax.visualize import PCA, save_grid

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configs import shapes_bilinear  # noqa: E402

DOCS = ROOT / "docs"
MEMBERS = (
    "nearest bilinear bicubic deconv pixel_shuffle carafe dysample dysample_plus dysample_s "
    "dysample_s_plus lda_aqu sapa sapa_i sapa_g sapa_deform semishift fade_lite fade resfu"
).split()
STEPS, BATCH, RATE = 300, 16, 4e-3
SCALE, WIDTH = 4, 64
PICTURE = 7  # validation image of the figure

TEXT = """# Nineteen upsamplers on one frozen encoder

Those that the image guides, and FreqFusion, came later and are not in it.

The stride-16 features (64 channels, 8 x 8) of the MiT of `configs/shapes_bilinear.py`, trained on
`shapes` and frozen, go x4 to stride 4; guided upsamplers see its stride-4 features through a
learned linear map to 64 channels. A 1x1 convolution, BatchNorm, ReLU and a linear classifier read
the result; logits, resized to the image, are scored. Upsampler, guide map and classifier train
for {steps} steps of {batch} images; nothing else differs. {seeds} seeds: mean ± standard
deviation.

Parameters, operations (as XLA counts them) and milliseconds are of the upsampler alone: 64
channels, 32 x 32 to 128 x 128, batch 1, two shared CPU cores, members timed in turn: read ratios.

    python scripts/toy_analysis.py --workdir runs/toy    # trains what is missing, writes this page

{rows}

![features](toy_pca.png)

Upsampled features of one validation image after training, coloured by the three principal
components of the low-resolution features. Members marked * leave that space (their output is a
learned map, or mixes the guide in) and have components of their own. What looks like an artefact:

- `deconv`, `pixel_shuffle`: a checkerboard. Each of the 16 phases of a cell has weights of its own,
  and nothing ties them together.
- `carafe`: a band along the border, and dots. Beyond the image the features count as zero (grey
  here), and the kernels are not renormalised; a window of 5 x 5 reaches two of the eight cells.
- `sapa_i`, `sapa_g`: a grey background that ends at a rectangle. Keys beyond the image have
  similarity 0 and values 0, and stay in the softmax. Where all similarities inside are negative, a
  pixel chooses the outside: training makes "outside" the background's feature. The rectangle is
  where the windows no longer reach the border. On larger maps it is only the border's two cells.
- `sapa`, `semishift`: blocks of cells. All 16 output pixels of a cell share one window, whose
  members change from cell to cell: the mosaic that ReSFU's paper names.
- `sapa_deform`: speckle. Points are predicted per pixel from the low-resolution features alone and
  nothing makes neighbours agree. Its seeds differ most.
- `lda_aqu`: blur, below bilinear in score. Its taps start one *output* pixel apart, here a quarter
  of a cell, and its grid aligns corners, so that features move by up to 3/8 of a cell against the
  labels. 300 steps do not move the offsets far.
- `fade`, `fade_lite` score highest because their gate passes the stride-4 guide itself to the
  classifier; the others only reassemble the stride-16 features.

All of these are the published operators' own behaviour; the goldens pin it.
"""


class Reader(nnx.Module):
    """Frozen features to logits: guide map, upsampler, classifier."""

    def __init__(self, member: str, guide_features: int, num_classes: int, rngs: nnx.Rngs):
        self.guided = upsampler_entry(member).cls.guide == "features"
        self.guide = nnx.Linear(guide_features, WIDTH, rngs=rngs) if self.guided else None
        self.up = resfu_jax.create_upsampler(
            member, features=WIDTH, guide_features=WIDTH, scale=SCALE, rngs=rngs
        )
        types = dict(dtype=None, param_dtype=jnp.float32, rngs=rngs)
        self.hidden = ConvBNReLU(WIDTH, WIDTH, **types)
        self.classify = nnx.Linear(WIDTH, num_classes, rngs=rngs)

    def upsample(self, features, guide):
        """The member's output."""
        if self.guided:
            return self.up(features, self.guide(guide))
        return self.up(features, output_size=guide.shape[1:3])

    def __call__(self, features, guide, size):
        """Logits at image size."""
        return resize(self.classify(self.hidden(self.upsample(features, guide))), size)


def frozen_features(workdir: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Encoder features and labels of both splits; made once."""
    path = workdir / "features.npz"
    if not path.exists():
        encoder = workdir / "encoder"
        train = [sys.executable, "train.py", "--config", "configs/shapes_bilinear.py"]
        subprocess.run([*train, "--workdir", str(encoder)], cwd=ROOT, check=True)
        arrays = {}
        for split in ("train", "validation"):
            arrays |= {f"{split}/{k}": v for k, v in encode(encoder, split).items()}
        np.savez(path, **arrays)
    with np.load(path) as arrays:
        return {
            split: {k: arrays[f"{split}/{k}"] for k in ("image", "label", "features", "guide")}
            for split in ("train", "validation")
        }


def encode(encoder: pathlib.Path, split: str) -> dict[str, np.ndarray]:
    """Runs the frozen backbone over a split."""
    config = shapes_bilinear.get_config()
    info = data.dataset_info("shapes")
    model = create_model(
        **training.model_arguments(config.model),
        num_classes=info.num_classes,
        rngs=nnx.Rngs(0),
    )
    path = (encoder / "checkpoints" / str(config.steps) / "state").resolve()
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(path)["params"]["backbone"]
    state = nnx.to_pure_dict(nnx.state(model.backbone, nnx.Param))
    # Orbax spells the indices of lists as text.
    leaves = {".".join(map(str, k)): v for k, v in flatten(saved).items()}
    state = {k: leaves[".".join(map(str, k))] for k in flatten(state)}
    nnx.update(model.backbone, unflatten(state))
    model = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)

    run = jax.jit(model.features)
    source = data.open_source("shapes", split)
    parts = {"image": [], "label": [], "features": [], "guide": []}
    for batch in data.eval_batches(source, info, batch_size=50, pad_to=32):
        guide, _, features, _ = run(batch["image"])
        real = [bool(i) for i in batch["id"]]
        for key, value in dict(batch, guide=guide, features=features).items():
            if key in parts:
                parts[key].append(np.asarray(value)[real])
    return {key: np.concatenate(value) for key, value in parts.items()}


def train(member: str, seed: int, sets: dict, workdir: pathlib.Path) -> dict:
    """Trains one reader and evaluates it."""
    info = data.dataset_info("shapes")
    train_set, val_set = sets["train"], sets["validation"]
    reader = Reader(member, train_set["guide"].shape[-1], info.num_classes, nnx.Rngs(seed))
    graphdef, params, stats = nnx.split(reader, nnx.Param, ...)
    params, stats = nnx.as_pure(params), nnx.as_pure(stats)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0, RATE, 30, STEPS), weight_decay=0.01),
    )
    state = optimizer.init(params)
    size = train_set["label"].shape[1:3]

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, stats, state, features, guide, label):
        def loss_fn(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            loss = training.cross_entropy(model(features, guide, size), label)
            return loss, nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

        (loss, stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), stats, state, loss

    rng = np.random.default_rng(seed)
    seconds = []
    for i in tqdm(range(STEPS), desc=f"{member} {seed}", disable=None):
        pick = np.sort(rng.choice(len(train_set["label"]), BATCH, replace=False))
        batch = [train_set[k][pick] for k in ("features", "guide", "label")]
        start = time.perf_counter()
        params, stats, state, loss = step(params, stats, state, *batch)
        loss = float(loss)
        if i:
            seconds.append(time.perf_counter() - start)
    if not np.isfinite(loss):
        raise RuntimeError(f"{member}, seed {seed}: the loss is {loss}")

    @jax.jit
    def evaluate(features, guide, label):
        model = nnx.view(nnx.merge(graphdef, params, stats), use_running_average=True)
        predictions = jnp.argmax(model(features, guide, size), axis=-1).astype(jnp.uint8)
        return training.count(predictions, label, num_classes=info.num_classes)

    counts = training.SegmentationCounts.zeros(info.num_classes)
    for i in range(0, len(val_set["label"]), 50):
        counts = counts.merge(
            evaluate(*(val_set[k][i : i + 50] for k in ("features", "guide", "label")))
        )
    if seed == 0:
        model = nnx.view(nnx.merge(graphdef, params, stats), use_running_average=True)
        one = slice(PICTURE, PICTURE + 1)
        up = model.upsample(val_set["features"][one], val_set["guide"][one])[0]
        np.save(workdir / f"{member}.npy", up)
    metrics = counts.compute(info.class_names)
    return dict(
        member=member,
        seed=seed,
        loss=loss,
        step_ms=1e3 * statistics.median(seconds),
        **{k: metrics[k] for k in ("miou", "boundary_iou")},
    )


def costs(members: list[str], runs: int = 9) -> dict[str, dict]:
    """Parameters, operations and time of the upsampler alone, forward and backward, in turn."""
    x = jnp.ones((1, 32, 32, WIDTH))
    y = jax.random.normal(jax.random.key(0), (1, 32 * SCALE, 32 * SCALE, WIDTH))
    table, calls = {}, {}
    for member in members:
        up = resfu_jax.create_upsampler(member, features=WIDTH, guide_features=WIDTH, scale=SCALE)
        graphdef, params = nnx.split(up)
        inputs = (x, y) if up.guide == "features" else (x,)

        def forward(params, inputs, graphdef=graphdef):
            return nnx.merge(graphdef, params)(*inputs)

        def both(params, inputs, forward=forward):
            out, vjp = jax.vjp(forward, params, inputs)
            return out, vjp(y)

        compiled = [jax.jit(f).lower(params, inputs).compile() for f in (forward, both)]
        calls[member] = [(f, params, inputs) for f in compiled]
        table[member] = dict(
            parameters=sum(p.size for p in jax.tree.leaves(params)),
            gflops=count_flops(forward, params, inputs) / 1e9,
        )
    times = {member: ([], []) for member in members}
    for _ in range(runs):
        for member in members:
            for (f, *args), record in zip(calls[member], times[member], strict=True):
                start = time.perf_counter()
                jax.block_until_ready(f(*args))
                record.append(1e3 * (time.perf_counter() - start))
    for member in members:
        forward, both = (statistics.median(t[1:]) for t in times[member])
        table[member] |= dict(forward_ms=forward, both_ms=both)
    return table


def report(workdir: pathlib.Path, sets: dict) -> None:
    """Writes docs/toy.md and docs/toy_pca.png."""
    results: dict[str, list[dict]] = {}
    for line in (workdir / "results.jsonl").read_text().splitlines():
        r = json.loads(line)
        results.setdefault(r["member"], []).append(r)
    members = [m for m in MEMBERS if m in results]
    table = costs(members)
    rows = [
        "| upsampler | mIoU | boundary IoU | parameters | GFLOPs | forward ms | + backward ms |",
        "|---|---|---|---|---|---|---|",
    ]

    def spread(values: list[float]) -> str:
        deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{deviation}"

    for m in members:
        c = table[m]
        scores = [spread([r[k] for r in results[m]]) for k in ("miou", "boundary_iou")]
        numbers = f"{c['gflops']:.3f} | {c['forward_ms']:.1f} | {c['both_ms']:.1f}"
        rows.append(f"| `{m}` | {' | '.join(scores)} | {c['parameters']:,} | {numbers} |")
    seeds = max(len(r) for r in results.values())
    (DOCS / "toy.md").write_text(
        TEXT.format(seeds=seeds, rows="\n".join(rows), steps=STEPS, batch=BATCH)
    )
    picture(workdir, members, sets["validation"])
    (workdir / "costs.json").write_text(json.dumps(table, indent=1))


def picture(workdir: pathlib.Path, members: list[str], val_set: dict) -> None:
    """Feature maps of all members on one image."""
    own = {"deconv", "pixel_shuffle", "fade", "fade_lite"}
    features = val_set["features"][PICTURE]
    pca = PCA.fit(features)
    panels = [("image", val_set["image"][PICTURE]), ("stride-16 features", pca(features))]
    for m in members:
        up = np.load(workdir / f"{m}.npy")
        panels.append((m + "*" * (m in own), (PCA.fit(up) if m in own else pca)(up)))
    save_grid(DOCS / "toy_pca.png", panels, columns=7, width=1.75, dpi=100)


def main() -> None:
    """Trains what is missing, then reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/toy"))
    parser.add_argument("--members", nargs="+", choices=MEMBERS, default=MEMBERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    sets = frozen_features(args.workdir)
    log = args.workdir / "results.jsonl"
    done = {(r["member"], r["seed"]) for r in map(json.loads, open(log))} if log.exists() else set()
    for seed in args.seeds:
        for member in args.members:
            if (member, seed) not in done:
                result = train(member, seed, sets, args.workdir)
                print(json.dumps(result), flush=True)
                with open(log, "a") as f:
                    f.write(json.dumps(result) + "\n")
    report(args.workdir, sets)


if __name__ == "__main__":
    main()
