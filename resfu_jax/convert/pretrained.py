"""Published checkpoints, by path or Hugging Face repository, -> models of this library."""

import os
import pathlib
import re
from collections.abc import Callable

import numpy as np
import safetensors.numpy
from flax import nnx

from resfu_jax.backbones.mit import MiT
from resfu_jax.backbones.resnet import ResNet
from resfu_jax.backbones.vit import ViT
from resfu_jax.convert.resnet import load_resnet
from resfu_jax.convert.segformer import check_segformer, load_mit, load_segformer
from resfu_jax.convert.vit import load_vit
from resfu_jax.model import SegmentationModel

Loader = Callable[[dict[str, np.ndarray], nnx.Module, str], list[str]]

# Each sets the entries of a file in a module in place, or raises an error that names all that does
# not fit, and returns the names of the entries it has not used.
_LOADERS: tuple[tuple[type[nnx.Module], Loader], ...] = (
    (MiT, load_mit),
    (ResNet, load_resnet),
    (ViT, load_vit),
    (SegmentationModel, load_segformer),
)

_REPOSITORY = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?"
)
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pth.tar")
_CONVERT = (
    "A checkpoint in PyTorch's format becomes safetensors with transformers, "
    "AutoModel.from_pretrained(...).save_pretrained(...), or with torch:\n"
    "    import torch, safetensors.torch; state = torch.load({0!r}, map_location='cpu')\n"
    "    safetensors.torch.save_file({{k: v.contiguous().clone() for k, v in "
    "state.get('state_dict', state).items()}}, 'model.safetensors')"
)


def load_pretrained(path_or_repo: str | os.PathLike, model: nnx.Module) -> list[str]:
    """Load a published checkpoint into a model, in place.

    What the file must hold depends on the model:

    - `MiT`: the encoder of a SegFormer of Hugging Face transformers, from `SegformerModel`,
      `SegformerForImageClassification` or `SegformerForSemanticSegmentation`. Classifier and
      decoder in the file are left out.
    - `SegmentationModel` of `MiT` and a `SegFormerHead` with `project="linear"`: encoder and
      decoder, from `SegformerForSemanticSegmentation`. The head's upsamplers, which such files do
      not have, stay as they are.
    - `ResNet`: a ResNet of torchvision, timm, transformers or MMSegmentation; classifier and
      decoder are left out.
    - `ViT`: a plain ViT or DINO of timm or transformers, a DINOv2 of transformers, timm or its
      authors, or a DINOv3 of transformers. A classifier is left out unless the model has one.

    To start from a pretrained backbone with another head, pass `model.backbone`.

        load_pretrained("nvidia/mit-b1", model.backbone)
        load_pretrained("timm/resnet50.a1_in1k", ResNet("50", rngs=nnx.Rngs(0)))

    Args:
      path_or_repo: a `.safetensors` file; a directory with `model.safetensors`; or a repository of
        the Hugging Face hub, `"owner/name"`, `"owner/name@revision"`, `"owner/name:file"` or
        `"owner/name@revision:file"`, of which one file, `model.safetensors` by default, is fetched
        into the hub's cache. That needs `pip install 'resfu_jax[hub]'`. What exists as a path is
        read as one.
      model: module of the sizes of the checkpoint.

    Returns:
      The entries of the file that were not used, sorted.

    Raises:
      FileNotFoundError: no such file, or it could not be fetched; the error says what to do.
      ValueError: a file in another format; a model that no loader is for; missing, unexpected or
        misshapen entries, all named; `model` is then unchanged.
    """
    loader = _loader(model)
    path = _resolve(path_or_repo)
    entries = _read(path)
    # Into a copy, so that an error leaves the model whole.
    loaded = nnx.clone(model)
    ignored = loader(entries, loaded, str(path_or_repo))
    nnx.update(model, nnx.state(loaded))
    return ignored


def _loader(model: nnx.Module) -> Loader:
    if isinstance(model, SegmentationModel):
        check_segformer(model)
    for cls, loader in _LOADERS:
        if isinstance(model, cls):
            return loader
    known = ", ".join(cls.__name__ for cls, _ in _LOADERS)
    raise ValueError(f"model must be one of {known}, got {type(model).__name__}")


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}). {_CONVERT.format(str(path))}"
        ) from error


def _resolve(path_or_repo: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path_or_repo)
    if str(path).endswith(_PICKLES) and not path.is_dir():
        raise ValueError(
            f"{path} is not a safetensors file. {_CONVERT.format(path.name.rpartition(':')[2])}"
        )
    if path.exists() or (path.suffix == ".safetensors" and ":" not in str(path)):
        return _local(path)
    match = _REPOSITORY.fullmatch(path_or_repo) if isinstance(path_or_repo, str) else None
    return _fetch(**match.groupdict()) if match else _local(path)


def _local(path: pathlib.Path) -> pathlib.Path:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        others = ", ".join(sorted(p.name for p in file.parent.glob("*"))) or "nothing"
        raise FileNotFoundError(
            f"{file} does not exist (there is {others}). {_CONVERT.format('pytorch_model.bin')}"
        )
    return file


def _fetch(repo: str, revision: str | None, file: str | None) -> pathlib.Path:
    file = file or "model.safetensors"
    site = f"https://huggingface.co/{repo}"
    by_hand = (
        f"Or download {site}/resolve/{revision or 'main'}/{file} by hand and give its path. If "
        f"{site}/tree/{revision or 'main'} has no {file}, name another safetensors file as "
        f"'{repo}:FILE', or convert what it has. {_CONVERT.format('pytorch_model.bin')}"
    )
    what = f"{repo!r} is no path here; {file} of the Hugging Face repository of that name"
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"{what} can be fetched by huggingface_hub only, which is not installed: "
            f"pip install 'resfu_jax[hub]'. {by_hand}"
        ) from error
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
    except (OSError, ValueError) as error:  # of HTTP, too; which classes depends on the version
        raise FileNotFoundError(
            f"{what} could not be fetched: {type(error).__name__}: {str(error).strip()}\n"
            "Check the name (and revision), the connection and, of a gated repository, the access "
            "token (hf auth login). What an earlier run has fetched is found without a connection, "
            f"at once with HF_HUB_OFFLINE=1. {by_hand}"
        ) from error
