"""`python -m resfu_jax` is the command `resfu`."""

import sys

from resfu_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
