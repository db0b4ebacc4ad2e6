"""Train or evaluate a segmentation model.

    python train.py --config configs/shapes_resfu.py --workdir runs/shapes
    python train.py --config configs/shapes_resfu.py --workdir runs/shapes --mode eval

Any field of the config can be overridden: `--config.optimizer.learning_rate=1e-4`. The same
command again continues where the run stopped, also after a kill. In the workdir: `config.json`,
`metrics.jsonl`, TensorBoard events, `checkpoints/` (newest and best) and `predictions/`.

`--dry_run` instead of `--workdir` tries a config out: two steps, evaluation and checkpoint with a
made-up dataset, small crops and random weights, in a temporary folder.

Several hosts run the same command, with `--distributed` on a TPU pod or under Slurm, or else with
`--coordinator_address`, `--num_processes` and `--process_id`: docs/scaling.md.
"""

import json
import os
import pathlib
import signal
import sys
from typing import Any

if __name__ == "__main__":  # Until `StopSignals`: the imports take seconds, nothing has begun.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: (os.write(2, b"stopped\n"), os._exit(128 + n)))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx

from resfu_jax import data, training, visualize
from resfu_jax.model import create_model, evaluating

CONFIG = training.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "What to do.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "For --mode eval: best, latest or a step.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Two steps on made-up data, in a temporary folder.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several processes: ask TPU pod or Slurm.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "By hand: host:port of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "By hand: how many there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "By hand: which one this is, from 0.")

State = dict[str, Any]  # everything that a checkpoint holds, as a pytree of arrays
Batch = dict[str, jax.Array]


class NonFiniteError(RuntimeError):
    """The loss or its gradient is NaN or infinite. The message names the step and the images."""


def run(
    config: training.Config,
    workdir: pathlib.Path,
    mode: str,
    checkpoint: str,
    stop: training.StopSignals,
) -> None:
    """Trains to `config.steps`, or evaluates a checkpoint."""
    # ------------------------------------------------------------------------------------- devices
    training.validate(config, devices=jax.device_count(), processes=jax.process_count())
    layout = training.Layout(config.parallel)
    main_process = training.is_main_process()
    training.check_together(workdir, config)

    # ----------------------------------------------------------------------------- resume or start
    checkpoints = training.Checkpoints(
        workdir / "checkpoints", keep=config.checkpoint.keep, read_only=mode == "eval"
    )
    start = checkpoints.find("latest" if mode == "train" else checkpoint)
    if start is not None:
        training.check_same_run(workdir, config, only="" if mode == "train" else "model.")
    elif mode == "eval":
        raise training.CheckpointError(f"there is no checkpoint in {checkpoints.directory}")
    stop.check()

    # --------------------------------------------------------------------------------------- model
    info = data.dataset_info(config.data.name, config.data.dir)
    schedule = training.create_schedule(config.optimizer, config.steps)
    optimizer = training.create_optimizer(config.optimizer, config.steps)

    def init(pretrained: dict[str, Any] | None = None) -> tuple[nnx.GraphDef, State]:
        model = create_model(
            **training.model_arguments(config.model),
            num_classes=info.num_classes,
            rngs=nnx.Rngs(config.seed),
        )
        if pretrained is not None:
            nnx.update(model.backbone, pretrained)
        # rest: batch statistics, dropout, a frozen backbone
        graphdef, params, rest = nnx.split(model, model.trainable, ...)
        params, rest = nnx.as_pure(params), nnx.as_pure(rest)
        state = {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "rest": rest,
            "optimizer": optimizer.init(params),
        }
        if config.optimizer.ema_decay is not None:
            state["ema"] = jax.tree.map(jnp.copy, params)
        return graphdef, state

    try:
        graphdef, abstract_state = jax.eval_shape(init)
        crop = jax.ShapeDtypeStruct((1, *config.data.crop_size, 3), jnp.uint8)
        jax.eval_shape(
            lambda s, x: nnx.merge(graphdef, s["params"], s["rest"])(x), abstract_state, crop
        )
        stop.check()
        pretrained = training.pretrained_backbone(config.model.backbone)
    except (ValueError, FileNotFoundError) as error:  # an option or weights that do not fit
        raise training.ConfigError(f"config.model: {error}") from error
    abstract_state = layout.abstract(abstract_state)
    parameters = sum(p.size for p in jax.tree.leaves(abstract_state["params"]))

    # ---------------------------------------------------------------------------------------- data
    stop.check()
    if info.embedded:
        training.one_after_another(lambda: build_once(config.data.name, config.data.dir))
    stop.check()
    train_source = data.open_source(config.data.name, "train", config.data.dir)
    val_source = data.open_source(config.data.name, "validation", config.data.dir)
    if config.data.on_corrupt == "skip":
        train_source = data.skip_corrupt(train_source, info)
        val_source = data.skip_corrupt(val_source, info)
    preprocess = training.create_preprocess(config)
    process = dict(shard=(jax.process_index(), jax.process_count()))
    val_batches = data.eval_batches(
        val_source,
        info,
        batch_size=config.eval.batch_size // jax.process_count(),
        preprocess=preprocess,
        pad_to=config.eval.pad_to,
        group_sizes=config.eval.group_sizes,
        **process,
    )

    class_weights = training.class_weights(config.loss, train_source, info)
    stop.check()

    # --------------------------------------------------------------------------------- update step
    def train_step(
        state: State, batch: Batch, *, parts: int = config.optimizer.accumulate
    ) -> tuple[State, dict[str, jax.Array]]:
        # The parts of an accumulated batch divide by the weight of the whole.
        normalizer = training.pixel_weights(
            batch["label"],
            ignore_label=info.ignore_label,
            class_weights=class_weights,
        ).sum()

        def loss_fn(params: Any, rest: Any, part: Batch) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, layout.gather(params), rest, copy=True)
            loss = training.cross_entropy(
                model(part["image"], part.get("features")),
                part["label"],
                ignore_label=info.ignore_label,
                label_smoothing=config.loss.label_smoothing,
                class_weights=class_weights,
                normalizer=normalizer,
            )
            return loss, nnx.as_pure(nnx.state(model, nnx.Not(model.trainable)))

        params = state["params"]
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if parts == 1:
            (loss, rest), grads = grad_fn(params, state["rest"], batch)
        else:
            loss, rest, grads = training.accumulate_gradients(
                grad_fn, params, state["rest"], batch, parts=parts
            )
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], params)
        params = optax.apply_updates(params, updates)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state["step"]),
        }
        new_state = {
            "step": state["step"] + 1,
            "params": params,
            "rest": rest,
            "optimizer": optimizer_state,
        }
        if config.optimizer.ema_decay is not None:
            new_state["ema"] = training.update_ema(
                state["ema"], params, state["step"], config.optimizer.ema_decay
            )
        return new_state, metrics

    shardings = layout.of(abstract_state)
    compiled_step = jax.jit(
        train_step,
        in_shardings=(shardings, layout.over_batch),
        out_shardings=(shardings, layout.replicated),
        donate_argnums=0,
    )

    # ---------------------------------------------------------------------------------- evaluation
    infer = training.create_inference(config)

    def eval_step(state: State, batch: Batch) -> tuple[training.SegmentationCounts, jax.Array]:
        params = layout.gather(state.get("ema", state["params"]))
        model = evaluating(nnx.merge(graphdef, params, state["rest"]))
        return training.evaluate_batch(
            model, infer, batch, info, dilation_ratio=config.eval.dilation_ratio
        )

    eval_step = jax.jit(eval_step, out_shardings=(layout.replicated, layout.over_batch))

    def feature_cache(state: State) -> training.FeatureCache | None:
        if not config.model.backbone.cache_features:
            return None
        directory = pathlib.Path(config.data.dir or data.default_data_dir()) / "features"
        whole = jax.jit(lambda x: x, out_shardings=layout.replicated)
        model = nnx.merge(graphdef, *whole((state["params"], state["rest"])))
        return training.FeatureCache(directory, model)

    def with_features(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return batch if cache is None else batch | {"features": cache(batch["image"])}

    def evaluate(step: int, state: State) -> dict[str, float]:
        counts = training.SegmentationCounts.zeros(info.num_classes)
        left = config.eval.pictures if main_process else 0
        for i, batch in enumerate(val_batches):
            stop.check(ask=i % 10 == 0)
            sizes = batch["size"]
            batch = with_features(batch) if infer.plain else batch
            batch_counts, predictions = eval_step(state, layout.to_devices(batch))
            counts = counts.merge(batch_counts)
            drawn = min(left, np.count_nonzero(sizes[:, 0]))
            for i, classes in enumerate(training.local_rows(predictions)[:drawn] if drawn else []):
                height, width = sizes[i]
                picture = visualize.side_by_side(
                    batch["image"][i, :height, :width],
                    batch["label"][i, :height, :width],
                    classes[:height, :width],
                    info.palette,
                    ignore_label=info.ignore_label,
                )
                name = f"step{step:07d}_{config.eval.pictures - left}.png"
                visualize.save_png(workdir / "predictions" / name, picture)
                left -= 1
        return counts.compute(info.class_names)

    # --------------------------------------------------------------------------------------- state
    if mode == "eval":
        state = checkpoints.restore(start, abstract_state)
        cache = feature_cache(state)
        metrics = evaluate(start, state)
        checkpoints.close()
        if main_process:
            text = json.dumps({"step": start} | metrics, indent=2)
            training.write_whole(workdir / f"eval_{start}.json", text)
            training.print_table(f"checkpoint {start}", metrics, info.class_names, {})
        return

    train_batches = data.train_batches(
        train_source,
        info,
        batch_size=config.batch_size // jax.process_count(),
        crop_size=config.data.crop_size,
        preprocess=preprocess,
        scale_range=config.data.scale_range,
        max_class_share=config.data.max_class_share,
        flip=config.data.flip,
        photometric=config.data.photometric,
        seed=config.seed,
        num_workers=config.data.num_workers,
        **process,
    )
    checkpoints.check_space(abstract_state)
    if start is None:
        start = 0
        stop.check()
        quickly = {"xla_backend_optimization_level": 0}  # It runs once: compile it quickly.
        make_state = jax.jit(
            lambda *pretrained: init(*pretrained)[1],
            out_shardings=shardings,
            compiler_options=quickly,
        )
        state = make_state(pretrained)
    else:
        state = checkpoints.restore(start, abstract_state, train_batches)
    cache = feature_cache(state)
    if main_process:
        training.write_config(workdir, config)

    # ---------------------------------------------------------------------------------------- loop
    peak, flops = training.peak_flops(config.parallel), None
    if peak is not None:  # Without it there is nothing to compare with, and it takes seconds.
        image = (config.batch_size, *config.data.crop_size, 3)
        whole = {
            "image": jax.ShapeDtypeStruct(image, jnp.uint8, sharding=layout.over_batch),
            "label": jax.ShapeDtypeStruct(image[:-1], jnp.uint8, sharding=layout.over_batch),
        }
        flops = training.count_flops(
            lambda state, batch: train_step(state, batch, parts=1), abstract_state, whole
        )
    reporter = training.Reporter(
        workdir,
        steps=config.steps,
        batch_size=config.batch_size,
        start=start,
        utilisation=flops / peak if flops else None,
        silent=not main_process,
    )
    reporter.message(
        f"{config.data.name}: {len(train_source)} training and {len(val_source)} validation "
        f"images; {parameters:,} parameters; "
        f"{f'{flops / 1e9:,.1f} Gflop a step; ' if flops else ''}"
        f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        f"{f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''}; "
        f"{f'continuing from step {start}' if start else 'starting'}, to step {config.steps}"
    )
    stop.check()
    profile = training.Profile(config.profile, workdir / "profile")
    history = workdir / "metrics.jsonl"
    window = []  # (step, ids, metrics on the device) since the last report

    def report(step: int) -> None:
        """Fetches the window's metrics (this waits for the device); stops if one is not finite."""
        steps, ids, metrics = zip(*window, strict=True)
        metrics = jax.device_get(metrics)
        for i, values in enumerate(metrics):
            for name in ("loss", "gradient_norm"):
                if not np.isfinite(values[name]):
                    raise NonFiniteError(
                        f"{name} is {values[name]} at step {steps[i]}, in the batch of images "
                        f"{', '.join(image_id.decode() for image_id in ids[i])}. The newest good "
                        f"checkpoint is {checkpoints.find('latest')}, in {checkpoints.directory}"
                    )
        means = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        means["learning_rate"] = float(metrics[-1]["learning_rate"])
        reporter.train(step, means | training.peak_memory())
        window.clear()

    def evaluation_due(step: int) -> bool:
        return step >= config.steps or step % config.eval.every == 0

    def score(step: int) -> None:
        metrics = evaluate(step, state)
        checkpoints.score(step, metrics)
        reporter.evaluation(step, metrics)

    try:
        stop.at_once = False  # From here on there is something to save.
        evaluated = {line["step"] for line in training.read_metrics(history) if "val/miou" in line}
        if start and evaluation_due(start) and start not in evaluated:
            score(start)  # That evaluation failed, or was stopped.
        for step in range(start + 1, config.steps + 1):
            profile.before(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                batch = next(train_batches)
                inputs = layout.to_devices(with_features(batch))
                state, metrics = compiled_step(state, inputs)
            window.append((step, batch["id"], metrics))
            reporter.advance(step)

            last = step == config.steps
            stopping = training.agreed_stop(stop.received, ask=step % config.log_every == 0)
            saving = evaluation_due(step) or stopping or step % config.checkpoint.every == 0
            if saving or step % config.log_every == 0:
                report(step)
            if saving:
                checkpoints.save(step, state, train_batches)
            if stopping and not last:
                raise training.Stopped(stopping, f"stopped at step {step}")
            if evaluation_due(step):
                score(step)
    finally:
        profile.close()
        checkpoints.close()
        train_batches.close()
        reporter.close()

    # --------------------------------------------------------------------------------------- table
    if not main_process:
        return
    lines = training.read_metrics(history)
    evaluations = [line for line in lines if "val/miou" in line]
    best = max(evaluations, key=lambda line: (line["val/miou"], line["step"]))
    training.print_table(
        f"{config.data.name}, {config.model.head.upsampler}, step {config.steps}",
        {name.removeprefix("val/"): value for name, value in evaluations[-1].items()},
        info.class_names,
        {
            "best": f"mIoU {best['val/miou']:.4f} at step {best['step']}",
            "training time": f"{sum(line.get('seconds', 0) for line in lines) / 60:.1f} min",
            "parameters": f"{parameters:,}",
            "corrupt images skipped": str(len(train_source.skipped) + len(val_source.skipped)),
            "workdir": str(workdir),
        },
    )


def build_once(name: str, directory: str | None) -> None:
    """Builds an embedded dataset where it is missing."""
    if not data.is_prepared(name, directory):
        print(f"building the dataset {name} (once)", file=sys.stderr)
        data.prepare(name, directory)


# ------------------------------------------------------------------------------------ command line
def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a mistake ends in one message."""
    try:
        return training.parse_flags(argv)
    except training.ConfigError as error:
        sys.exit(f"error: {error}")


def main(argv: list[str]) -> None:
    """Runs; mistakes of the person at the keyboard end in one message without a traceback."""
    logging.set_verbosity(logging.WARNING)  # Orbax would tell every step of a save.
    if argv[1:]:
        sys.exit(f"error: unknown arguments: {' '.join(argv[1:])}")
    stop = training.StopSignals()
    try:
        training.initialize_distributed(
            detect=DISTRIBUTED.value,
            coordinator_address=COORDINATOR.value,
            num_processes=NUM_PROCESSES.value,
            process_id=PROCESS_ID.value,
        )
        if DRY_RUN.value:
            with training.dry_run(CONFIG.value) as (config, workdir):
                run(config, workdir, "train", "latest", stop)
        else:
            workdir = training.find_workdir(WORKDIR.value, new=MODE.value == "train")
            run(CONFIG.value, workdir, MODE.value, CHECKPOINT.value, stop)
    except training.Stopped as stopped:
        if training.is_main_process():
            print(f"{stopped}; the same command continues", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except (
        training.ConfigError,
        training.CheckpointError,
        data.DatasetNotPrepared,
        data.DataError,
        NonFiniteError,
        OSError,
    ) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    flags.register_multi_flags_validator(
        ["workdir", "dry_run"],
        lambda given: given["workdir"] or given["dry_run"],
        message="--workdir has to name a directory, unless there is --dry_run.",
    )
    app.run(main, flags_parser=parse_flags)
