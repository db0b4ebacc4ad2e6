"""Reads PyTorch's checkpoints, `.pth`, `.pt` and `.bin`, without executing what is in them.

`torch.save` writes a pickle: a program for a small stack machine that may name any function of any
Python module and call it. Here that machine is interpreted by a loop that knows containers, strings
and numbers, and the handful of names by which PyTorch rebuilds a tensor. It imports nothing, calls
nothing that a file names, and refuses a file with any other name in it.

Two layouts:

- since PyTorch 1.6, a zip archive: `NAME/data.pkl`, one file `NAME/data/KEY` for each storage, and
  `NAME/byteorder`. All are stored without compression, so nothing is larger than the file.
- before, one stream: a magic number, the protocol's version and facts about the machine, each a
  pickle; then the pickle of the object, one of the storages' keys, and the storages in that order,
  each a number of elements (int64) and the elements.
"""

import dataclasses
import io
import math
import mmap
import pathlib
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C  # with which the stream begins

_RESAVE = (
    "If you trust whom it is from, save its weights alone where PyTorch is: "
    "torch.save(module.state_dict(), 'weights.pth')"
)

_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
}
_EXTENSIONS = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
DTYPES = {
    name: np.dtype(name)
    for name in [*_STORAGES.values(), "uint16", "uint32", "uint64"]
    if name not in _EXTENSIONS
} | {name: np.dtype(getattr(jnp, name)) for name in _EXTENSIONS}

# What trainers keep beside the weights. Such objects become placeholders without content, so that
# the weights beside them can be read; the list decides about convenience, not about safety.
_BESIDE = {
    "argparse.Namespace",
    "collections.Counter",
    "collections.defaultdict",
    "datetime.datetime",
    "datetime.timedelta",
    "numpy.dtype",
    "numpy.ndarray",
    "_codecs.encode",
    "torch.device",
    "torch.Generator",
    *(
        f"{m}.{t}"
        for m in ("builtins", "__builtin__")
        for t in ("dict", "frozenset", "list", "set")
    ),
    *(f"pathlib.{p}" for p in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    *(f"pathlib._local.{p}" for p in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    *(f"numpy.{m}.multiarray.{f}" for m in ("core", "_core") for f in ("scalar", "_reconstruct")),
    *(f"numpy.{m}.numeric._frombuffer" for m in ("core", "_core")),
}
_BESIDE_MODULES = (
    "addict.",
    "easydict.",
    "lightning.",
    "lightning_fabric.",
    "ml_collections.",
    "mmcv.",
    "mmengine.",
    "omegaconf.",
    "pytorch_lightning.",
    "torch.optim.",
    "yacs.",
)


class Stored:
    """A tensor in a file: its shape, and its values once `np.asarray` asks for them."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)
        self._read = read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values."""
        values = self._read()
        return values if dtype is None else values.astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Name:
    """A function or class that the file names. It is only ever compared."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Beside:
    """What the file would make of a name in `_BESIDE`."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Where the elements of tensors are."""

    key: str
    dtype: np.dtype | None  # None: bytes, of which the tensor knows the type
    size: int  # elements, or bytes

    @property
    def width(self) -> int:
        """Bytes of what `size` counts."""
        return 1 if self.dtype is None else self.dtype.itemsize


class _Refused(ValueError):
    """The file wants something that this reader does not do."""


def read_torch(path: pathlib.Path) -> Any:
    """What `torch.save` put into a file, with tensors as `Stored`.

    Containers are dictionaries, lists and tuples whatever their class was.

    Raises:
      ValueError: not such a file, or with more in it than tensors and containers; says which.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                return _Zip(path).content()
            # A map, because asking it for more than there is reserves no memory.
            return _stream(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except _Refused as error:
        raise ValueError(f"{path} is not read: {error}") from None
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError) as error:
        raise ValueError(_damaged(path, error)) from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        # From pickletools, and from a program that takes from an empty stack and the like.
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: pathlib.Path, error: Exception) -> str:
    return (
        f"{path} is damaged or cut short, or no checkpoint of PyTorch "
        f"({type(error).__name__}: {str(error)[:200]}); copy or download it again"
    )


# ------------------------------------------------------------------------------------ the two files
class _Zip:
    """A checkpoint that is a zip archive. It stays open for the tensors that are read later."""

    def __init__(self, path: pathlib.Path):
        self._path, self._archive = path, zipfile.ZipFile(path)
        self._files = {info.filename: info for info in self._archive.infolist()}
        pickles = [name for name in self._files if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise _Refused("it is a zip archive without a checkpoint of PyTorch in it (data.pkl)")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}constants.pkl" in self._files:
            raise _Refused(f"it is a TorchScript program, not a state_dict. {_RESAVE}")
        order = self._bytes("byteorder") if f"{self._root}byteorder" in self._files else b"little"
        self._swap = order.strip() != sys.byteorder.encode()
        self._last: tuple[str, bytes] = ("", b"")

    def content(self) -> Any:
        storages: dict[str, _Storage] = {}
        content = _interpret(io.BytesIO(self._bytes("data.pkl")), self._values, storages)
        for key, storage in storages.items():  # now, and not when a tensor is wanted
            if self._info(f"data/{key}").file_size < storage.size * storage.width:
                raise EOFError(f"storage {key!r} is shorter than {storage.size} elements")
        return content

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._files.get(self._root + name)
        if info is None:
            raise _Refused(f"{name!r}, which it refers to, is not in it")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _Refused("it is compressed or encrypted, as torch.save never writes")
        return info

    def _bytes(self, name: str) -> bytes:
        info = self._info(name)
        try:
            return self._archive.read(info)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(_damaged(self._path, error)) from error

    def _values(self, storage: _Storage) -> bytes:
        if self._last[0] != storage.key:  # many tensors may lie in one storage
            self._last = storage.key, self._bytes(f"data/{storage.key}")
        return _native(self._last[1], storage, self._swap)


def _stream(file: mmap.mmap) -> Any:
    """A checkpoint of before PyTorch 1.6."""
    if file[257:262] == b"ustar":
        raise _Refused(f"it is a tar archive of a PyTorch before 0.4. {_RESAVE}")
    begins: dict[str, int] = {}

    def values(storage: _Storage) -> bytes:
        at = begins[storage.key]
        return _native(file[at : at + storage.size * storage.width], storage, swap)

    if _interpret(file, values) != _MAGIC:
        raise _Refused("it is a pickle, but none that torch.save writes")
    storages: dict[str, _Storage] = {}
    _version, machine = (_interpret(file, values) for _ in range(2))
    swap = machine["little_endian"] != (sys.byteorder == "little")
    content = _interpret(file, values, storages)
    for key in _interpret(file, values):
        storage = storages[key]
        (count,) = struct.unpack("<q" if machine["little_endian"] else ">q", file.read(8))
        if count != storage.size:
            raise _Refused(f"storage {key!r} has {count} elements, not {storage.size} as it says")
        begins[key] = file.tell()
        if begins[key] + count * storage.width > len(file):
            raise EOFError(f"storage {key!r} is cut short")
        file.seek(count * storage.width, 1)
    if begins.keys() != storages.keys():
        raise EOFError("storages are missing")
    return content


def _native(data: bytes, storage: _Storage, swap: bool) -> bytes:
    """A storage's bytes in this machine's order."""
    if not swap:
        return data
    if storage.dtype is None or storage.dtype.kind == "c":
        raise ValueError("it is of a machine with the other order of bytes, and not plain numbers")
    return np.frombuffer(data, f"u{storage.width}").byteswap().tobytes()


# ------------------------------------------------------------------------------- the stack machine
def _interpret(
    file: Any,
    values: Callable[[_Storage], bytes],
    storages: dict[str, _Storage] | None = None,
) -> Any:
    """Runs one pickle; `values` reads a storage later, `storages` collects them."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages = {} if storages is None else storages

    def from_mark() -> list[Any]:
        at = marks.pop()
        taken = stack[at:]
        del stack[at:]
        return taken

    def pop(n: int) -> list[Any]:
        if len(stack) < n or (marks and len(stack) - n < marks[-1]):
            raise IndexError("the stack is empty")
        taken = stack[len(stack) - n :]
        del stack[len(stack) - n :]
        return taken

    def fill(pairs: list[Any]) -> None:
        if isinstance(stack[-1], _Beside):
            return
        if not isinstance(stack[-1], dict):
            raise TypeError("sets items of what is no dictionary")
        stack[-1].update(_dictionary(zip(pairs[::2], pairs[1::2], strict=True)))

    def extend(values: list[Any]) -> None:
        if isinstance(stack[-1], list):
            stack[-1].extend(values)
        elif not isinstance(stack[-1], _Beside):
            raise TypeError("appends to what is no list")

    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (result,) = pop(1)
                return result
            case "MARK":
                marks.append(len(stack))
            case "POP_MARK":
                from_mark()
            case "POP":
                pop(1)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case (
                "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4"
                | "FLOAT" | "BINFLOAT"
                | "STRING" | "BINSTRING" | "SHORT_BINSTRING"
                | "UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8"
                | "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
            ):  # fmt: skip
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append({})
                stack.insert(marks[-1], stack.pop())
                pairs = stack[marks[-1] + 1 :]
                del stack[marks.pop() + 1 :]
                fill(pairs)
            case "SETITEM":
                fill(pop(2))
            case "SETITEMS":
                fill(from_mark())
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                stack.append(from_mark())
            case "APPEND":
                extend(pop(1))
            case "APPENDS" | "ADDITEMS":
                extend(from_mark())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(from_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(".".join(pop(2))))
            case "BINPERSID":
                (identity,) = pop(1)
                storage = _storage(identity)
                stack.append(storages.setdefault(storage.key, storage))
            case "REDUCE" | "NEWOBJ":
                function, arguments = pop(2)
                stack.append(_made(function, arguments, values))
            case "NEWOBJ_EX":
                function, arguments, _ = pop(3)
                stack.append(_made(function, arguments, values))
            case "BUILD":  # attributes: a state_dict's versions, a parameter's own
                pop(1)
            case _:
                raise _Refused(f"it has the instruction {opcode.name}. {_RESAVE}")
    raise EOFError("the program has no end")


def _name(text: str) -> _Name:
    module, _, last = text.rpartition(".")
    known = (
        text in _BESIDE
        or text.startswith(_BESIDE_MODULES)
        or text in ("collections.OrderedDict", "torch.Size", "torch.Tensor")
        or (module == "torch" and last in DTYPES)
        or text in _REBUILD
        or _storage_type(text) is not None
    )
    if not known:
        kind = "a whole module, or more" if text.startswith("torch.nn.") else "more than tensors"
        raise _Refused(
            f"it holds {kind}: it names {text[:100]!r}, which would be run by torch.load. Nothing "
            f"of it was executed. {_RESAVE}"
        )
    return _Name(text)


def _storage_type(text: str) -> tuple[np.dtype | None] | None:
    """`torch.FloatStorage` -> (float32,); `torch.UntypedStorage` -> (None,); others -> None."""
    module, _, last = text.rpartition(".")
    if module in ("torch", "torch.cuda", "torch.storage") and last.endswith("Storage"):
        kind = last.removesuffix("Storage")
        if kind in ("Untyped", "_Untyped"):
            return (None,)
        if kind in _STORAGES:
            return (DTYPES[_STORAGES[kind]],)
    return None


def _storage(identity: Any) -> _Storage:
    """The storage of `("storage", type, key, device, size)`."""
    if not isinstance(identity, tuple) or not identity or identity[0] != "storage":
        raise _Refused(f"it holds a whole module, with its source. {_RESAVE}")
    _, kind, key, _, size, *view = identity
    if any(v is not None for v in view):
        raise _Refused(f"a storage of it is a part of another. {_RESAVE}")
    dtype = _storage_type(kind.text) if isinstance(kind, _Name) else None
    if dtype is None or not isinstance(key, str) or not _whole(size):
        raise TypeError("a storage without type, key or size")
    return _Storage(key, dtype[0], size)


def _made(function: Any, arguments: Any, values: Callable[[_Storage], bytes]) -> Any:
    """What calling the function would give: a tensor or a container."""
    if not isinstance(arguments, tuple):
        raise TypeError("arguments that are no tuple")
    if isinstance(function, _Beside):
        return function
    if not isinstance(function, _Name):
        raise TypeError("calls what is no function")
    if function.text == "collections.OrderedDict":
        return _dictionary(*arguments) if arguments else {}
    if function.text == "torch.Size":
        return tuple(*arguments)
    if function.text in _REBUILD:
        return _REBUILD[function.text](values, *arguments)
    if function.text in _BESIDE or function.text.startswith(_BESIDE_MODULES):
        return _Beside(function.text)
    raise _Refused(f"it calls {function.text!r}. {_RESAVE}")


def _dictionary(pairs: Iterable[Any]) -> dict[Any, Any]:
    """The pairs, with a plain key each."""
    plain = (str, int, float, bytes, type(None))
    return {
        key if isinstance(key, plain) else f"<{type(key).__name__}>": value for key, value in pairs
    }


def _tensor(
    values: Callable[[_Storage], bytes],
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *_: Any,
    dtype: np.dtype | None = None,
) -> Stored:
    """A tensor: elements `offset + sum(index * strides)` of a storage."""
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple):
        raise TypeError("a tensor without a storage")
    dtype = storage.dtype if dtype is None else dtype
    if dtype is None or len(shape) != len(strides) or len(shape) > 16:
        raise TypeError("a tensor without a type, or with other strides than axes")
    if not all(map(_whole, (offset, *shape, *strides))):
        raise _Refused("a tensor of it has a negative size, stride or offset")
    size = storage.size if storage.dtype is not None else storage.size // dtype.itemsize
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    empty = math.prod(shape) == 0
    if not empty and last >= size:
        raise _Refused(f"a tensor of it reaches to element {last} of a storage of {size}")

    def read() -> np.ndarray:
        if empty:
            return np.zeros(shape, dtype)
        steps = [s * dtype.itemsize for s in strides]
        return np.ndarray(shape, dtype, values(storage), offset * dtype.itemsize, steps)

    return Stored(shape, dtype, read)


def _tensor_v3(
    values: Any, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any,
    dtype: Any, *_: Any,
) -> Stored:  # fmt: skip
    """As `_tensor`, of a storage that does not know its type."""
    if not isinstance(dtype, _Name) or dtype.text.rpartition(".")[2] not in DTYPES:
        raise TypeError("a tensor without a type")
    return _tensor(
        values, storage, offset, shape, strides, dtype=DTYPES[dtype.text.rpartition(".")[2]]
    )


def _parameter(values: Any, tensor: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return tensor


def _from_type(values: Any, function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor with attributes: without them."""
    return _made(function, arguments, values)


_REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _parameter,
}


def _whole(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0
