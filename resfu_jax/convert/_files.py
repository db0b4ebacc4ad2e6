"""Files of weights: where they are, and what is in them."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import safetensors

from resfu_jax._output import counted
from resfu_jax.convert._download import DamagedDownload, download
from resfu_jax.convert._npz import is_npz, read_npz
from resfu_jax.convert._pickle import DTYPES, Stored, read_torch
from resfu_jax.convert._state import shorten
from resfu_jax.serving import META, WEIGHTS

_SUFFIXES = (".safetensors", ".json", ".bin", ".pth", ".pt", ".ckpt", ".pkl", ".tar", ".npz")
_FILES = (  # of a folder or repository, the first that is there
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_REPOSITORY = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?"
)
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_weights(path_or_repo: str | os.PathLike[str]) -> Any:
    """What is in a file of weights: its entries by name, or dictionaries of them.

    Tensors are read from the file when they are used.

    Args:
      path_or_repo: a `.safetensors` file; a `.pth`, `.pt`, `.bin` or `.ckpt` file of `torch.save`,
        of which nothing is executed; an `.npz` file of arrays; an index of shards,
        `model.safetensors.index.json`; a folder with `model.safetensors` or its index, or
        `pytorch_model.bin` or its index; a repository of the Hugging Face hub, `"owner/name"`,
        `"owner/name@revision"`, `"owner/name:file"` or `"owner/name@revision:file"`; or the address
        of a file, `"https://..."`; or a file of `resfu_jax.export`. `~` is the home folder. What a
        file is, its content says.

    Raises:
      FileNotFoundError: no such file, or it could not be fetched; the error says what to do.
      ValueError: a file in another format, damaged, or with a shard missing.
    """
    return _read(find_weights(path_or_repo))


# ------------------------------------------------------------------------------------------ reading
def _read(path: pathlib.Path) -> Any:
    if path.name.endswith(".index.json"):
        return _shards(path)
    try:
        with path.open("rb") as file:
            head = file.read(300)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if head[8:9] == b"{":
        return _safetensors(path)
    if head.startswith(b"PK") and is_npz(path):
        return read_npz(path)
    if head.startswith(b"PK") and (weights := _exported(path)) is not None:
        return weights
    if head.startswith((b"PK", b"\x80")) or head[257:262] == b"ustar":
        return read_torch(path)
    if not head:
        what = "is empty"
    elif head.startswith(b"version https://git-lfs"):
        what = "is a pointer of Git LFS: fetch the file itself with git lfs pull"
    elif head.lstrip()[:1] == b"<":
        what = "is a web page: download the file itself"
    else:
        what = "is neither a safetensors file nor one of torch.save or numpy.savez"
    raise ValueError(f"{path} {what}")


def _safetensors(path: pathlib.Path) -> dict[str, Stored]:
    try:
        with safetensors.safe_open(path, "numpy"):  # checks the header against the file
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut short, or no safetensors file ({error}); copy or download "
            "it again"
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)

    def stored(entry: dict[str, Any]) -> Stored:
        begin, end = entry["data_offsets"]
        dtype = DTYPES.get(_TYPES.get(entry["dtype"], ""))

        def read() -> np.ndarray:
            if dtype is None:
                raise ValueError(f"the type {entry['dtype']} is not known here")
            with path.open("rb") as file:
                file.seek(8 + length + begin)
                return np.frombuffer(file.read(end - begin), dtype).reshape(entry["shape"])

        return Stored(tuple(entry["shape"]), dtype, read)

    return {name: stored(entry) for name, entry in header.items()}


def _exported(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The weights in a file of `resfu_jax.export`; None if it is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if not {META, WEIGHTS} <= set(archive.namelist()):
                return None
            content = archive.read(WEIGHTS)
    except zipfile.BadZipFile:
        return None  # a file of torch.save has its own messages
    return {
        name: np.frombuffer(x["data"], DTYPES[_TYPES[x["dtype"]]]).reshape(x["shape"])
        for name, x in safetensors.deserialize(content)
    }


def _shards(index: pathlib.Path) -> dict[str, Any]:
    """The entries of all files that an index names."""
    places = _index(index)
    files = sorted(set(places.values()))
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{index} names {counted(len(files), 'file')}, of which {_listed(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} not beside it"
        )
    shards = {file: _read(index.parent / file) for file in files}
    lost = [name for name, file in places.items() if name not in shards[file]]
    if lost:
        raise ValueError(f"{index} names entries that are not in their file: {_listed(lost)}")
    # Of an entry that two files have, the one that the index means.
    entries = {name: value for shard in shards.values() for name, value in shard.items()}
    return entries | {name: shards[file][name] for name, file in places.items()}


def _index(index: pathlib.Path) -> dict[str, str]:
    """Names of entries -> names of files."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        plain = all(pathlib.PurePath(file).name == file != "" for file in places.values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"{index} is no index of shards ({type(error).__name__}: {error})"
        ) from error
    if not plain:
        raise ValueError(f"{index} names files outside its folder")
    return places


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(shorten(name) for name in names[:10]) + more


# ------------------------------------------------------------------------------------------ finding
def find_weights(path_or_repo: str | os.PathLike[str]) -> pathlib.Path:
    """The file that `read_weights` reads, fetched if need be."""
    if not isinstance(path_or_repo, str | os.PathLike) or not os.fspath(path_or_repo):
        raise ValueError(
            f"weights must be a path, a repository or an address, got {path_or_repo!r}"
        )
    text = os.fspath(path_or_repo)
    if re.match(r"\w+://", text):
        return download(text)
    path = pathlib.Path(text)
    if text.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError as error:
            raise FileNotFoundError(f"{text}: {error}") from error
    if os.path.exists(path) or (path.name.endswith(_SUFFIXES) and ":" not in text):
        return _local(path)
    match = _REPOSITORY.fullmatch(text) if isinstance(path_or_repo, str) else None
    if match is None:
        return _local(path)
    if match["revision"] is None and match["file"] is None and path.parent.is_dir():
        raise FileNotFoundError(
            f"{text} does not exist (in {path.parent} there is {_inside(path.parent)}). If you "
            f"mean the Hugging Face repository of that name, write {text}@main"
        )
    return _fetch(**match.groupdict())


def read_beside(path_or_repo: str | os.PathLike[str], name: str) -> dict[str, Any] | None:
    """What a JSON file says that lies beside the weights; None if there is none, or not of JSON.

    Args:
      path_or_repo: as for `read_weights`.
      name: of the file.
    """
    text = os.fspath(path_or_repo)
    if re.match(r"\w+://", text):
        return None
    path = pathlib.Path(os.path.expanduser(text))
    match = _REPOSITORY.fullmatch(text)
    if os.path.exists(path):
        path = (path if path.is_dir() else path.parent) / name
    elif match is not None:
        with contextlib.suppress(ImportError, OSError, ValueError):
            import huggingface_hub

            repo, revision = match["repo"], match["revision"]
            path = pathlib.Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _local(path: pathlib.Path) -> pathlib.Path:
    if os.path.isfile(path):  # unlike Path's, for any text: too long, a null character
        return path
    if os.path.isdir(path):
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        wanted, folder = path / _FILES[0], path
    else:
        wanted, folder = path, path.parent
    raise FileNotFoundError(
        f"{shorten(str(wanted), 400)} does not exist (there is {_inside(folder)})"
    )


def _inside(folder: pathlib.Path) -> str:
    """What a folder has, without what it hides."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return _listed(sorted(name for name in names if not name.startswith("."))) or "nothing"


def _fetch(repo: str, revision: str | None, file: str | None) -> pathlib.Path:
    site = f"https://huggingface.co/{repo}"
    name = file or _FILES[0]
    by_hand = (
        f"Or download {site}/resolve/{revision or 'main'}/{name} by hand and give its path. If "
        f"{site}/tree/{revision or 'main'} has no {name}, name another file as '{repo}:FILE'"
    )
    what = f"{repo} does not exist here; {name} of the Hugging Face repository of that name"
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"{what} can be fetched by huggingface_hub only, which is not installed: "
            f"pip install 'resfu_jax[hub]'. {by_hand}"
        ) from error
    endpoint = os.environ.get("HF_ENDPOINT", "https://")
    if not endpoint.startswith("https://"):
        raise ValueError(f"weights are fetched by https only, and HF_ENDPOINT is {endpoint}")

    def download(name: str) -> pathlib.Path:
        path = pathlib.Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
        _check_sum(path)
        return path

    try:
        name, path = _first_of([file] if file else _FILES, download)
        if name.endswith(".index.json"):
            for shard in sorted(set(_index(path).values())):
                download("/".join([*name.split("/")[:-1], shard]))
        return path
    except DamagedDownload:
        raise
    except (OSError, ValueError) as error:  # of HTTP, too; which classes depends on the version
        raise FileNotFoundError(
            f"{what} could not be fetched: {type(error).__name__}: {str(error).strip()[:500]}\n"
            "Check the name (and revision), the connection and, of a gated repository, the access "
            "token (hf auth login). What an earlier run has fetched is found without a connection, "
            f"at once with HF_HUB_OFFLINE=1. {by_hand}"
        ) from error


def _first_of(
    names: Sequence[str], download: Callable[[str], pathlib.Path]
) -> tuple[str, pathlib.Path]:
    """The first file that a repository has; of none, the error about the first."""
    absent: list[Exception] = []
    for name in names:
        try:
            return name, download(name)
        except (OSError, ValueError) as error:
            if type(error).__name__ != "EntryNotFoundError":
                raise
            absent.append(error)
    raise absent[0]


def _check_sum(path: pathlib.Path) -> None:
    """Compares a fetched file with its SHA-256, where the hub states one.

    It does for large files: in the hub's cache they are stored under their sum.
    """
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            raise DamagedDownload(
                f"{blob} is damaged: its SHA-256 is {found}, and the hub says {blob.name}. Delete "
                "it, and it is fetched again"
            )
