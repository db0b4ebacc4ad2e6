"""What a `FeaturePipeline` is made of: upsamplers with their weights, and colours of images."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import nnx

from resfu_jax._checks import is_number, need
from resfu_jax._names import lookup
from resfu_jax.backbones import ViT
from resfu_jax.convert import load_upsampler
from resfu_jax.convert._files import read_beside
from resfu_jax.convert.catalogue import RELEASES, find_releases
from resfu_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD
from resfu_jax.upsamplers import create_upsampler, list_upsamplers, upsampler_entry

Three = tuple[float, float, float]
Colours = Literal["imagenet", "half", "clip", "unit"]
Normalisation = Colours | tuple[Sequence[float], Sequence[float]]

# Mean and deviation in 0 .. 255 of the ways in which images are normalised; names as in the
# catalogue of released weights.
COLOURS: dict[str, tuple[Three, Three]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((127.5,) * 3, (127.5,) * 3),
    "clip": (
        (255 * 0.48145466, 255 * 0.4578275, 255 * 0.40821073),
        (255 * 0.26862954, 255 * 0.26130258, 255 * 0.27577711),
    ),
    "unit": ((0.0,) * 3, (255.0,) * 3),
}


def check_upsampler(upsampler: Any, weights: Any) -> None:
    """Raises a `ValueError` for what is no upsampler, or takes no weights."""
    if isinstance(upsampler, str):
        known = dict.fromkeys([*list_upsamplers(), *RELEASES])
        lookup("upsampler", known, upsampler)
        need(
            weights is None or is_released(upsampler),
            f"weights are read for upsamplers with released ones; of {upsampler!r} there are none: "
            "give the module with its weights, such as a GuidedUpsampler",
        )
        return
    need(
        isinstance(upsampler, nnx.Module) and weights is None,
        f"upsampler must be a name, or a module, which has its weights; got "
        f"{type(upsampler).__name__} with weights={weights!r}",
    )
    member = getattr(upsampler, "upsample", upsampler)
    guided = getattr(upsampler, "stem", None) is not None
    need(
        getattr(member, "guide", None) in ("none", "image") or guided,
        f"upsampler must be guided by the image or not at all, got {type(member).__name__}, which "
        "is guided by features: a GuidedUpsampler makes these of the image",
    )


def is_released(name: str) -> bool:
    """Whether there are released weights of this name, or of the upsampler of this name."""
    return name in RELEASES or name in {release.member for release in RELEASES.values()}


def create_member(
    upsampler: Any,
    weights: Any,
    channels: int,
    *,
    scale: int,
    normalisation: Normalisation | None,
) -> tuple[nnx.Module, tuple[Three, Three]]:
    """The module for so many channels, and the colours of its images."""
    if not isinstance(upsampler, str):
        member = getattr(upsampler, "upsample", upsampler)
        stem = getattr(upsampler, "stem", None)
        need(
            stem is None or normalisation is None,
            "image_normalisation must be None for a GuidedUpsampler that makes its guide itself",
        )
        own = getattr(member, "image", "imagenet")
        return upsampler, _colours(normalisation or own, "image_normalisation")
    if is_released(upsampler):
        releases = find_releases(upsampler)
        fit = {n: r for n, r in releases.items() if r.features in (None, channels)}
        need(
            bool(fit),
            f"upsampler {upsampler!r} has released weights for features of "
            f"{', '.join(sorted({str(r.features) for r in releases.values()}))} channels, and "
            f"these have {channels}: naf and anyup take any number",
        )
        ways = {release.image for release in fit.values()}
        member = upsampler_entry(next(iter(fit.values())).member).cls
        if normalisation is None:
            need(
                len(ways) == 1,
                f"upsampler {upsampler!r} was released for images normalised in several ways "
                f"({', '.join(sorted(ways))}): name the release, one of {', '.join(fit)}, or give "
                "image_normalisation",
            )
            (way,) = ways
            normalisation = member.image if way == "any" else way
        # The release whose width fits, where there are several and the file is given.
        name = next(iter(fit)) if weights is not None else upsampler
        return load_upsampler(name, weights), _colours(normalisation, "image_normalisation")
    entry = upsampler_entry(upsampler)
    if entry.cls.guide == "features":
        from resfu_jax.self_supervised import GuidedUpsampler

        module: Any = GuidedUpsampler(upsampler, channels, scale=scale, rngs=nnx.Rngs(0))
    else:
        module = create_upsampler(upsampler, features=channels, scale=scale, rngs=nnx.Rngs(0))
    if jax.tree.leaves(nnx.state(module, nnx.Param)):
        warnings.warn(
            f"upsampler {upsampler!r} is untrained: its weights are random, and its features worse "
            "than those of 'bilinear'. Fit it to photos without labels "
            "(resfu_jax.self_supervised.fit) and give the module; or take 'naf' or 'anyup', whose "
            "released weights are fetched, or 'jbu' or 'upsample_anything', which have none",
            stacklevel=4,
        )
    own = getattr(module, "image", "imagenet")
    return module, _colours(normalisation or own, "image_normalisation")


def backbone_colours(
    backbone: Any, source: Any, normalisation: Normalisation | None
) -> tuple[Three, Three]:
    """Mean and deviation of the images that a backbone was trained with."""
    if normalisation is not None:
        return _colours(normalisation, "normalisation")
    if source is not None:
        said = read_beside(source, "preprocessor_config.json") or {}
        config = read_beside(source, "config.json") or {} if not said else {}
        config = config.get("pretrained_cfg", config)
        for mean, std in (
            (said.get("image_mean"), said.get("image_std")),
            (config.get("mean"), config.get("std")),
        ):
            if _are_three(mean) and _are_three(std):
                return _three(mean, 255), _three(std, 255)
    mean, std = getattr(backbone, "mean", None), getattr(backbone, "std", None)
    if _are_three(mean) and _are_three(std):
        return _three(mean), _three(std)
    plain = isinstance(backbone, ViT) and backbone.block(0).attention_scale is None
    need(
        not plain,
        "normalisation is needed: plain ViTs were published with several, and nothing beside the "
        "weights says which. 'half' is that of Google's and timm's augreg ViTs, 'imagenet' that of "
        "DINO, DeiT and MAE, 'clip' that of CLIP",
    )
    return COLOURS["imagenet"]


def _colours(normalisation: Any, name: str) -> tuple[Three, Three]:
    if isinstance(normalisation, str):
        return lookup(name, COLOURS, normalisation)
    pair = isinstance(normalisation, tuple | list) and len(normalisation) == 2
    need(
        pair and all(map(_are_three, normalisation)) and min(normalisation[1]) > 0,
        f"{name} must be one of {', '.join(COLOURS)}, or a mean and a deviation of three numbers "
        f"in 0 .. 255, got {normalisation!r}",
    )
    return _three(normalisation[0]), _three(normalisation[1])


def _are_three(values: Any) -> bool:
    return isinstance(values, tuple | list) and len(values) == 3 and all(map(is_number, values))


def _three(values: Any, factor: float = 1) -> Three:
    a, b, c = (factor * float(v) for v in values)
    return a, b, c
