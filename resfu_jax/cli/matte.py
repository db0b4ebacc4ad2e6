"""`resfu matte`."""

from pathlib import Path
from typing import Literal

import tyro

from resfu_jax._files import local_path
from resfu_jax.cli._run import start_jax


def matte(
    image: tyro.conf.Positional[Path],
    *,
    trimap: Path,
    checkpoint: Path,
    which: str = "best",
    out: Path = Path("mattes"),
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Mattes a photo with a trained model: its alpha, and the cut-out.

    resfu matte photo.jpg --trimap trimap.png --checkpoint runs/matting_fade --out mattes

    Writes OUT/NAME_alpha.png, one channel, 255 where the foreground is opaque, and
    OUT/NAME_cutout.png, the photo with that as its alpha channel.

    Args:
      image: the photo.
      trimap: of its size: 0 for background, 128 for unknown, 255 for foreground.
      checkpoint: workdir of a run with task "matting", or one checkpoint in it.
      which: checkpoint: best (by SAD), latest, or a step.
      out: folder of the results.
      dtype: compute type; that of the run by default.
    """
    start_jax()
    import numpy as np
    from PIL import Image

    from resfu_jax.images import read_image
    from resfu_jax.matting import MattingPipeline

    out = local_path(out, "--out")
    run = local_path(checkpoint, "--checkpoint")
    pixels = read_image(image)
    alpha = MattingPipeline.from_checkpoint(run, which, dtype=dtype)(pixels, str(trimap))
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(alpha).save(out / f"{image.stem}_alpha.png")
    cutout = np.dstack([pixels, alpha])
    Image.fromarray(cutout).save(out / f"{image.stem}_cutout.png")
    print(f"{image}: {pixels.shape[1]}x{pixels.shape[0]}, alpha and cut-out in {out}")
