"""Files of weights: of torch.save, which are not executed; shards; paths and the hub."""

import json
import pickle
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from weights import (
    HERE,
    STATE,
    Global,
    archive,
    backbone,
    carafe,
    carafe_file,
    dump,
    entries,
    make_hub,
    rounded,
    same,
    tensor,
    write,
)

from resfu_jax.convert import from_torch, load_pretrained
from resfu_jax.convert._files import read_weights

TORCH = HERE / "goldens_torch"  # made by scripts/make_torch_goldens.py

# ------------------------------------------------------------------------------ files of torch.save
_BASE = np.arange(60, dtype=np.float32)
TENSORS = {
    "plain": _BASE.reshape(3, 4, 5),
    "transposed": _BASE.reshape(3, 20).T,
    "strided": _BASE[7:31:3],
    "expanded": np.tile(np.float32([1, 2]), (4, 1)),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.float32(5),
    "half": (_BASE[:6] / 8).astype(np.float16),
    "bfloat16": (_BASE[:6] / 8).astype(ml_dtypes.bfloat16),
    "float8": (_BASE[:6] / 8).astype(ml_dtypes.float8_e4m3fn),
    "double": np.arange(3) / 3,
    "integers": np.arange(5),
    "unsigned": np.array([1, 65535], np.uint16),
    "booleans": np.array([True, False]),
    "parameter": _BASE[:4].reshape(2, 2),
    "noted": _BASE[:4].reshape(2, 2),
}


@pytest.mark.parametrize("file", ["zip.pth", "stream.pth"])
def test_files_of_torch(file):
    checkpoint = read_weights(TORCH / file)
    assert list(checkpoint["state_dict"]) == list(TENSORS)
    for name, expected in TENSORS.items():
        found = np.asarray(checkpoint["state_dict"][name])
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))
    assert checkpoint["epoch"] == 3
    assert np.asarray(checkpoint["optimizer"]["state"][0]["exp_avg"]).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.ckpt", "a.pth.tar", "a"])
def test_from_torch_reads_files(name, tmp_path):
    same(carafe(carafe_file(tmp_path / name)), carafe(STATE))
    same(carafe(str(tmp_path / name)), carafe(STATE))
    same(carafe(write(tmp_path / "a.safetensors", STATE)), carafe(STATE))


def test_big_endian(tmp_path):
    same(carafe(carafe_file(tmp_path / "a.pth", order=b"big")), carafe(STATE))


def test_bfloat16_of_safetensors(tmp_path):
    safetensors.numpy.save_file(rounded(STATE), tmp_path / "a.safetensors")
    expected = carafe({k: v.astype(np.float32) for k, v in rounded(STATE).items()})
    same(carafe(tmp_path / "a.safetensors"), expected)


@pytest.mark.parametrize(
    "name",
    ["os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr",
     "subprocess.Popen", "torch.load", "torch.hub.load", "numpy.load", "runpy.run_path",
     "torch.serialization.load", "functools.partial", "operator.attrgetter", "my.models.Net"],
)  # fmt: skip
def test_nothing_is_executed(name, tmp_path, monkeypatch):
    """Wherever it is in the file: also beside weights that could be read."""
    imported = []
    monkeypatch.setattr("builtins.__import__", spy(imported))
    state = {k: tensor(v, str(i)) for i, (k, v) in enumerate(STATE.items())}
    storages = {str(i): v.tobytes() for i, v in enumerate(STATE.values())}
    for content in (
        state | {"x": Global(name, "touch pwned")},
        state | {"x": Global(name)},
        {"state_dict": state, "optimizer": [Global(name, "touch pwned")]},
        Global("torch._utils._rebuild_parameter", Global(name, "x"), True, {}),
        {Global(name, "touch pwned"): 1},
    ):
        path = archive(tmp_path / "a.pth", content, storages)
        with pytest.raises(ValueError, match=f"names '{name}', which would be run by torch.load"):
            carafe(path)
    assert not [
        module for module in imported if module.split(".")[0] in ("subprocess", "runpy", "my")
    ]


def spy(imported):
    real = __import__

    def import_(name, *rest):
        imported.append(name)
        return real(name, *rest)

    return import_


@pytest.mark.parametrize(
    "content, message",
    [
        (tensor(_BASE, size=10**15), "damaged or cut short"),
        (tensor(_BASE, offset=30), "reaches to element 89 of a storage of 60"),
        (tensor(_BASE, shape=(10**9, 10**9)), "reaches to element"),
        (tensor(_BASE, strides=(2,)), "reaches to element 118"),
        (tensor(_BASE, strides=(-1,)), "negative size, stride or offset"),
        (tensor(_BASE, offset=-4), "negative size, stride or offset"),
        (tensor(_BASE, shape=(2**70,), strides=(1,)), "reaches to element"),
        (tensor(_BASE, strides=(1, 1)), "damaged"),
        (tensor(_BASE, key="1"), "'data/1', which it refers to, is not in it"),
        (tensor(_BASE, key="../../secret"), "which it refers to, is not in it"),
        (tensor(_BASE, kind="QInt8Storage"), "names 'torch.QInt8Storage'"),
        (Global("torch._utils._rebuild_tensor_v2", 1, 2, 3), "damaged"),
        (Global("torch._utils._rebuild_sparse_tensor", 1), "_rebuild_sparse_tensor"),
    ],
)  # fmt: skip
def test_hostile_tensors(content, message, tmp_path):
    path = archive(tmp_path / "a.pth", {"w": content}, {"0": _BASE.tobytes()})
    with pytest.raises(ValueError, match=message) as error:
        np.asarray(read_weights(path)["w"])
    assert str(path) in str(error.value) and len(str(error.value)) < 1000


def test_a_tensor_that_repeats_one_number_is_not_written_out(tmp_path):
    """10^18 numbers in a file of a hundred bytes: refused for their shape, without being made."""
    content = {"weight": tensor(_BASE, shape=(10**9, 10**9), strides=(0, 0))}
    path = archive(tmp_path / "a.pth", content, {"0": _BASE.tobytes()})
    with pytest.raises(ValueError, match=r"'weight' has shape \(1000000000, 1000000000\)"):
        from_torch("ConvTranspose2d", path, in_channels=1, out_channels=1, kernel_size=1)


def nested(depth, code, end):
    return b"\x80\x02" + code * depth + end + b"."


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02u.",
        b"\x80\x02h\x05.",
        b"\x80\x02]q\x00h\x00a",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        nested(200_000, b"]\x85", b""),
        # A tuple of a tuple of ..., as a key: hashing it would end the process.
        b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
        # A dictionary that holds itself; dictionaries that hold each other twice, 60 deep.
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        b"\x80\x02}q\x00" + b"}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00uq\x00" * 60 + b".",
        b"\x80\x02(" + b"}" * 10 + b"d.",
        b"\x80\x02]\x81.",
        b"\x80\x02\x82\x01.",
    ],
    ids=range(17),
)  # fmt: skip
def test_hostile_programs(program, tmp_path):
    path = archive(tmp_path / "a.pth", program, {})
    with pytest.raises(ValueError) as error:
        carafe(path)
    assert len(str(error.value)) < 2000


def test_archives_that_torch_does_not_write(tmp_path):
    def message(path):
        with pytest.raises(ValueError, match=path.name) as error:
            carafe(path)
        return str(error.value)

    path = carafe_file(tmp_path / "a.pth")
    whole = path.read_bytes()
    for n in (1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        message(path)
    damaged = bytearray(whole)
    at = whole.index(next(iter(STATE.values())).tobytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    assert "damaged" in message(path)
    zeros = archive(tmp_path / "b.pth", {}, {"0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in message(zeros)
    with zipfile.ZipFile(tmp_path / "d.pth", "w") as z:
        z.writestr("a.txt", "")
    assert "without a checkpoint" in message(tmp_path / "d.pth")
    with zipfile.ZipFile(tmp_path / "e.pt", "w") as z:
        z.writestr("e/data.pkl", dump({}))
        z.writestr("e/constants.pkl", dump(()))
    assert "TorchScript" in message(tmp_path / "e.pt")


def test_streams_of_torch(tmp_path):
    stream = (TORCH / "stream.pth").read_bytes()
    for n in [*range(0, len(stream), 101), len(stream) - 1]:
        (tmp_path / "a.pth").write_bytes(stream[:n])
        with pytest.raises(ValueError, match=r"a\.pth"):
            read_weights(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match="a pickle, but none that torch.save writes"):
        read_weights(tmp_path / "b.pth")
    # A storage that is said to be larger than the file.
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    huge = 2**60
    content = {"w": tensor(_BASE, size=huge, shape=(huge,))}
    program = b"".join(map(dump, [*header, content, ["0"]]))
    (tmp_path / "c.pth").write_bytes(program + struct.pack("<q", huge))
    with pytest.raises(ValueError, match="cut short"):
        read_weights(tmp_path / "c.pth")


def test_whole_modules_are_not_read():
    with pytest.raises(
        ValueError, match=r"holds a whole module.*torch.save\(module.state_dict\(\)"
    ):
        read_weights(TORCH / "module.pth")


# ------------------------------------------------------------------------------------------ shards
def shards(folder, state, files=2):
    names = list(state)
    places = {n: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, n in enumerate(names)}
    for file in set(places.values()):
        write(folder / file, {n: state[n] for n in names if places[n] == file})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards(tmp_path):
    index = shards(tmp_path, STATE)
    same(carafe(index), carafe(STATE))
    same(carafe(tmp_path), carafe(STATE))
    with pytest.raises(ValueError, match="one of several shards|missing 'channel_compressor"):
        carafe(tmp_path / "model-00001-of-00002.safetensors")

    mit, expected = backbone("mit"), backbone("mit")
    (tmp_path / "mit").mkdir()
    load_pretrained(shards(tmp_path / "mit", entries("mit"), 3).parent, mit)
    load_pretrained(HERE / "goldens_mit", expected)
    same(mit, expected)
    with pytest.raises(ValueError, match="it is one of several shards: give the index"):
        load_pretrained(tmp_path / "mit" / "model-00001-of-00003.safetensors", mit)

    places = json.loads(index.read_text())
    places["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(places))
    with pytest.raises(ValueError, match="entries that are not in their file: lost.weight"):
        carafe(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="of which model-00002-of-00002.safetensors is not"):
        carafe(index)
    for content, message in [
        ("", "no index of shards"),
        ("[]", "no index of shards"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "files outside its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "files outside its folder"),
        ('{"weight_map": {"a": 3}}', "no index of shards"),
    ]:
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            carafe(index)


# ----------------------------------------------------------------------------------- paths and hub
def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.safetensors", STATE)
    same(carafe("~/a.safetensors"), carafe(STATE))
    for missing in ("~/b.safetensors", "~no-such-user/b.pth"):
        with pytest.raises(FileNotFoundError, match="b\\.(safetensors|pth)|home directory"):
            carafe(missing)


def test_a_missing_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="runs/net does not exist .*write runs/net@main"):
        carafe("runs/net")
    for name in ("runs/a.pth", "other/a.bin", "other/b.ckpt", "a.pt"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            carafe(name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = make_hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_what_a_repository_has_is_found(hub, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    hub.files["pytorch_model.bin"] = carafe_file(local / "a.bin").read_bytes()
    same(carafe("owner/net"), carafe(STATE))
    assert hub.calls[0] == "model.safetensors" and hub.calls[-1] == "pytorch_model.bin"
    index = shards(local, STATE)
    hub.files |= {p.name: p.read_bytes() for p in local.glob("model*")}
    same(carafe("owner/net"), carafe(STATE))
    assert hub.calls[-1] == "model-00002-of-00002.safetensors"
    hub.files = {index.name: index.read_bytes()}
    with pytest.raises(FileNotFoundError, match="404: model-00001-of-00002.safetensors"):
        carafe("owner/net")
    hub.files = {}
    with pytest.raises(FileNotFoundError, match=r"404: model\.safetensors\n"):
        carafe("owner/net")


def test_a_damaged_download_is_told(hub, tmp_path):
    hub.files["model.safetensors"] = write(tmp_path / "a.safetensors", STATE).read_bytes()
    same(carafe("owner/net"), carafe(STATE))
    (blob,) = (tmp_path / "blobs").iterdir()
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"damaged: its SHA-256 is .*the hub says {blob.name}"):
        carafe("owner/net")


def test_https_only(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")
    with pytest.raises(ValueError, match="https only, and HF_ENDPOINT is http://mirror.example"):
        carafe("owner/net")
    for url in ("http://example.org/a.pth", "ftp://example.org/a.pth"):
        with pytest.raises(ValueError, match="weights are fetched by https only, got "):
            carafe(url)
    assert not hub.calls
