"""The server from a clone: `python examples/serve.py` is `resfu serve`."""

import sys

from resfu_jax.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
