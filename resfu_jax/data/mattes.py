"""Datasets of alpha mattes: the builder that they share, and Composition-1K.

`composition_1k` is the dataset of Xu et al., "Deep Image Matting", CVPR 2017: 431 foregrounds for
training, composed on the fly over any backgrounds (COCO's, as a rule), and 1000 composed images of
50 others for validation, with trimaps. It is to be had from its authors on request.
"""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from resfu_jax import images
from resfu_jax.data.composition import Layer, check_same_size, check_trimap, has_edge
from resfu_jax.data.info import DataError, DatasetInfo
from resfu_jax.data.raw import RawFiles, RawPath, check_files, read_file, visible

INFO = DatasetInfo(
    "composition_1k",
    mattes=True,
    examples=(431, 1000),
    download="on request",
    terms="Adobe's licence, not commercial",
)


class MatteFiles(NamedTuple):
    """The files of one example; of a background, the image alone."""

    id: str
    image: RawPath
    alpha: RawPath | None = None
    trimap: RawPath | None = None


class MattingBuilder(tfds.core.GeneratorBasedBuilder):
    """Base of the builders of mattes: splits "train", "background" and "validation".

    A subclass says in `_split_generators` what they hold, as `MatteFiles` or encoded examples.

    Attributes:
      SPLITS: what `open_source` opens.
    """

    VERSION = tfds.core.Version("1.0.0")
    SPLITS = ("train", "background", "validation")

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(skip_registration=True, **kwargs)  # as `RawBuilder`

    def _info(self) -> tfds.core.DatasetInfo:
        def image(channels: int) -> tfds.features.Image:
            return tfds.features.Image(shape=(None, None, channels))

        features = dict(image=image(3), alpha=image(1), trimap=image(1), id=tfds.features.Text())
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
        )

    def _generate_examples(self, examples: Sequence[MatteFiles]) -> Iterator[tuple[str, dict]]:
        workers = os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:  # PIL leaves Python's lock while it works
            for start in range(0, len(examples), 4 * workers):
                chunk = examples[start : start + 4 * workers]
                yield from zip([e.id for e in chunk], pool.map(encoded, chunk), strict=True)


def encoded(files: MatteFiles) -> dict[str, bytes | str]:
    """What is stored of an example.

    Raises:
      DataError: a file that is no image, an alpha matte or a trimap of another size than the image,
        a matte without an edge, a trimap without unknown pixels.
    """
    data = read_file(files.image)
    stored: dict[str, bytes | str] = dict(image=data, alpha=b"", trimap=b"", id=files.id)
    try:
        if files.alpha is None:
            images.image_size(data, f"the background {files.image}")
            return stored
        colours = images.open_image(data, f"the image {files.image}", orientation=False)
        for name, path in (("alpha", files.alpha), ("trimap", files.trimap)):
            if path is None:
                continue
            matte = read_grey(path, f"the {name} matte" if name == "alpha" else f"the {name}")
            check_same_size(colours, matte, str(path))
            if name == "trimap":
                check_trimap(np.asarray(matte), str(path))
            elif not has_edge(np.asarray(matte)):
                raise DataError(f"{path} is {matte.getpixel((0, 0))} everywhere: it has no edge.")
            stored[name] = png(matte)
    except images.ImageError as error:
        raise DataError(str(error)) from error
    return stored


def read_layer_files(files: MatteFiles) -> Layer:
    """Foreground and alpha of an example; errors as for `encoded`."""
    stored = encoded(files)
    pictures = [
        Image.open(io.BytesIO(data))
        for data in (stored["image"], stored["alpha"])
        if isinstance(data, bytes)
    ]
    return Layer(pictures[0].convert("RGB"), pictures[1])


def read_grey(path: RawPath, what: str) -> Image.Image:
    """A matte or trimap of any kind of file, mode L."""
    return images.open_image(read_file(path), f"{what} {path}", orientation=False).getchannel(0)


def png(picture: Image.Image | np.ndarray) -> bytes:
    """Its file."""
    buffer = io.BytesIO()
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def pictures_in(folder: RawPath) -> dict[str, RawPath]:
    """The images of a folder by their names without suffix, in order."""
    found = (path for path in visible(folder) if path.suffix.lower() in images.SUFFIXES)
    return {path.stem: path for path in found}


def pair_mattes(folder: RawPath, mattes: RawPath, what: str, *, both: bool = False) -> list[str]:
    """Names of images that have a matte; a `FileNotFoundError` names those that lack it.

    Args:
      folder: of the images.
      mattes: of mattes or trimaps of the same names.
      what: one of them, for the message.
      both: every matte needs an image, too.
    """
    names, others = pictures_in(folder), pictures_in(mattes)
    check_files(
        [mattes / f"{name}.png" for name in names if name not in others],
        mattes,
        what,
        f"of images in {folder}",
    )
    if both:
        lacking = [folder / f"{name}.png" for name in others if name not in names]
        check_files(lacking, folder, "foreground", f"of {what}s in {mattes}")
    return list(names)


class Composition1k(MattingBuilder):
    """Composition-1K: foregrounds with alpha mattes, and composed images for validation."""

    name = "composition_1k"
    TITLE = "Composition-1K"
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
Ask the authors of Deep Image Matting for the dataset, make the test images with its composition
script, and put backgrounds for training (COCO's train2014) beside them:
    DIR/Training_set/fg, DIR/Training_set/alpha
    DIR/Test_set/merged, DIR/Test_set/trimaps      NAME_0.png, NAME_1.png, ...
    DIR/Test_set/alpha                             NAME.png
    DIR/bg
fg, alpha and trimaps may lie in folders "Adobe-licensed images" and "Other" of the sets. Then run
    python -m resfu_jax.data prepare composition_1k --manual-dir DIR"""

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict]]]:
        try:
            files = RawFiles([Path(dl_manager.manual_dir)])
        except AssertionError as error:  # tfds: no manual folder, or nothing in it
            raise FileNotFoundError(
                f"{self.TITLE} is not downloaded for you.\n{self.MANUAL_DOWNLOAD_INSTRUCTIONS}"
            ) from error
        return {
            "train": self._generate_examples(list(self._train(files))),
            "background": self._generate_examples(self._backgrounds(files)),
            "validation": self._generate_examples(self._validation(files)),
        }

    def _missing(self, files: RawFiles, what: str) -> FileNotFoundError:
        return FileNotFoundError(
            f"{files} does not hold {self.TITLE}'s raw files: no {what}.\n"
            f"{self.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )

    def _places(self, files: RawFiles, part: str, *names: str) -> list[list[RawPath]]:
        subfolders = ("", "Adobe-licensed images/", "Other/")
        found = (files.find(*(f"{part}/{sub}{name}" for name in names)) for sub in subfolders)
        return [place for place in found if place is not None]

    def _train(self, files: RawFiles) -> Iterable[MatteFiles]:
        places = self._places(files, "Training_set", "fg", "alpha")
        if not places:
            raise self._missing(files, "folders Training_set/fg and Training_set/alpha")
        for fg, alpha in places:
            colours, mattes = pictures_in(fg), pictures_in(alpha)
            for name in pair_mattes(fg, alpha, "alpha matte", both=True):
                yield MatteFiles(name, colours[name], mattes[name])

    def _backgrounds(self, files: RawFiles) -> list[MatteFiles]:
        for name in ("bg", "Training_set/bg", "train2014"):
            if (found := files.find(name)) is not None:
                pictures = pictures_in(found[0])
                return [MatteFiles(key, path) for key, path in pictures.items()]
        raise self._missing(files, "folder bg")

    def _validation(self, files: RawFiles) -> list[MatteFiles]:
        merged = files.find("Test_set/merged")
        if merged is None:
            raise self._missing(files, "folder Test_set/merged")
        pictures = pictures_in(merged[0])
        places = self._places(files, "Test_set", "alpha", "trimaps")
        if not places:
            raise self._missing(files, "folders Test_set/alpha and Test_set/trimaps")
        alphas, trimaps = (
            {name: path for place in places for name, path in pictures_in(place[i]).items()}
            for i in (0, 1)
        )
        examples = []
        for name, image in pictures.items():
            own = name if name in alphas else name.rpartition("_")[0]
            for found, key, what, at in (
                (alphas, own, "alpha matte", 0),
                (trimaps, name, "trimap", 1),
            ):
                folder = places[0][at]
                lacking = [] if key in found else [folder / f"{key}.png"]
                check_files(lacking, folder, what, f"of images in {merged[0]}")
            examples.append(MatteFiles(name, image, alphas[own], trimaps[name]))
        return examples
