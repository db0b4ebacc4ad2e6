"""Train or evaluate a model.

    python train.py --config configs/shapes_resfu.py --workdir runs/shapes
    python train.py --config configs/shapes_resfu.py --workdir runs/shapes --mode eval

Any field of the config can be overridden: `--config.optimizer.learning_rate=1e-4`. The same
command again continues where the run stopped, also after a kill. In the workdir: `config.json`,
`metrics.jsonl`, TensorBoard events, `checkpoints/` (newest and best) and `predictions/`.

A run continues with the config that it began with, but for its length and what changes no number.
`--resume_with_changes` lets more change, such as the learning rate and the batch size;
`--config.init_from=WORKDIR` starts a new run with the weights of another one.

`--dry_run` instead of `--workdir` tries a config out: two steps, evaluation and checkpoint with a
made-up dataset, small crops and random weights, in a temporary folder.

What is learned is `config.task`: "segmentation", "depth", or "features", an upsampler of a frozen
backbone's features. A task (`resfu_jax/tasks`) has the model, batches, loss and metrics; the loop
is here.

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
import optax
from absl import app, flags, logging

try:
    from resfu_jax import data, tasks, training
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}")
from resfu_jax.model import evaluating

CONFIG = training.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "What to do.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "For --mode eval: best, latest or a step.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Two steps on made-up data, in a temporary folder.")
WITH_CHANGES = flags.DEFINE_bool("resume_with_changes", False, "Continue with another config.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several processes: ask TPU pod or Slurm.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "By hand: host:port of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "By hand: how many there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "By hand: which one this is, from 0.")

Batch = dict[str, Any]  # arrays; `features`, where they are cached, is a tuple of them
Metrics = dict[str, jax.Array]


def run(
    config: training.Config,
    workdir: pathlib.Path,
    mode: str,
    checkpoint: str,
    stop: training.StopSignals,
    *,
    with_changes: bool = False,
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
    changes: list[str] = []
    if start is not None:
        only = "" if mode == "train" else "model."
        changes = training.check_same_run(workdir, config, only=only, with_changes=with_changes)
    elif mode == "eval" or with_changes:
        raise training.CheckpointError(f"there is no checkpoint in {checkpoints.directory}")
    stop.check()

    # --------------------------------------------------------------------------------------- model
    task = tasks.create_task(config)
    schedule = training.create_schedule(config.optimizer, config.steps)
    optimizer = training.create_optimizer(config.optimizer, config.steps)
    with training.blaming(task.blamed):  # options that do not fit
        blank = task.draw(task.blank_batch(), 1)
        graphdef, abstract = training.abstract_state(
            config, task.create_model, optimizer, lambda model: task.try_out(model, blank)
        )
    stop.check()
    weights, origin = None, ""
    if start is None:
        weights, origin = task.initial_weights()
    abstract = layout.abstract(abstract)
    shardings = layout.of(abstract)
    parameters = sum(p.size for p in jax.tree.leaves(abstract["params"]))

    # ---------------------------------------------------------------------------------------- data
    stop.check()
    task.prepare()
    stop.check()
    task.open()
    val_batches = task.eval_batches()
    stop.check()

    # --------------------------------------------------------------------------------- update step
    def train_step(state: training.State, batch: Batch) -> tuple[training.State, Metrics]:
        # The parts of an accumulated batch divide by the weight of the whole.
        weight = task.weight(batch)

        def loss_fn(params: Any, rest: Any, part: Batch) -> tuple[jax.Array, Any]:
            model = training.merge_model(graphdef, layout.gather(params), rest)
            loss = task.loss(model, part, weight)
            return loss, training.split_model(model)[1]["rest"]

        loss, rest, grads = training.accumulate_gradients(
            jax.value_and_grad(loss_fn, has_aux=True),
            state["params"],
            state["rest"],
            batch,
            parts=config.optimizer.accumulate,
        )
        updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state["step"]),
        }
        new = {"step": state["step"] + 1, "params": params, "rest": rest, "optimizer": moments}
        if (decay := config.optimizer.ema_decay) is not None:
            new["ema"] = training.update_ema(state["ema"], params, state["step"], decay)
        return new, metrics

    compiled_step: Any = jax.jit(
        train_step,
        in_shardings=(shardings, layout.over_batch),
        out_shardings=(shardings, layout.replicated),
        donate_argnums=0,
    )

    # ---------------------------------------------------------------------------------- evaluation
    def eval_step(state: training.State, batch: Batch) -> tuple[Any, Any]:
        params = layout.gather(state.get("ema", state["params"]))
        model = evaluating(training.merge_model(graphdef, params, state["rest"]))
        return task.evaluate(model, batch)

    compiled_eval: Any = jax.jit(eval_step, out_shardings=(layout.replicated, layout.over_batch))

    def evaluate(step: int, state: training.State) -> dict[str, float]:
        counts = task.no_counts()
        drawn = config.eval.pictures if main_process else 0
        pictures = tasks.Pictures(workdir / "predictions", step, drawn, task)
        for i, batch in enumerate(val_batches):
            stop.check(ask=i % 10 == 0)
            batch = task.draw_for_evaluation(batch)
            inputs = layout.to_devices(with_features(batch) if task.sees_whole_images else batch)
            batch_counts, predictions = compiled_eval(state, inputs)
            counts = counts.merge(task.complete(batch_counts, batch, predictions))
            pictures.draw(batch, predictions)
        return task.metrics(counts)

    if mode == "eval":
        assert start is not None  # as above
        state = checkpoints.restore(start, abstract)
        with_features = training.feature_lookup(config, layout, graphdef, state)
        metrics = evaluate(start, state)
        checkpoints.close()
        if main_process:
            text = json.dumps({"step": start} | metrics, indent=2)
            training.write_whole(workdir / f"eval_{start}.json", text)
            task.print_table(f"checkpoint {start}", metrics, {})
        return

    # --------------------------------------------------------------------------------------- state
    train_batches = task.train_batches()
    checkpoints.check_space(abstract)
    if start is None:
        start = 0
        stop.check()
        state = jax.jit(
            lambda weights: training.create_state(config, task.create_model, optimizer, weights)[1],
            out_shardings=shardings,
            compiler_options={"xla_backend_optimization_level": 0},  # It runs once.
        )(weights)
    else:
        state = checkpoints.restore(start, abstract, train_batches)
    with_features = training.feature_lookup(config, layout, graphdef, state)
    if main_process:
        training.write_config(workdir, config, step=start)

    # ---------------------------------------------------------------------------------------- loop
    flops, utilisation = training.count_step_flops(train_step, abstract, blank, config, layout)
    reporter = training.Reporter(
        workdir,
        config,
        start=start,
        utilisation=utilisation,
        evaluation_steps=training.evaluation_steps(config, val_batches),
        silent=not main_process,
    )
    reporter.message(opening(config, start, task, parameters, flops))
    for text in filter(None, [origin, *changes]):
        reporter.message(text)
    compiled_step = reporter.announced("training step", compiled_step)
    compiled_eval = reporter.announced("evaluation", compiled_eval)
    stop.check()
    profile = training.Profile(config.profile, workdir / "profile")
    window = training.MetricsWindow(checkpoints)

    def evaluation_due(step: int) -> bool:
        return step >= config.steps or step % config.eval.every == 0

    def score(step: int) -> None:
        with reporter.aside("evaluation"):
            metrics = evaluate(step, state)
            checkpoints.score(step, task.score(metrics))
        reporter.evaluation(step, metrics, task.summary)

    try:
        stop.at_once = False  # From here on there is something to save.
        lines = training.read_metrics(workdir / "metrics.jsonl")
        evaluated = {line["step"] for line in lines if f"val/{task.metric}" in line}
        if start and evaluation_due(start) and start not in evaluated:
            score(start)  # That evaluation failed, or was stopped.
        for step in range(start + 1, config.steps + 1):
            profile.before(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                batch = task.draw(next(train_batches), step)
                inputs = layout.to_devices(with_features(batch))
                state, metrics = compiled_step(state, inputs)
            window.add(step, batch["id"], metrics)
            reporter.advance(step, metrics)

            last = step == config.steps
            stopping = training.agreed_stop(stop.received, ask=step % config.log_every == 0)
            saving = evaluation_due(step) or stopping or step % config.checkpoint.every == 0
            if saving or step % config.log_every == 0:
                reporter.train(step, window.means() | training.peak_memory())
            if saving:
                with reporter.aside("checkpoint"):
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

    if main_process:
        print_result(config, workdir, task, parameters)


def opening(
    config: training.Config, start: int, task: tasks.Task, parameters: int, flops: float | None
) -> str:
    """What a person reads first."""
    processes = jax.process_count()
    return (
        f"{config.data.name}: {len(task.train_source)} training and {len(task.val_source)} "
        f"validation images; {parameters:,} parameters; "
        f"{f'{flops / 1e9:,.1f} Gflop a step; ' if flops else ''}"
        f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        f"{f' in {processes} processes' if processes > 1 else ''}; "
        f"{f'continuing from step {start}' if start else 'starting'}, to step {config.steps}"
    )


def print_result(
    config: training.Config, workdir: pathlib.Path, task: tasks.Task, parameters: int
) -> None:
    """What a person reads last: the table of the newest evaluation, and the best one."""
    lines = training.read_metrics(workdir / "metrics.jsonl")
    evaluations = [
        {"step": line["step"]}
        | {name.removeprefix("val/"): value for name, value in line.items() if "val/" in name}
        for line in lines
        if f"val/{task.metric}" in line
    ]
    best = max(evaluations, key=lambda line: (task.score(line), line["step"]))
    task.print_table(
        f"{config.data.name}, {config.model.head.upsampler}, step {config.steps}",
        evaluations[-1],
        {
            "best": f"{task.summary[task.metric]} {best[task.metric]:.4f} at step {best['step']}",
            "training time": f"{sum(line.get('seconds', 0) for line in lines) / 60:.1f} min",
            "parameters": f"{parameters:,}",
            "corrupt images skipped": str(
                sum(len(source.skipped) for source in (task.train_source, task.val_source))
            ),
            "workdir": str(workdir),
        },
    )


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
            assert WORKDIR.value is not None  # see the validator
            workdir = training.find_workdir(WORKDIR.value, new=MODE.value == "train")
            changes = WITH_CHANGES.value
            run(CONFIG.value, workdir, MODE.value, CHECKPOINT.value, stop, with_changes=changes)
    except training.Stopped as stopped:
        if training.is_main_process():
            print(f"{stopped}; the same command continues", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except BrokenPipeError:
        raise  # `readers_may_leave` answers it
    except (
        training.ConfigError,
        training.CheckpointError,
        data.DatasetNotPrepared,
        data.DataError,
        training.NonFiniteError,
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
    with training.readers_may_leave():
        app.run(main, flags_parser=parse_flags)
