"""The command `resfu`, also `python -m resfu_jax`."""

import sys

from resfu_jax._extras import MissingExtra, extra


def main() -> int:
    """Runs the command; without the extra that it needs, one line says so."""
    try:
        with extra("train"):
            from resfu_jax import cli

            return cli.main()
    except MissingExtra as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
