"""Where load_pretrained finds a checkpoint, and what it says where there is none."""

import pathlib
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx

from resfu_jax.backbones import ResNet
from resfu_jax.convert import load_pretrained
from resfu_jax.model import create_model

HERE = pathlib.Path(__file__).parent
FILE = HERE / "goldens_resnet" / "transformers.safetensors"


def resnet():
    return ResNet("50", widths=(2, 4, 6, 8), depths=(1, 2, 1, 1), stem_width=8, rngs=nnx.Rngs(0))


@pytest.fixture
def expected():
    net = resnet()
    load_pretrained(FILE, net)
    return net


@pytest.fixture
def hub(monkeypatch):
    """A hub with the repository `owner/net.a1`; `calls` are what has been asked of it."""
    hub = types.ModuleType("huggingface_hub")
    hub.calls = []

    def hf_hub_download(repo_id, filename, *, revision=None):
        hub.calls.append((repo_id, filename, revision))
        if repo_id != "owner/net.a1":
            raise OSError("404 Client Error")
        return str(FILE)

    hub.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


@pytest.mark.parametrize(
    "name, file, revision",
    [
        ("owner/net.a1", "model.safetensors", None),
        ("owner/net.a1@v2", "model.safetensors", "v2"),
        ("owner/net.a1@refs/pr/1", "model.safetensors", "refs/pr/1"),
        ("owner/net.a1:sub/other.safetensors", "sub/other.safetensors", None),
        ("owner/net.a1@v2:other.safetensors", "other.safetensors", "v2"),
    ],
)
def test_repository(hub, expected, name, file, revision):
    net = resnet()
    unused = load_pretrained(name, net)
    assert hub.calls == [("owner/net.a1", file, revision)]
    assert unused[:2] == ["classifier.1.bias", "classifier.1.weight"]
    same(net, expected)


def test_what_exists_is_a_path(hub, expected, tmp_path, monkeypatch):
    (tmp_path / "owner" / "net.a1").mkdir(parents=True)
    shutil.copy(FILE, tmp_path / "owner" / "net.a1" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    for path in ("owner/net.a1", "owner/net.a1/model.safetensors", pathlib.Path("owner/net.a1")):
        net = resnet()
        load_pretrained(path, net)
        same(net, expected)
    # A file that is not there is not looked for anywhere else.
    for path in ("owner/b.safetensors", pathlib.Path("other/net"), "./other/net", "a/b/c", "net"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_pretrained(path, resnet())
    assert not hub.calls


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained("owner/net@v2:a.safetensors", resnet())
    for part in (
        "owner/net does not exist here",
        "pip install 'resfu_jax[hub]'",
        "https://huggingface.co/owner/net/resolve/v2/a.safetensors",
    ):
        assert part in str(error.value)


def test_unknown_repository_or_offline(hub):
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained("owner/nte", resnet())
    assert str(error.value).startswith("owner/nte does not exist here;")
    for part in (
        "OSError: 404 Client Error",
        "HF_HUB_OFFLINE=1",
        "https://huggingface.co/owner/nte/resolve/main/model.safetensors by hand",
        "'owner/nte:FILE'",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"no such header", "is neither a safetensors file nor one of torch.save"),
        (b"\xff" * 8 + b"{}", "is damaged or cut short, or no safetensors file"),
        (FILE.read_bytes()[:-1], "is damaged or cut short, or no safetensors file"),
        (b"<!DOCTYPE html><html>", "is a web page: download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS: .* git lfs pull"),
        (b"\x89HDF\r\n\x1a\n", "is neither a safetensors file nor one of torch.save"),
    ],
)
def test_other_content(tmp_path, content, message):
    for name in ("model.safetensors", "pytorch_model.bin", "net.pth"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} {message}") as error:
            load_pretrained(tmp_path / name, resnet())
        assert len(str(error.value)) < 1000


def test_a_checkpoint_of_another_architecture():
    net = resnet()
    with pytest.raises(ValueError, match="goldens_mit does not fit|does not fit .*goldens_mit"):
        load_pretrained(HERE / "goldens_mit", net)


def test_models_without_a_loader(hub):
    with pytest.raises(ValueError, match="model must be one of MiT, ResNet, .*, got Linear"):
        load_pretrained("owner/net.a1", nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    model = create_model(
        backbone=dict(name="resnet", variant="18", widths=(2, 2, 2, 2), stem_width=2),
        head=dict(upsampler="bilinear", project="linear", width=4),
        num_classes=3,
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match="model.backbone must be a MiT .*got ResNet"):
        load_pretrained("owner/net.a1", model)
    assert not hub.calls  # before anything is fetched
