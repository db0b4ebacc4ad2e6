"""`resfu serve`."""

from pathlib import Path

from resfu_jax._files import local_path
from resfu_jax.cli._run import start_jax


def serve(
    *, model: Path, host: str = "127.0.0.1", port: int = 8000, multiple: int | None = None
) -> None:
    """Answers photos with their labels over HTTP, and has a page to try that with.

    resfu serve --model camvid.zip

    resfu serve --model camvid.zip --host 0.0.0.0

    Then open http://localhost:8000; the second also answers other machines, such as a telephone.
    docs/export.md has the limits.

    Args:
      model: a file of `resfu export`.
      host: address to listen at.
      port: its port; 0 is any that is free.
      multiple: pads sides to multiples of it: fewer shapes to compile.
    """
    model = local_path(model, "--model")
    start_jax()
    from resfu_jax import server

    server.serve(model, host, port, multiple)
