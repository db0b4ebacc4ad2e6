"""Dry runs of every config, with every upsampler that it names: two steps, evaluation, checkpoint.

    python -m scripts.dry_run                                   # all of configs/
    python -m scripts.dry_run --distinct                        # as CI does
    python -m scripts.dry_run ade20k_segformer_b1:fade shapes_resfu

Each is what `python train.py --config configs/NAME.py:UPSAMPLER --dry_run` does, with several in
one process. What a run prints is shown if it fails. On a CPU most of the time goes into compiling,
so it is done quickly, as in tests.
"""

import argparse
import contextlib
import importlib
import io
import multiprocessing
import pathlib
import resource
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed

import jax

import train
from resfu_jax import training
from resfu_jax.training import Config
from scripts.quick import compile_quickly

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def experiments(distinct: bool = False) -> list[str]:
    """NAME or NAME:UPSAMPLER of all configs.

    Args:
      distinct: leave out what differs from a later one in the upsampler's name alone; that heads
        take every upsampler is seen in their tests.
    """
    found = {}
    for name in sorted(path.stem for path in CONFIGS.glob("*.py")):
        upsamplers = getattr(importlib.import_module(f"configs.{name}"), "UPSAMPLERS", ())
        for experiment in [f"{name}:{upsampler}" for upsampler in upsamplers] or [name]:
            config = load(experiment)
            config.model.head.upsampler = ""
            found[(name, str(config)) if distinct else experiment] = experiment
    return list(found.values())


def load(experiment: str) -> Config:
    """Its config."""
    name, _, upsampler = experiment.partition(":")
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(*([upsampler] if upsampler else []))


def prepare(directory: str) -> None:
    """Of configs with the same programs one compiles them; without optimisation."""
    compile_quickly()
    jax.config.update("jax_compilation_cache_dir", directory)


def dry_run(experiment: str) -> tuple[str, str, str]:
    """The experiment, what to say of it, and what it printed if it failed."""
    printed, start = io.StringIO(), (time.perf_counter(), _cpu_seconds())
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            contextlib.closing(training.StopSignals()) as stop,
            training.dry_run(load(experiment)) as (small, workdir),
        ):
            train.run(small, workdir, "train", "latest", stop)
            history = training.read_metrics(workdir / "metrics.jsonl")
    except (Exception, SystemExit):
        return experiment, "FAILED", printed.getvalue() + traceback.format_exc()
    finally:
        jax.clear_caches()
    losses = ", ".join(f"{line['loss']:.3f}" for line in history if "loss" in line)
    took = time.perf_counter() - start[0], _cpu_seconds() - start[1]
    return experiment, f"losses {losses}; {took[0]:.0f} s, {took[1]:.0f} s of CPU", ""


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("experiments", nargs="*", help="NAME or NAME:UPSAMPLER; all by default")
    parser.add_argument(
        "--distinct", action="store_true", help="not those that differ in the upsampler alone"
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time")
    arguments = parser.parse_args()
    wanted = arguments.experiments or experiments(arguments.distinct)
    failed = []
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="resfu_compiled_") as compiled,
        ProcessPoolExecutor(arguments.processes, spawn, prepare, (compiled,)) as pool,
    ):
        for done in as_completed([pool.submit(dry_run, experiment) for experiment in wanted]):
            experiment, outcome, printed = done.result()
            print(f"{experiment:40} {outcome}", flush=True)
            if printed:
                failed.append(experiment)
                print(printed, file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"error: {len(failed)} of {len(wanted)} failed: {', '.join(failed)}")
    print(f"all {len(wanted)} run")


if __name__ == "__main__":
    main()
