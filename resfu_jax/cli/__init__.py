"""The command `resfu`, also `python -m resfu_jax`: a function for each subcommand.

The functions' signatures and docstrings are the command line. Their modules import JAX only inside
the functions, so that `--help` is there at once.
"""

import sys
from collections.abc import Callable, Sequence

import tyro

from resfu_jax.cli.evaluate import evaluate
from resfu_jax.cli.predict import predict
from resfu_jax.cli.prepare import prepare
from resfu_jax.cli.upsamplers import benchmark, upsamplers

# Returns None or the exit status. Wrong input is a ValueError or OSError, shown in one line.
COMMANDS: dict[str, Callable[..., int | None]] = {
    "predict": predict,
    "evaluate": evaluate,
    "upsamplers": upsamplers,
    "benchmark": benchmark,
    "prepare": prepare,
}

_DESCRIPTION = """Feature upsampling and segmentation with resfu_jax. `resfu COMMAND --help` has \
examples. Training: python train.py --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; mistakes of the person at the keyboard end in a message, not a traceback.

    Args:
      argv: arguments; None takes those of the process.

    Returns:
      The exit status.
    """
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="resfu", description=_DESCRIPTION, args=argv
        )
        return status or 0
    except (ValueError, OSError, RuntimeError) as error:
        # RuntimeError: a checkpoint that does not fit the model, or a device out of memory.
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
