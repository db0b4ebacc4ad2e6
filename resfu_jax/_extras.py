"""Libraries that `pip install resfu_jax` alone does not bring."""

import contextlib
from collections.abc import Iterator


class MissingExtra(ModuleNotFoundError):
    """A library of an extra is not installed. The message says how to install it."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of libraries of an extra: one that is missing names the extra.

    Args:
      name: of the extra, as in pyproject.toml.

    Raises:
      MissingExtra: a library is not installed.
    """
    try:
        yield
    except MissingExtra:
        raise
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        if library == "resfu_jax":  # a mistake of ours, which no installation mends
            raise
        raise MissingExtra(
            f"{library} is not installed: pip install 'resfu_jax[{name}]'", name=error.name
        ) from error
