"""Published checkpoints, by path or Hugging Face repository, -> models of this library."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx
from flax.typing import Dtype

from resfu_jax.backbones import create_backbone
from resfu_jax.backbones.mit import MiT
from resfu_jax.backbones.resnet import ResNet
from resfu_jax.backbones.vit import ViT
from resfu_jax.convert import resnet, segformer, vit
from resfu_jax.convert._files import read_weights
from resfu_jax.convert._places import beginnings, below, load_from
from resfu_jax.convert._state import Misfit, entries_of, shape_of
from resfu_jax.model import SegmentationModel

Loader = Callable[[Mapping[str, Any], nnx.Module, str], list[str]]


class _Family(NamedTuple):
    model: type[nnx.Module]
    # Sets the entries of a file in a module in place, or raises a `Misfit`, and returns the names
    # of the entries it has not used.
    load: Loader
    # Our names and the shapes of a file -> which network it is, or None.
    describe: Callable[[Mapping[str, tuple[int, ...]]], str | None]


_FAMILIES = (
    _Family(MiT, segformer.load_mit, segformer.describe),
    _Family(ResNet, resnet.load_resnet, resnet.describe),
    _Family(ViT, vit.load_vit, vit.describe),
    _Family(SegmentationModel, segformer.load_segformer, segformer.describe),
)
# Names and shapes of a file -> the arguments of `create_backbone` that it is of, or None.
_RECOGNISED: dict[str, Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any] | None]] = {
    "vit": vit.options_of,
    "mit": segformer.options_of,
    "resnet": resnet.options_of,
}


def load_pretrained(
    path_or_repo: str | os.PathLike[str], model: nnx.Module, *, prefix: str | None = None
) -> list[str]:
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
      authors, a DINOv3 of transformers, or the encoder of a MIRL, by the names of PaddlePaddle. A
      classifier is left out unless the model has one.

    The entries may have a prefix, of a wrapper (`module.`, `_orig_mod.`), of a trainer's checkpoint
    (`state_dict.`, `teacher.backbone.`) or of a larger model (`backbone.`): the one place that has
    all of them, with their shapes, is taken, and what is not below its prefix is left out.

    To start from a pretrained backbone with another head, pass `model.backbone`.

        load_pretrained("nvidia/mit-b1", model.backbone)
        load_pretrained("timm/resnet50.a1_in1k", ResNet("50", rngs=nnx.Rngs(0)))
        load_pretrained("~/dino_checkpoint.pth", ViT("small", rngs=nnx.Rngs(0)), prefix="teacher")

    Args:
      path_or_repo: a `.safetensors` file; a `.pth`, `.pt`, `.bin` or `.ckpt` file of `torch.save`,
        of which nothing is executed; an `.npz` file of arrays; `model.safetensors.index.json`
        beside its shards; a folder with one of those, called `model.safetensors` or
        `pytorch_model.bin`; a repository of the Hugging Face hub, `"owner/name"`,
        `"owner/name@revision"`, `"owner/name:file"` or `"owner/name@revision:file"`, whose file is
        fetched by https into the hub's cache and compared with the SHA-256 that the hub has for it
        (that needs `pip install 'resfu_jax[hub]'`); or the address of a file, `"https://..."`. What
        exists as a path is read as one; `~` is the home folder.
      model: module of the sizes of the checkpoint. It may hold shapes only (`nnx.eval_shape`).
      prefix: where the entries are, for files that have them in several places, or where to look
        for them; `""` is the top alone.

    Returns:
      The entries of the file that were not used, sorted.

    Raises:
      FileNotFoundError: no such file, or it could not be fetched; the error says what to do.
      ValueError: a file in another format; a model that no loader is for; entries in several
        places; missing, unexpected or misshapen entries. The likely cause comes first, then counts
        and names: all of them up to a screen. `model` is then unchanged.
    """
    load = _loader(model)
    entries = entries_of(read_weights(path_or_repo))

    def loaded(own: Mapping[str, Any]) -> tuple[nnx.Module, list[str]]:
        # Into a copy, so that an error leaves the model whole.
        copy = nnx.clone(model)
        return copy, load(own, copy, os.fspath(path_or_repo))

    try:
        (filled, unused), at = load_from(entries, loaded, prefix=prefix)
    except Misfit as error:
        error.causes[:0] = _causes(error, entries, model, os.fspath(path_or_repo))
        raise
    nnx.update(model, nnx.state(filled))
    outside = [name for name in entries if not name.startswith(at)]
    return sorted([at + name for name in unused] + outside)


def load_backbone(
    path_or_repo: str | os.PathLike[str], *, dtype: Dtype | None = None, **options: Any
) -> nnx.Module:
    """The backbone whose published checkpoint this is: built as its entries say, and loaded.

        vit = load_backbone("facebook/dinov2-small")
        vit = load_backbone("vit_tiny_patch16_224.safetensors")

    Args:
      path_or_repo: as for `load_pretrained`: a `MiT`, `ResNet` or `ViT` that this loads.
      dtype: compute type of the backbone.
      **options: arguments of its class, over those that the entries tell: `prefix` of
        `load_pretrained`; for a `ViT`, `heads`, if there is not one for every 64 channels,
        `antialias`, `norm_epsilon`, `image_size`, if its positions are not a square.

    Raises:
      FileNotFoundError, ValueError: as `load_pretrained`; a ValueError also where no backbone that
        is known has such entries.
    """
    prefix = options.pop("prefix", None)
    entries = entries_of(read_weights(path_or_repo))
    shapes = {name: shape_of(value) for name, value in entries.items()}
    parts = [name.split(".") for name in shapes]
    places = {".".join(names[:i]) + "." * (i > 0) for names in parts for i in range(len(names))}
    for at in sorted(places, key=lambda at: (at.count("."), at)):
        inside = below(shapes, at)
        for name, recognise in _RECOGNISED.items():
            found = recognise(inside)
            if found is None:
                continue
            arguments = {**found, **options, "dtype": dtype}
            backbone = create_backbone(name, **arguments, rngs=nnx.Rngs(0))
            load_pretrained(path_or_repo, backbone, prefix=prefix)
            return backbone
    raise ValueError(
        f"{os.fspath(path_or_repo)} holds no backbone that is recognised (MiT, ResNet, ViT, DINO "
        f"family); {beginnings(shapes)}. Build it with create_backbone and load_pretrained"
    )


def load_classifier(
    path_or_repo: str | os.PathLike[str], *, dtype: Dtype | None = None, **options: Any
) -> ViT:
    """The ViT whose published checkpoint this is, with its classifier: `ViT.classify`.

        vit = load_classifier("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")

    Args:
      path_or_repo: as for `load_pretrained`: a `ViT` that this loads, with the entries
        `head.weight` of timm or `classifier.weight` of transformers.
      dtype: compute type.
      **options: as for `load_backbone`.

    Raises:
      FileNotFoundError, ValueError: as `load_backbone`; a ValueError also for weights of another
        network, or without a classifier.
    """
    shapes = {name: shape_of(value) for name, value in read_entries(path_or_repo).items()}
    heads = {
        shape[0]
        for name, shape in shapes.items()
        if re.search(r"(^|\.)(head|classifier)\.weight$", name) and len(shape) == 2
    }
    is_vit = any(name.endswith("cls_token") for name in shapes)
    if not is_vit or len(heads) != 1:
        raise ValueError(
            f"{os.fspath(path_or_repo)} holds no {'classifier of the ViT' if is_vit else 'ViT'}: "
            "give weights of a ViT that were trained or fine-tuned to classify, such as "
            "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
        )
    vit = load_backbone(path_or_repo, dtype=dtype, num_classes=heads.pop(), **options)
    assert isinstance(vit, ViT)
    return vit


def read_entries(path_or_repo: str | os.PathLike[str]) -> dict[str, Any]:
    """The entries of a file of weights, by name; what NumPy makes arrays of.

    Args:
      path_or_repo: as for `load_pretrained`, or a file of `resfu_jax.export`, whose names are those
        of our own modules.

    Raises:
      FileNotFoundError, ValueError: as `load_pretrained`.
    """
    return entries_of(read_weights(path_or_repo))


def _family(model: nnx.Module) -> _Family:
    for family in _FAMILIES:
        if isinstance(model, family.model):
            return family
    known = ", ".join(family.model.__name__ for family in _FAMILIES)
    raise ValueError(f"model must be one of {known}, got {type(model).__name__}")


def _loader(model: nnx.Module) -> Loader:
    if isinstance(model, SegmentationModel):
        segformer.check_segformer(model)
    return _family(model).load


def _causes(error: Misfit, entries: Mapping[str, Any], model: nnx.Module, source: str) -> list[str]:
    """What the file is, if it is not what the model is."""
    if any(
        name.startswith(("backbone.", "head.")) and name.endswith(".kernel") for name in entries
    ):
        return ["it holds a model of this library: config.init_from starts a run from it"]
    shapes = {name: shape_of(value) for name, value in entries.items()}
    ours = _family(model).describe(error.wanted)
    tops = sorted({name.partition(".")[0] + "." for name in shapes})
    for at in ["", *tops[:20]]:
        inside = below(shapes, at)
        theirs = next((kind for f in _FAMILIES if (kind := f.describe(inside)) is not None), None)
        if theirs is not None:
            return [] if theirs == ours else [f"it holds {theirs}, and the model is {ours}"]
    if re.search(r"-\d{5}-of-\d{5}\.", source):
        return ["it is one of several shards: give the index (*.index.json), or the folder"]
    return []
