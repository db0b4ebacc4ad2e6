"""The command `resfu`, also `python -m resfu_jax`: a function for each subcommand.

The functions' signatures and docstrings are the command line. Their modules import JAX only inside
the functions, so that `--help` is there at once. `resfu train` alone has the flags of train.py.
"""

import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence

import tyro

import resfu_jax
from resfu_jax._names import lookup
from resfu_jax._output import readers_may_leave
from resfu_jax.cli.evaluate import evaluate
from resfu_jax.cli.explain import explain
from resfu_jax.cli.export import export
from resfu_jax.cli.features import features
from resfu_jax.cli.predict import predict
from resfu_jax.cli.prepare import prepare
from resfu_jax.cli.probe import probe
from resfu_jax.cli.serve import serve
from resfu_jax.cli.train import train
from resfu_jax.cli.upsamplers import benchmark, upsamplers
from resfu_jax.cli.visualize import visualize

# They return None or the exit status. Wrong input is a ValueError or OSError, shown in one line.
COMMANDS: dict[str, Callable[..., int | None]] = {
    "train": train,
    "features": features,
    "predict": predict,
    "evaluate": evaluate,
    "probe": probe,
    "explain": explain,
    "visualize": visualize,
    "export": export,
    "serve": serve,
    "upsamplers": upsamplers,
    "benchmark": benchmark,
    "prepare": prepare,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; mistakes of the person at the keyboard end in a message, not a traceback.

    Args:
      argv: arguments; None takes those of the process.

    Returns:
      The exit status.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        with readers_may_leave():
            return _run(name, rest) or 0
    except (ValueError, OSError, RuntimeError) as error:
        # RuntimeError: a checkpoint that does not fit the model, or a device out of memory.
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(name: str, arguments: Sequence[str]) -> int | None:
    if name in ("-h", "--help"):
        return print(_overview())
    if name == "--version":
        return print(_versions())
    command = lookup("command", COMMANDS, name)
    if command is train:
        return train(arguments)
    return tyro.cli(command, prog=f"resfu {name}", args=arguments)


def _versions() -> str:
    """What a report of a bug needs, as far as it is known without starting JAX."""
    others = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return f"resfu_jax {resfu_jax.__version__}, {others}, {python}"


def _overview() -> str:
    lines = [f"  {name:12}{(f.__doc__ or '').splitlines()[0]}" for name, f in COMMANDS.items()]
    return "\n".join(
        [
            "usage: resfu COMMAND ... | resfu --version",
            "",
            "Feature upsampling and segmentation in JAX.",
            "",
            *lines,
            "",
            "resfu COMMAND --help has options and examples.",
        ]
    )
