"""`oxford_pet`: photographs of cats and dogs, with trimaps.

Parkhi et al.: Cats and dogs, CVPR 2012. Train on `trainval.txt` (3680 images), validate on
`test.txt` (3669). The three classes are those of the trimap: pet, background, and the border
between them (raw 1, 2, 3 become 0, 1, 2). To leave the border out, as some do, give it the class
weight 0 and read the IoU of the two others.

Some of the images are not what their name says: PNG, GIF or BMP files called .jpg, or in other
colours than RGB. They are converted to RGB PNG. An example that cannot be used at all is left out,
and a warning names it.
"""

import io
import logging

import numpy as np
from jaxtyping import Int16
from PIL import Image

from resfu_jax.data.info import DataError, DatasetInfo
from resfu_jax.data.raw import (
    RawBuilder,
    RawExample,
    RawFiles,
    RawPath,
    check_files,
    label_table,
    read_file,
)
from resfu_jax.images import ImageError, open_image

CLASS_NAMES = ("pet", "background", "border")
INFO = DatasetInfo(
    "oxford_pet",
    CLASS_NAMES,
    ((230, 120, 50), (50, 60, 80), (250, 240, 180)),
    examples=(3680, 3669),
    download="0.81 GB",
    terms="CC BY-SA 4.0; images belong to their owners",
)

_URL = "https://thor.robots.ox.ac.uk/~vgg/data/pets"


class OxfordPet(RawBuilder):
    """Oxford-IIIT Pet, trimaps; raw labels 1, 2, 3 are the classes 0, 1, 2."""

    TITLE = "Oxford-IIIT Pet"
    URLS = (f"{_URL}/images.tar.gz", f"{_URL}/annotations.tar.gz")
    # As recorded by TensorFlow Datasets, whose oxford_iiit_pet downloads the same files.
    SHA256 = {
        URLS[0]: (
            791918971,
            "67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d",
        ),
        URLS[1]: (
            19173078,
            "52425fb6de5c424942b7626b428656fcbd798db970a937df61750c0f1d358e91",
        ),
    }
    HOMEPAGE = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"""\
Fetch Oxford-IIIT Pet by hand:
{_URL}/images.tar.gz
{_URL}/annotations.tar.gz
Then run
    python -m resfu_jax.data prepare oxford_pet --manual-dir DIR
where DIR holds both archives, or their folders images and annotations."""

    @property
    def table(self) -> Int16[np.ndarray, "256"]:
        """One less."""
        return label_table({1: 0, 2: 1, 3: 2})

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """`trainval.txt` and `test.txt`."""
        images = files.find("images")
        trimaps = files.find("annotations", "annotations/trimaps")
        if images is None or trimaps is None:
            raise self.missing(files, f"folder {'images' if images is None else 'annotations'}")
        splits = {}
        for split, name in (("train", "trainval.txt"), ("validation", "test.txt")):
            listed = trimaps[0] / name
            if not listed.is_file():
                raise self.missing(files, f"list annotations/{name}")
            lines = read_file(listed).decode().splitlines()
            names = [line.split()[0] for line in lines if line.strip() and line[0] != "#"]
            splits[split] = [
                RawExample(name, images[0] / f"{name}.jpg", trimaps[1] / f"{name}.png")
                for name in names
            ]
            check_files([e.image for e in splits[split]], images[0], "image", f"of {split}")
            check_files([e.label for e in splits[split]], trimaps[1], "trimap", f"of {split}")
        return splits

    def read_image(self, data: bytes, path: RawPath) -> bytes:
        """RGB JPEG files as they are, others as RGB PNG."""
        try:
            image = open_image(data, f"the image {path}")
        except ImageError as error:
            raise DataError(str(error)) from error
        with Image.open(io.BytesIO(data)) as stored:
            if stored.format == "JPEG" and stored.mode == "RGB":
                return data
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    def _convert(self, files: tuple[RawExample, bytes, bytes]) -> tuple[str, dict | None]:
        try:
            return super()._convert(files)
        except DataError as error:
            logging.warning("leaving out %s: %s", files[0].id, error)
            return files[0].id, None
