"""Raw files of published datasets: finding them, also inside archives, and mapping their labels.

A raw file is a `pathlib.Path`, or a file in a zip or tar archive that is read in place.
"""

import functools
import gzip
import io
import itertools
import logging
import os
import posixpath
import stat
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from jaxtyping import Int16, Integer
from PIL import Image
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from resfu_jax import images
from resfu_jax._output import counted
from resfu_jax.data.info import DataError
from resfu_jax.data.transforms import different_sizes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")  # of the published datasets
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
# Images hardly compress further, so archives of them unpack to little more than their size. One may
# unpack to a GiB, or to 200 times its size, and a file in it may have half a GiB.
MAX_UNPACKED, MAX_RATIO, MAX_MEMBER = 1 << 30, 200, 1 << 29


class TarPath:
    """A file or folder in a tar archive, with the methods of `zipfile.Path` that are used here.

    A compressed archive is first decompressed into an unnamed temporary file ($TMPDIR), because
    reading its files in any order would decompress it over and over.
    """

    def __init__(self, archive: "_Tar", at: str = "") -> None:
        self._archive = archive
        self._at = at

    def __truediv__(self, other: str) -> "TarPath":
        return TarPath(self._archive, "/".join(filter(None, (self._at, other.strip("/")))))

    def __str__(self) -> str:
        return f"{self._archive.path}/{self._at}"

    @property
    def name(self) -> str:
        """Last part of the path."""
        return PurePosixPath(self._at).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self._at).stem

    @property
    def suffix(self) -> str:
        """The name's last suffix, with the dot."""
        return PurePosixPath(self._at).suffix

    def is_dir(self) -> bool:
        """Whether it is a folder of the archive."""
        return self._at in self._archive.folders

    def is_file(self) -> bool:
        """Whether it is a file of the archive."""
        if target := self._archive.links.get(self._at):
            raise DataError(f"{self} is a link to {target}, which is not a file of the archive.")
        return self._at in self._archive.files

    def iterdir(self) -> Iterator["TarPath"]:
        """What is in the folder."""
        return (self / name for name in self._archive.folders[self._at])

    def read_bytes(self) -> bytes:
        """Content of the file."""
        offset, size = self._archive.files[self._at]
        _check_member(self, size)
        self._archive.file.seek(offset)
        data = self._archive.file.read(size)
        if len(data) < size:
            raise EOFError("the archive ends in this file")
        return data


class _Tar:
    """Where the files of an archive begin and end: one pass over it finds them all.

    Attributes:
      path: the archive.
      file: its content, decompressed.
      files: of each file of the archive, where its content begins and how long it is.
      folders: of each folder, the names of what is in it.
      links: of each link that leads to none of the files, what it leads to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        self.file = tempfile.TemporaryFile() if compressed else path.open("rb")
        weakref.finalize(self, self.file.close)
        if compressed:
            self._decompress()
        self.files: dict[str, tuple[int, int]] = {}
        self.folders: dict[str, dict[str, None]] = {"": {}}
        self.links: dict[str, str] = {}
        with tarfile.open(fileobj=self.file, mode="r:") as archive:
            for member in archive:
                at = member.name.removeprefix("./").strip("/")
                _check_name(path, member.name)
                if member.isfile():
                    self.files[at] = (member.offset_data, member.size)
                elif member.islnk() or member.issym():
                    # A hard link's target is a path of the archive, a symbolic one's is relative.
                    base = "" if member.islnk() else posixpath.dirname(at)
                    self.links[at] = posixpath.normpath(posixpath.join(base, member.linkname))
                elif not member.isdir() or at in ("", "."):
                    continue
                else:
                    self.folders.setdefault(at, {})
                while at:
                    parent, _, name = at.rpartition("/")
                    self.folders.setdefault(parent, {})[name] = None
                    at = parent
        for at, target in list(self.links.items()):
            if target in self.files:
                self.files[at] = self.files[target]
                del self.links[at]

    def _decompress(self) -> None:
        limit = max(MAX_UNPACKED, MAX_RATIO * self.path.stat().st_size)
        with gzip.open(self.path) as content:
            while chunk := content.read(1 << 20):
                if self.file.tell() + len(chunk) > limit:
                    raise DataError(
                        f"{self.path} unpacks to more than {limit} bytes, {MAX_RATIO} times its "
                        "size: this is no archive of images. If you trust it, unpack it yourself "
                        "and give the folder."
                    )
                try:
                    self.file.write(chunk)
                except OSError as error:
                    raise OSError(
                        f"{self.path} cannot be decompressed into {tempfile.gettempdir()} "
                        f"({error.strerror}); choose another folder with $TMPDIR."
                    ) from error
        self.file.seek(0)


def _check_name(archive: Path, name: str) -> None:
    """A path in an archive stays in it."""
    if ".." in name.replace("\\", "/").split("/") or name.startswith(("/", "\\")):
        raise DataError(
            f"{archive} holds the path {name!r}, which leads out of it: this is no archive of the "
            "dataset. Download it again, from its publisher."
        )


def _check_member(path: "RawPath", size: int) -> None:
    if size > MAX_MEMBER:
        raise DataError(f"{path} has {size} bytes; no raw file has more than {MAX_MEMBER}.")


def _open_zip(path: Path) -> zipfile.Path:
    archive = zipfile.ZipFile(path)
    limit = max(MAX_UNPACKED, MAX_RATIO * path.stat().st_size)
    members = archive.infolist()
    for member in members:
        _check_name(path, member.filename)
        if member.flag_bits & 1:
            raise DataError(
                f"{path} is encrypted ({member.filename} needs a password): unpack it yourself, "
                "and give the folder."
            )
    total = sum(member.file_size for member in members)
    if total > limit:
        raise DataError(
            f"{path} unpacks to {total} bytes, more than {MAX_RATIO} times its size: this is no "
            "archive of images. If you trust it, unpack it yourself and give the folder."
        )
    return zipfile.Path(archive)


def read_file(path: "RawPath") -> bytes:
    """Content of a raw file.

    Raises:
      DataError: it cannot be read out of its archive, or is not a plain file there.
      OSError: it cannot be read from the disk.
    """
    if isinstance(path, Path):
        return path.read_bytes()
    try:
        if isinstance(path, zipfile.Path):
            member = path.root.getinfo(path.at)
            _check_member(path, member.file_size)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(f"{path} is a symbolic link; links in archives are not followed.")
        return path.read_bytes()
    except DataError:
        raise
    # Damaged content, a damaged checksum, a kind of compression that Python does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read ({error}); download the archive again.") from error


RawPath = Path | zipfile.Path | TarPath


def open_archive(path: Path) -> RawPath:
    """The top folder of a zip or tar archive.

    Raises:
      DataError: the file is neither, is damaged, encrypted, leads out of itself, or unpacks to
        more than `MAX_RATIO` times its size.
    """
    try:
        if zipfile.is_zipfile(path):
            return _open_zip(path)
        return TarPath(_Tar(path))
    except (
        *(tarfile.TarError, zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError),
        *(EOFError, gzip.BadGzipFile, zlib.error),
    ) as error:
        raise DataError(
            f"{path} cannot be read as an archive ({error}); download it again."
        ) from error


class RawFiles:
    """Folders and archives in which the raw files of a dataset are looked for.

    Looked at are a root, its folders, the archives in it and the folders in those.

    Args:
      roots: folders, or archives from `open_archive`.
    """

    def __init__(self, roots: Iterable[RawPath]) -> None:
        self.roots = list(roots)

    @functools.cached_property
    def _bases(self) -> list[RawPath]:
        bases: list[RawPath] = []
        for root in self.roots:
            children = visible(root)
            bases += [root, *(child for child in children if child.is_dir())]
            for child in children:
                if isinstance(child, Path) and child.name.lower().endswith(_ARCHIVE_SUFFIXES):
                    archive = open_archive(child)
                    bases += [archive, *(c for c in visible(archive) if c.is_dir())]
        return bases

    def __str__(self) -> str:
        return " and ".join(map(str, self.roots))

    def find(
        self, *folders: str, below: Sequence[str] = (), suffix: str = ""
    ) -> list[RawPath] | None:
        """Folders that lie in one place, or None.

        Args:
          folders: their paths; `""` is the place itself.
          below: folders that they may lie below, beside the places that are always looked at.
          suffix: the first file of each has to have it.
        """
        for base in self._bases:
            for prefix in ("", *below):
                found = [base / f"{prefix}/{folder}".strip("/") for folder in folders]
                if all(folder.is_dir() and _holds(folder, suffix) for folder in found):
                    return found
        return None


def _holds(folder: RawPath, suffix: str) -> bool:
    if not suffix:
        return True
    first = next((c for c in folder.iterdir() if not c.name.startswith(".")), None)
    return first is not None and first.name.endswith(suffix)


def visible(folder: RawPath) -> list[RawPath]:
    """Children in alphabetical order, without hidden ones and what macOS adds to archives."""
    children = (c for c in folder.iterdir() if not c.name.startswith((".", "__MACOSX")))
    return sorted(children, key=lambda child: child.name)


class RawExample(NamedTuple):
    """The files of one example; without a label map, none of its pixels has a class."""

    id: str
    image: RawPath
    label: RawPath | None


def pair_files(
    images: RawPath, labels: RawPath, *, image_end: str = "", label_end: str = ".png"
) -> list[RawExample]:
    """Examples of a folder of images and one of label maps.

    Args:
      images: folder of images; files with other suffixes than `IMAGE_SUFFIXES` are ignored.
      labels: folder of label maps.
      image_end: what follows the id in the names of images, before the suffix; files without
        it are ignored.
      label_end: what follows the id in the names of label maps, with the suffix.

    Raises:
      FileNotFoundError: images without a label map; names the first five.
    """
    found = [path for path in visible(images) if path.suffix.lower() in IMAGE_SUFFIXES]
    ids = [path.stem.removesuffix(image_end) for path in found if path.stem.endswith(image_end)]
    found = [path for path in found if path.stem.endswith(image_end)]
    examples = [
        RawExample(example_id, image, labels / f"{example_id}{label_end}")
        for example_id, image in zip(ids, found, strict=True)
    ]
    paths = [e.label for e in examples if e.label is not None]
    check_files(paths, labels, "label map", f"of images in {images}")
    return examples


def check_files(paths: Sequence[RawPath], folder: object, what: str, of: str) -> None:
    """Raises a FileNotFoundError with the number and five names of files that a folder lacks.

    Args:
      paths: files that have to be there.
      folder: where they should be.
      what: one of them.
      of: whose they are.
    """
    if missing := [path.name for path in paths if not path.is_file()]:
        more = ", ..." if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"{folder} lacks {counted(len(missing), what)} {of}: {', '.join(missing[:5])}{more}"
        )


# ------------------------------------------------------------------------------------------ labels
def label_table(classes: Mapping[int, int], default: int = -1) -> Int16[np.ndarray, "256"]:
    """A table of 256 entries: raw label to class; -1 marks raw labels that must not occur."""
    table = np.full(256, default, np.int16)
    table[list(classes)] = list(classes.values())
    return table


def decode_label(data: bytes, path: RawPath) -> Integer[np.ndarray, "h w"]:
    """Raw labels of an encoded single-channel image; of a palette image the indices."""
    try:
        return images.read_label(data, f"the label map {path}")
    except images.ImageError as error:
        raise DataError(str(error)) from error


def map_label(
    raw: Integer[np.ndarray, "h w"], table: Int16[np.ndarray, "256"], path: RawPath, name: str
) -> Integer[np.ndarray, "h w"]:
    """Classes of raw labels; a raw label that the table does not allow is a `DataError`."""
    classes = table[raw]
    if classes.min() < 0:
        raise DataError(
            f"{path} holds the label {raw[classes < 0].min()}; those of {name} are "
            f"{_ranges(np.flatnonzero(table >= 0))}."
        )
    return classes.astype(np.uint8)


def _ranges(values: np.ndarray) -> str:
    """0, 1, ..., 20, 255 as "0 to 20 and 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts[:-1]) + (" and " if texts[1:] else "") + texts[-1]


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Distinct colours by the rule of Pascal VOC: the bits of the index, dealt to R, G, B."""
    return tuple(
        tuple(
            sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
            for channel in range(3)
        )
        for index in range(count)
    )


# ----------------------------------------------------------------------------------------- builder
class OwnConfigs:
    """Mixin of builders whose configurations have names that their users choose."""

    def __init__(self, **kwargs: object) -> None:
        verbosity = absl_logging.get_verbosity()
        absl_logging.set_verbosity(absl_logging.ERROR)  # tfds would warn of every unknown NAME
        try:
            super().__init__(**kwargs)
        finally:
            absl_logging.set_verbosity(verbosity)


def depth_features(builder: tfds.core.GeneratorBasedBuilder) -> tfds.core.DatasetInfo:
    """What tfds has to know of a dataset of images and depth maps."""
    return tfds.core.DatasetInfo(
        builder=builder,
        description=builder.__doc__,
        metadata=tfds.core.MetadataDict(),
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.Image(
                    shape=(None, None, 1), dtype=np.uint16, encoding_format="png"
                ),
                "id": tfds.features.Text(),
            }
        ),
    )


class RawBuilder(tfds.core.GeneratorBasedBuilder):
    """Base of the builders that convert raw files.

    A subclass says where its files are (`find_examples`) and what its raw labels mean (`table`).

    Attributes:
      TITLE: name of the dataset in messages.
      URLS: archives to download when there is no manual folder; none if that needs a login.
      SHA256: (bytes, SHA-256) of archives of which it is known; a download is compared.
      HOMEPAGE: page of the dataset.
    """

    VERSION = tfds.core.Version("1.0.0")
    TITLE: str
    URLS: tuple[str, ...] = ()
    SHA256: Mapping[str, tuple[int, str]] = {}
    HOMEPAGE: str | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        # tfds has a registry of its own, with other datasets of the same names.
        super().__init_subclass__(skip_registration=True, **kwargs)
        cls.url_infos = {url: UrlInfo(*known, None) for url, known in cls.SHA256.items()}

    @property
    def table(self) -> Int16[np.ndarray, "256"]:
        """Raw label to class, from `label_table`."""
        raise NotImplementedError

    @property
    def urls(self) -> tuple[str, ...]:
        """What to download for the chosen configuration."""
        return self.URLS

    def find_examples(self, files: RawFiles) -> dict[str, list[RawExample]]:
        """The examples of `"train"` and `"validation"`."""
        raise NotImplementedError

    def read_image(self, data: bytes, path: RawPath) -> bytes:
        """The image file to store."""
        return data

    def read_label(self, data: bytes, path: RawPath) -> Integer[np.ndarray, "h w"]:
        """Raw labels of a label file."""
        return decode_label(data, path)

    def missing(self, files: RawFiles, what: str) -> FileNotFoundError:
        """The error to raise if `find_examples` does not find something."""
        return FileNotFoundError(
            f"{files} does not hold {self.TITLE}'s raw files: no {what}.\n"
            f"{self.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage=self.HOMEPAGE,
            metadata=tfds.core.MetadataDict(),  # filled by _count
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict]]]:
        try:
            files = RawFiles([Path(dl_manager.manual_dir)])
        except AssertionError:  # tfds: no manual folder, or nothing in it
            files = RawFiles(self._download(dl_manager))
        splits = self.find_examples(files)
        for split, examples in splits.items():
            if not examples:
                raise DataError(f"{self.name}: {files} holds no image of the {split} split.")
        self._counting, self._pixels = threading.Lock(), np.zeros(256, np.int64)
        generators = [self._generate_examples(examples) for examples in splits.values()]
        # tfds writes the splits one after the other, and what _count notes after the last.
        generators[-1] = itertools.chain(generators[-1], self._count())
        return dict(zip(splits, generators, strict=True))

    def _count(self) -> Iterator[tuple[str, dict]]:
        """Notes how many pixels every label has; no further examples."""
        self.info.metadata["pixels"] = self._pixels.tolist()
        yield from ()

    def _download(self, dl_manager: tfds.download.DownloadManager) -> list[RawPath]:
        """Fetches the archives, after a quick look whether the network is there."""
        if not self.urls:
            raise FileNotFoundError(
                f"{self.TITLE} is not downloaded for you.\n{self.MANUAL_DOWNLOAD_INSTRUCTIONS}"
            )
        archives = []
        for url in map(self._reachable, self.urls):
            if url.startswith("http:") and url not in self.SHA256:
                logging.warning(
                    "%s: nothing protects this transfer: the server has no https, and no checksum "
                    "of the file is known.",
                    url,
                )
            try:
                path = Path(dl_manager.download(url))
            except NonMatchingChecksumError as error:
                raise DataError(
                    f"What was downloaded from {url} is not the file that was published: its size "
                    f"or SHA-256 differs.\n{error}\nDelete it, and try again; if it happens "
                    "again, somebody changed the file, on the server or on the way."
                ) from error
            archives.append(open_archive(path))  # in place: tfds would need TensorFlow to unpack
        return archives

    def _reachable(self, url: str) -> str:
        """The address to download from: over https where that answers or nothing else protects.

        tfds alone would retry for minutes before it says that there is no network.
        """
        secure = url.replace("http:", "https:", 1)
        for address in dict.fromkeys([url] if url in self.SHA256 else [secure, url]):
            try:
                request = urllib.request.Request(address, method="HEAD")
                urllib.request.urlopen(request, timeout=10).close()
            except OSError as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
            else:
                return address
        raise ConnectionError(
            f"Cannot download {url} ({reason}).\n{self.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )

    def _generate_examples(self, examples: Sequence[RawExample]) -> Iterator[tuple[str, dict]]:
        workers = os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:  # PIL leaves Python's lock while it works
            for start in range(0, len(examples), 4 * workers):
                chunk = examples[start : start + 4 * workers]
                files = [
                    (e, read_file(e.image), None if e.label is None else read_file(e.label))
                    for e in chunk
                ]
                for example_id, converted in pool.map(self._convert, files):
                    if converted is not None:
                        yield example_id, converted

    def _convert(self, files: tuple[RawExample, bytes, bytes | None]) -> tuple[str, dict | None]:
        """The features of an example; None leaves it out."""
        example, image, label = files
        image = self.read_image(image, example.image)
        try:
            # All of it: a file that is cut short looks well until its end.
            size = images.open_image(image, f"the image {example.image}").size
        except images.ImageError as error:
            raise DataError(str(error)) from error
        label_size, stored = self._stored_label(example, label, size)
        if size != label_size:
            raise DataError(
                f"{example.image} and {example.label} {different_sizes(image, size, label_size)}"
            )
        return example.id, {"image": image, "label": stored, "id": example.id}

    def _stored_label(
        self, example: RawExample, label: bytes | None, size: tuple[int, int]
    ) -> tuple[tuple[int, int], bytes]:
        """Size (width, height) and content of the label file to store for an image of `size`."""
        if label is None or example.label is None:
            classes = np.full(size[::-1], 255, np.uint8)
        else:
            raw = self.read_label(label, example.label)
            classes = map_label(raw, self.table, example.label, self.TITLE)
        with self._counting:
            self._pixels += np.bincount(classes.ravel(), minlength=256)
        buffer = io.BytesIO()
        Image.fromarray(classes).save(buffer, "PNG")
        return classes.shape[::-1], buffer.getvalue()
