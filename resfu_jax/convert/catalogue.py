"""The released weights of upsamplers: where their authors publish them, and how they are meant.

Facts are those of the official repositories (README, hubconf.py, code of the release), read at the
commits that the golden files name. What could not be confirmed is None. Sums and sizes of files are
those of GitHub's releases; of files of the hub, the hub states the sum, and it is compared, too.
Weights are named, checked and loaded here, and never redistributed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from resfu_jax._names import lookup

Image = Literal["imagenet", "clip", "half", "unit", "any"]


@dataclasses.dataclass(frozen=True)
class Release:
    """One published checkpoint of an upsampler.

    Attributes:
      member: the upsampler's name in the registry.
      weights: address of the file, or `"owner/name:file"` in the Hugging Face hub.
      license: of the repository that publishes it; none of them states another one for its weights.
      official_class: as `from_torch` takes it.
      arguments: of the official constructor.
      backbone: whose features it was trained for; "any" where it takes those of all.
      features: channels of the features; None for any number.
      image: RGB values of 0 .. 1 as they were in training: `"imagenet"`, less the mean (0.485,
        0.456, 0.406) and over the deviation (0.229, 0.224, 0.225); `"clip"`, less (0.481, 0.458,
        0.408), over (0.269, 0.261, 0.276); `"half"`, less 0.5, over 0.5; `"unit"`, as they are;
        `"any"`: it scales the image itself.
      sha256: of the file.
      size: of the file, in bytes.
      note: what else is to be known.
    """

    member: str
    weights: str
    license: str | None
    official_class: str
    arguments: Mapping[str, Any]
    backbone: str
    features: int | None
    image: Image
    sha256: str | None = None
    size: int | None = None
    note: str = ""

    @property
    def url(self) -> str:
        """Address of the file."""
        if self.weights.startswith("https://"):
            return self.weights
        repository, _, file = self.weights.partition(":")
        return f"https://huggingface.co/{repository}/resolve/main/{file}"

    def facts(self) -> dict[str, str]:
        """What a table or a page says about it."""
        return {
            "member": self.member,
            "backbone": self.backbone,
            "channels": str(self.features or "any"),
            "image": self.image,
            "licence": self.license or "not stated",
            "MB": f"{self.size / 1e6:.1f}" if self.size else "",
        }


def _anyup(file: str, **facts: Any) -> Release:
    return Release(
        "anyup",
        f"https://github.com/wimmerth/anyup/releases/download/{file}",
        "CC BY 4.0",
        "wimmerth/anyup:AnyUp",
        {},
        features=None,
        image="imagenet",
        **facts,
    )


def _jafar(file: str, backbone: str, features: int, image: Image, note: str = "") -> Release:
    return Release(
        "jafar",
        f"https://github.com/PaulCouairon/JAFAR/releases/download/Weights/{file}.pth",
        "Apache-2.0",
        "PaulCouairon/JAFAR:JAFAR",
        dict(v_dim=features),
        backbone,
        features,
        image,
        note=note,
    )


def _loftup(name: str, backbone: str, features: int, lr_size: int) -> Release:
    return Release(
        "loftup",
        f"haiwen/loftup-{name}:pytorch_model.bin",
        "MIT",
        "andrehuang/loftup:UpsamplerwithChannelNorm",
        dict(dim=features, lr_size=lr_size),
        backbone,
        features,
        "any",
    )


_FEATUP = "https://marhamilresearch4.blob.core.windows.net/feature-upsampling-public/pretrained"


def _featup(name: str, backbone: str, features: int, *, norm: bool) -> Release:
    note = "normalises the features first, over channels" if norm else ""
    return Release(
        "featup",
        f"{_FEATUP}/{'' if norm else 'no_norm/'}{name}_jbu_stack_cocostuff.ckpt",
        "MIT",
        "mhamilton723/FeatUp:JBUStack",
        dict(feat_dim=features),
        backbone,
        features,
        "imagenet",
        note=note,
    )


def _uplift(
    name: str,
    backbone: str,
    features: int,
    patch: int,
    image: Image,
    *,
    cfg: Mapping[str, Any],
    iters: int,
) -> Release:
    return Release(
        "uplift",
        f"UPLiFT-upsampler/uplift_{name}:uplift_{name}.safetensors",
        "MIT",
        "mwalmer-umd/UPLiFT:UPLiFT",
        dict(in_channels=features, patch_size=patch, cfg=cfg, iters=iters),
        backbone,
        features,
        image,
    )


def _blocks(block: str, norm: str, *widths: int) -> dict[str, Any]:
    return dict(block=block, norm=norm, count=len(widths), hc=list(widths))


def _cfg(
    encoder: list[dict[str, Any]], decoder: list[dict[str, Any]], noise: int
) -> dict[str, Any]:
    """What uplift/configs/*.yaml of the official repository say about the network."""
    enlarged = dict(up_op="tconv", factor=2, residual="bilinear")
    kept = dict(down_op="none", factor=1.0, residual="none")
    return dict(
        up_factor=2,
        attender=17,
        enc_share=True,
        encoder=dict(down_steps=4)
        | {f"block_{i}": block for i, block in enumerate(encoder)}
        | {f"down_{i}": kept for i in range(1, 5)},
        decoder=dict(up_steps=1, ncat_c=noise, ncat_s=1, enc_resample="nearest", up_1=enlarged)
        | {f"block_{i}": block for i, block in enumerate(decoder)},
    )


_DINO_CFG = _cfg(
    [_blocks("SingleConv", "batch", n) for n in (16, 32, 64, 128, 128)],
    [_blocks("DoubleConv", "batch", 64)] * 2,
    noise=0,
)
_VAE_CFG = _cfg(
    [_blocks("SingleConv", "layer", n, n) for n in (64, 128, 256, 512, 512)],
    [_blocks("SingleConv", "layer", *[512] * count) for count in (1, 2)],
    noise=4,
) | dict(
    no_UEP=True,
    refiner=dict(
        enc_resample="nearest",
        ncat_c=4,
        ncat_s=1,
        ref_con=-1,
        block_0=_blocks("SingleConv", "layer", *[512] * 12),
    ),
)

_SWAPPED = "the table of the official README has this file and that of the other ViT-B/16 swapped"

RELEASES: dict[str, Release] = {
    "naf": Release(
        "naf",
        "https://github.com/valeoai/NAF/releases/download/model/naf_release.pth",
        "Apache-2.0",
        "valeoai/NAF:NAF",
        {},
        "any",
        None,
        "imagenet",
        sha256="c096c1ab2217a5c3ac136365f721685e2201379cb69d509cfb0261183847c98f",
        size=2_664_431,
    ),
    "anyup": _anyup(
        "checkpoint/anyup_paper.pth",
        backbone="any",
        sha256="9d035c0f27114a6f32bdd3d8ed93b6cd39dad4b8f8bf94e69fddbfbf022901b2",
        size=3_540_612,
        note="the paper's, trained on DINOv2 S/14",
    ),
    "anyup_multi_backbone": _anyup(
        "checkpoint_v2/anyup_multi_backbone.pth",
        backbone="any",
        sha256="b6cc407da8986c7e5c9098e61f7531767a9aca8fff20a1bc6c99d488e61aac59",
        size=3_541_624,
        note="trained on DINOv2 S with and without registers, CLIP B, SigLIP B and ViT-B",
    ),
    # The files are named as timm names the backbones.
    "jafar_vitb16": _jafar("vit_base_patch16_224", "ViT-B/16", 768, "half", _SWAPPED),
    "jafar_dino_vitb16": _jafar(
        "vit_base_patch16_224.dino", "DINO B/16", 768, "imagenet", _SWAPPED
    ),
    "jafar_dinov2_vits14": _jafar(
        "vit_small_patch14_dinov2.lvd142m", "DINOv2 S/14", 384, "imagenet"
    ),
    "jafar_dinov2_vitb14": _jafar(
        "vit_base_patch14_dinov2.lvd142m", "DINOv2 B/14", 768, "imagenet"
    ),
    "jafar_dinov2_reg_vits14": _jafar(
        "vit_small_patch14_reg4_dinov2", "DINOv2 S/14, registers", 384, "imagenet"
    ),
    "jafar_clip_vitb16": _jafar("vit_base_patch16_clip_384", "CLIP B/16", 768, "clip"),
    "jafar_siglip2_vitb16": _jafar(
        "vit_base_patch16_siglip_512.v2_webli", "SigLIP 2 B/16", 768, "half"
    ),
    # Names of the official hubconf.py from here on.
    "loftup_dinov2s": _loftup("dinov2s", "DINOv2 S/14", 384, 16),
    "loftup_dinov2s_reg": _loftup("dinov2s_reg", "DINOv2 S/14, registers", 384, 16),
    "loftup_dinov2b": _loftup("dinov2b", "DINOv2 B/14", 768, 14),
    "loftup_dinov2b_reg": _loftup("dinov2b_reg", "DINOv2 B/14, registers", 768, 14),
    "loftup_clip": _loftup("clip", "CLIP B/16", 512, 14),
    "loftup_siglip": _loftup("siglip", "SigLIP B/16", 768, 14),
    "loftup_siglip2": _loftup("siglip2", "SigLIP 2 B/16", 768, 14),
    **{
        f"featup_{name}{'' if norm else '_no_norm'}": _featup(name, backbone, features, norm=norm)
        for name, backbone, features in (
            ("dino16", "DINO S/16", 384),
            ("dinov2", "DINOv2 S/14", 384),
            ("clip", "CLIP B/16", 512),
            ("maskclip", "MaskCLIP B/16", 512),
            ("vit", "ViT-S/16", 384),
            ("resnet50", "ResNet-50", 2048),
        )
        for norm in (True, False)
        if not (norm and name == "maskclip")
    },
    "uplift_dinov2_s14": _uplift(
        "dinov2-s14", "DINOv2 S/14", 384, 14, "imagenet", cfg=_DINO_CFG, iters=4
    ),
    "uplift_dinov3_splus16": _uplift(
        "dinov3-splus16", "DINOv3 S+/16", 384, 16, "imagenet", cfg=_DINO_CFG, iters=4
    ),
    "uplift_sd15_vae": _uplift("sd1.5vae", "VAE of SD 1.5", 4, 8, "unit", cfg=_VAE_CFG, iters=2),
}


def find_releases(name: str) -> dict[str, Release]:
    """The release of that name, or those of that member of the registry.

    Raises:
      ValueError: there is none; near matches are named.
    """
    if name in RELEASES:
        return {name: RELEASES[name]}
    members = dict.fromkeys(sorted({release.member for release in RELEASES.values()}))
    lookup("released weights", members | RELEASES, name)
    return {n: release for n, release in RELEASES.items() if release.member == name}
