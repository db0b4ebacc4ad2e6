"""What the tests of weights share: states, and files as publishers write them."""

import hashlib
import io
import math
import pathlib
import pickle
import types
import zipfile

import goldens
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from flax import nnx

from resfu_jax import from_torch
from resfu_jax.backbones import create_backbone

HERE = pathlib.Path(__file__).parent
CARAFE = goldens.load("carafe_s2_k5_g1")
STATE = CARAFE.group("param")


def carafe(state, **options):
    return from_torch("CARAFEPack", state, **CARAFE.args, **options)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a, nnx.Param), nnx.state(b, nnx.Param))


def rounded(state):
    return {k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()}


SMALL = {
    "mit": dict(widths=(8, 16, 24, 32), depths=(2, 1, 1, 1), heads=(1, 2, 3, 4)),
    "resnet": dict(variant="50", widths=(2, 4, 6, 8), depths=(1, 2, 1, 1), stem_width=8),
    "vit": dict(
        width=16,
        depth=2,
        heads=2,
        mlp_ratio=2,
        patch_size=4,
        image_size=(24, 16),
        layers=(0, 1),
    ),
}


def entries(family):
    """A file of the family as published."""
    if family == "vit":
        with np.load(HERE / "goldens_vit" / "timm.npz") as z:
            return {k.removeprefix("param/"): z[k] for k in z.files if k.startswith("param/")}
    name = {"mit": "model", "resnet": "transformers"}[family]
    return safetensors.numpy.load_file(HERE / f"goldens_{family}" / f"{name}.safetensors")


def backbone(family):
    return create_backbone(family, **SMALL[family], rngs=nnx.Rngs(0))


def write(path, entries):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in entries.items()}, path)
    return path


# ------------------------------------------------------------------ files of torch.save
class Global:
    """Pickles as a reference to a name, called with arguments if there are any."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class Storage(Global):
    """Pickles as PyTorch's persistent id of a storage."""


class Pickler(pickle._Pickler):
    """Writes what torch.save writes, without PyTorch, and what it never would."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Storage):
            kind, key, size = obj.arguments
            self.save(("storage", Global(f"torch.{kind}"), key, "cpu", size))
            self.write(pickle.BINPERSID)
        elif isinstance(obj, Global):
            module, _, name = obj.name.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
            if obj.arguments:
                self.save(obj.arguments)
                self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def tensor(values, key="0", *, size=None, offset=0, shape=None, strides=None, kind="FloatStorage"):
    shape = values.shape if shape is None else shape
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))] if strides is None else strides
    storage = Storage("", kind, key, values.size if size is None else size)
    return Global(
        "torch._utils._rebuild_tensor_v2", storage, offset, tuple(shape), tuple(strides), False, {}
    )


def dump(content):
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def archive(path, content, storages, *, order=b"little", compression=zipfile.ZIP_STORED):
    data = content if isinstance(content, bytes) else dump(content)
    with zipfile.ZipFile(path, "w", compression) as z:
        z.writestr("archive/data.pkl", data)
        z.writestr("archive/byteorder", order)
        for key, values in storages.items():
            z.writestr(f"archive/data/{key}", values)
    return path


def carafe_file(path, **options):
    state = {k: tensor(v, str(i)) for i, (k, v) in enumerate(STATE.items())}
    order = options.pop("order", b"little")
    bytes_of = {
        str(i): v.astype({b"little": "<f4", b"big": ">f4"}[order]).tobytes()
        for i, v in enumerate(STATE.values())
    }
    return archive(path, {"state_dict": state, "epoch": 3}, bytes_of, order=order, **options)


# --------------------------------------------------------------------------------- the hub
def make_hub(folder):
    """A hub of one folder, which keeps files under their SHA-256 as the real one's cache does."""
    hub = types.ModuleType("huggingface_hub")
    hub.calls, hub.files = [], {}

    class EntryNotFoundError(OSError):
        pass

    def hf_hub_download(repo_id, filename, *, revision=None):
        hub.calls.append(filename)
        if filename not in hub.files:
            raise EntryNotFoundError(f"404: {filename}")
        content = hub.files[filename]
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        link = folder / "snapshots" / filename
        for path in (blob, link):
            path.parent.mkdir(exist_ok=True, parents=True)
        if not blob.exists():
            blob.write_bytes(content)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
        return str(link)

    hub.hf_hub_download = hf_hub_download
    return hub
