"""Reads archives of `numpy.savez`, of which nothing is unpickled."""

import math
import pathlib
import zipfile
import zlib

import numpy as np

from resfu_jax.convert._pickle import Stored
from resfu_jax.convert._state import shorten


def is_npz(path: pathlib.Path) -> bool:
    """Whether it is a zip archive of arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return False


def read_npz(path: pathlib.Path) -> dict[str, Stored]:
    """The arrays of an archive by name. Texts in it, which are remarks, are left out.

    Only headers are read, each array when it is used. Of arrays that are compressed, no more is
    unpacked than their shapes say, which are compared first.

    Raises:
      ValueError: damaged, or with Python objects in it.
    """
    archive = zipfile.ZipFile(path)
    entries = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        try:
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(file)
                size = file.tell() + math.prod(shape) * dtype.itemsize
                if not dtype.hasobject and size != member.file_size:
                    raise ValueError(f"it has {member.file_size} bytes, and its header says {size}")
        except _DAMAGE as error:
            raise ValueError(_damaged(path, name, error)) from error
        if dtype.hasobject:
            raise ValueError(
                f"{path} is not read: {shorten(name)!r} holds Python objects, which numpy.load "
                "would unpickle and so might execute. Save arrays of numbers alone"
            )
        if dtype.kind not in "US":
            entries[name] = _stored(path, archive, member, name, shape, dtype)
    return entries


def _stored(
    path: pathlib.Path,
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> Stored:
    def read() -> np.ndarray:
        try:
            with archive.open(member) as file:
                values = np.lib.format.read_array(file, allow_pickle=False)
                file.read()  # to the end, where the archive's own sum is compared
                return values
        except _DAMAGE as error:
            raise ValueError(_damaged(path, name, error)) from error

    return Stored(shape, dtype, read)


# A truncated or altered archive; RuntimeError: an encrypted one.
_DAMAGE = (
    *(ValueError, EOFError, OSError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)


def _damaged(path: pathlib.Path, name: str, error: Exception) -> str:
    return (
        f"{path} is damaged, or no archive of numpy.savez ({shorten(name)!r}: "
        f"{type(error).__name__}: {str(error)[:200]}); copy or download it again"
    )
