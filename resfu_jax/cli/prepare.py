"""`resfu prepare`."""

from pathlib import Path

import tyro


def prepare(
    name: tyro.conf.Positional[str | None] = None,
    *,
    data_dir: Path | None = None,
    manual_dir: Path | None = None,
) -> None:
    """Prepares a dataset for training and evaluation; without a name, lists them.

    resfu prepare

    resfu prepare camvid

    resfu prepare image_folder/mine --manual-dir my_images

    The same as `python -m resfu_jax.data`.

    Args:
      name: of the dataset, or image_folder/NAME for your own images.
      data_dir: where datasets are kept.
      manual_dir: folder of raw files that were fetched by hand.
    """
    from resfu_jax.data.__main__ import main

    argv = [] if data_dir is None else ["--data-dir", str(data_dir)]
    if name is None:
        main([*argv, "list"])
    else:
        manual = [] if manual_dir is None else ["--manual-dir", str(manual_dir)]
        main([*argv, "prepare", name, *manual])
