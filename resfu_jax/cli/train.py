"""`resfu train`."""

import ast
import inspect
import pathlib
import runpy
import sys
from collections.abc import Sequence


def train(arguments: Sequence[str]) -> None:
    """Trains or evaluates a model: train.py, with all of its flags.

    resfu train --config my_config.py --workdir runs/mine

    resfu train --config my_config.py --workdir runs/mine --mode eval
    """
    # The same file: a clone has it at its top, and a link here; a wheel has it here.
    script = pathlib.Path(__file__).parents[1] / "train.py"
    if {"-h", "--help"} & set(arguments):
        print("usage: resfu train --config FILE --workdir DIR [--config.FIELD=VALUE ...]\n")
        print(f"{inspect.getdoc(train)}\n\n{ast.get_docstring(ast.parse(script.read_text()))}\n")
        print("resfu train --helpshort lists the flags; resfu_jax/training/config.py the fields.")
        sys.exit(0)
    sys.argv[1:] = arguments
    runpy.run_module("resfu_jax.train", run_name="__main__", alter_sys=True)
