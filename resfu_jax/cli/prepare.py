"""`resfu prepare`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Own:
    """Your own images (image_folder/NAME)."""

    images: Path | None = None
    """Folder of the images."""
    labels: Path | None = None
    """Folder of their label maps, PNG files of the same names."""
    validation_images: Path | None = None
    """Folder of the images for validation; else subfolders train and validation of the others, or
    a fifth of them, chosen by their names."""
    validation_labels: Path | None = None
    """Folder of their label maps."""
    classes: tuple[str, ...] = ()
    """A file of lines `name`, `name, R, G, B` or `NUMBER = name`, or JSON; or such lines. Else what
    the label maps hold, after a question."""
    ignore_label: int | None = None
    """Number of pixels that do not count; else 255."""
    ignore_exif: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave images as they are stored, not turned as their EXIF data say."""
    yes: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take the classes that the label maps hold."""


@dataclass(frozen=True)
class OwnDepth:
    """Your own depth maps (depth_folder/NAME, with --images)."""

    depth: Path | None = None
    """Folder of the depth maps: PNG, TIFF, .npy or .npz files of the same names."""
    validation_depth: Path | None = None
    """Folder of the depth maps of --validation-images."""
    scale: float | None = None
    """Metres that the number 1 stands for; else 0.001."""
    invalid: float | None = None
    """Number that says that nothing is known; else 0."""


@dataclass(frozen=True)
class OwnMattes:
    """Your own mattes (matting_folder/NAME)."""

    foregrounds: Path | None = None
    """Folder of foregrounds."""
    alphas: Path | None = None
    """Folder of their alpha mattes, images of the same names."""
    backgrounds: Path | None = None
    """Folder of images to compose them over."""
    trimaps: Path | None = None
    """Folder of trimaps for validation; else they are drawn from alpha."""
    trimap_width: int | None = None
    """Of those, the diameter in pixels by which known regions are eroded; else 25."""


def prepare(
    name: tyro.conf.Positional[str | None] = None,
    *,
    data_dir: Path | None = None,
    manual_dir: Path | None = None,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
    own: Annotated[Own, tyro.conf.arg(name="")] = Own(),  # noqa: B008 - frozen
    depth: Annotated[OwnDepth, tyro.conf.arg(name="")] = OwnDepth(),  # noqa: B008 - frozen
    mattes: Annotated[OwnMattes, tyro.conf.arg(name="")] = OwnMattes(),  # noqa: B008 - frozen
) -> None:
    """Prepares a dataset for training and evaluation; without a name, lists them.

    resfu prepare

    resfu prepare camvid

    resfu prepare image_folder/mine --images photos --labels masks

    resfu prepare depth_folder/mine --images photos --depth depths --scale 0.001

    resfu prepare matting_folder/mine --foregrounds fg --alphas alpha --backgrounds photos

    The same as `python -m resfu_jax.data`.

    Args:
      name: of the dataset, or image_folder/NAME for your own images, depth_folder/NAME for your own
        depth maps, matting_folder/NAME for your own mattes.
      data_dir: where datasets are kept.
      manual_dir: folder of raw files that were fetched by hand.
      overwrite: build anew, and replace what is prepared.
      own: your own images.
      depth: your own depth maps.
      mattes: your own mattes.
    """
    from resfu_jax.data.__main__ import main

    argv = [] if data_dir is None else ["--data-dir", str(data_dir)]
    if name is None:
        main([*argv, "list"])
        return
    argv += ["prepare", name]
    options = dict(manual_dir=manual_dir, overwrite=overwrite)
    for group in (own, depth, mattes):
        options |= asdict(group)
    for option, value in options.items():
        if value is None or value is False or value == ():
            continue
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        argv += [f"--{option.replace('_', '-')}", *map(str, values)]
    main(argv)
