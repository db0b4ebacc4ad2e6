"""Large results in large pages of memory, on a CPU.

The C library gets an array of 32 MiB or more, and often a smaller one, anew from the system, which
brings in its pages when they are first touched. In pages of 4 kB that takes several times as long
as to write them. Linux has pages of 2 MB for memory that asks for them by `madvise`, as NumPy does
for its arrays. XLA does not ask, so a custom call does: its result is an array that nobody has
written to, `empty`, which a loop then fills (also without the zeros from which a loop otherwise
starts).

`RESFU_LARGE_PAGES=0` in the environment switches it off.
"""

import atexit
import contextlib
import ctypes
import functools
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resfu_jax.ops._interp import Size
from resfu_jax.ops._order import never, zeros_after

LARGE = 2**24  # bytes
_TARGET = "resfu_jax_large_pages"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def empty(shape: tuple[Size, ...], dtype: DTypeLike, done: Array | None = None) -> Array:
    """An array to be filled, of any values; it exists from when `done` is computed, if given."""
    if not _is_large(shape, dtype):
        return jnp.zeros(shape, dtype) if done is None else zeros_after(done, shape, dtype)
    operands = () if done is None else (never(done),)
    return _empty.bind(*operands, shape=tuple(shape), dtype=np.dtype(dtype))


def filled(f: Callable[[Array], Array], zero: Float[Array, " b"], done: Array) -> Array:
    """`f(zero)`; a large result once `done` is computed. Not differentiable.

    Args:
      f: adds its argument to what it reads.
      zero: what it gets, or else, where the result is large, other zeros of that shape.
      done: an array that exists by then.
    """
    result = jax.eval_shape(f, zero)
    if not _is_large(result.shape, result.dtype):
        return f(zero)
    # XLA lets a loop write its result where its state was, here in one turn. It must neither know
    # that there is but one, nor that the result does not depend on which.
    turns = 1 + never(done).astype(jnp.int32)

    def body(i, _):
        # Loops without one of a few operations, a sort among them, JAX 0.12 takes for small,
        # whatever their size, and has one core compute them.
        i = jax.lax.sort(jnp.stack([i, i + 1]))[0]
        return f(jnp.broadcast_to((i > 1).astype(zero.dtype), zero.shape))

    return jax.lax.fori_loop(0, turns, body, empty(result.shape, result.dtype, done))


def _is_large(shape: tuple[Size, ...], dtype: DTypeLike) -> bool:
    known = all(isinstance(n, int) for n in shape)
    return known and math.prod(shape) * np.dtype(dtype).itemsize >= LARGE and _available()


_empty = Primitive("empty_in_large_pages")
_empty.def_abstract_eval(lambda *_, shape, dtype: jax.core.ShapedArray(shape, dtype))
_empty.def_impl(lambda *_, shape, dtype: jnp.zeros(shape, dtype))


def _lower(ctx, *operands, shape, dtype):
    context = ctx.module_context
    one_device = getattr(context.axis_context, "num_devices", None) == 1
    stays_here = getattr(context.lowering_parameters, "for_export", None) is False
    if one_device and stays_here:
        return jax.ffi.ffi_lowering(_TARGET)(ctx, *operands)
    # The partitioner would not split the custom call, and an exported program may run elsewhere.
    return _lower_zeros(ctx, *operands, shape=shape, dtype=dtype)


def _batched(operands, axes, *, shape, dtype):
    (done,), (axis,) = operands, axes
    return _empty.bind(done, shape=(done.shape[axis], *shape), dtype=dtype), 0


_lower_zeros = mlir.lower_fun(
    lambda *_, shape, dtype: jnp.zeros(shape, dtype), multiple_results=False
)
mlir.register_lowering(_empty, _lower_zeros)
mlir.register_lowering(_empty, _lower, platform="cpu")
batching.primitive_batchers[_empty] = _batched


@functools.cache
def _available() -> bool:
    """Whether the system gives large pages to who asks, and XLA calls us."""
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return False
    if os.environ.get("RESFU_LARGE_PAGES") == "0":
        return False
    try:
        if "[never]" in _SETTING.read_text():
            return False
        jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_advise), platform="cpu")
        call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((1,), jnp.float32))
        jax.jit(call).lower().compile()
    except Exception:  # whatever is missing, the result is right without it
        return False
    atexit.register(_finish)
    return True


def _finish(seconds: float = 30) -> None:
    """Waits for what still runs: without the interpreter, its calls of `_advise` would hang."""
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.zeros(())))  # after what this thread began
    # Of what other threads began nothing is known but that it makes the process's threads run.
    end, quiet = time.monotonic() + seconds, 0
    while quiet < 20 and time.monotonic() < end:
        time.sleep(0.002)
        quiet = 0 if _running() else quiet + 1


def _running() -> bool:
    """Whether a thread other than this one computes, or would if it got a processor."""
    for task in Path("/proc/self/task").iterdir():
        if task.name != str(threading.get_native_id()):
            with contextlib.suppress(OSError):  # of a thread that ended
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                if state in "RD":
                    return True
    return False


# What of XLA's C interface for custom calls (jaxlib/include/xla/ffi/api/c_api.h) is read here. A
# structure begins with its size and a pointer to extensions; fields after those named are not read.


def _structure(name: str, **fields) -> type[ctypes.Structure]:
    first = dict(struct_size=ctypes.c_size_t, extension=ctypes.c_void_p)
    return type(name, (ctypes.Structure,), {"_fields_": list({**first, **fields}.items())})


_Version = _structure("_Version", major=ctypes.c_int, minor=ctypes.c_int)
_Api = _structure("_Api", version=_Version)
_Buffer = _structure(
    "_Buffer",
    dtype=ctypes.c_int,
    data=ctypes.c_void_p,
    rank=ctypes.c_int64,
    dims=ctypes.POINTER(ctypes.c_int64),
)
_Buffers = _structure(
    "_Buffers",
    size=ctypes.c_int64,
    types=ctypes.c_void_p,
    items=ctypes.POINTER(ctypes.POINTER(_Buffer)),
)
_Frame = _structure(
    "_Frame",
    api=ctypes.POINTER(_Api),
    context=ctypes.c_void_p,
    stage=ctypes.c_int,
    arguments=_Buffers,
    results=_Buffers,
)


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("version", _Version)]


class _MetadataExtension(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    ]


_KNOWN_VERSION, _METADATA = 0, 1
_BYTES = {11: 4, 12: 8}  # by XLA's number for float32 and float64; the others have 2


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))
def _advise(frame):
    """Asks for large pages for the result, which XLA has allocated."""
    frame = frame.contents
    if frame.extension:
        # XLA asks for which version of the interface this was written.
        extension = ctypes.cast(frame.extension, ctypes.POINTER(_MetadataExtension)).contents
        version = frame.api.contents.version
        if extension.type == _METADATA and version.major == _KNOWN_VERSION:
            asked = extension.metadata.contents.version
            asked.major, asked.minor = version.major, version.minor
        return None
    result = frame.results.items[0].contents
    end = result.data + math.prod(result.dims[: result.rank]) * _BYTES.get(result.dtype, 2)
    start = -(-result.data // mmap.PAGESIZE) * mmap.PAGESIZE
    if end > start:
        # Advice: a system that has none left gives small pages.
        _madvise(start, (end - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return None  # no error


def _madvise(start: int, length: int, advice: int) -> None:
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
