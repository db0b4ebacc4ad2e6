"""The official modules that are guided by an image, as peers: see `peers_torch`.

Their repositories are packages (`src`, `anyup`, `featup`, ...), imported from their checkouts. What
a CPU does not have is stood in for by plain PyTorch:

* NATTEN's `na2d` (NAF, RaysUp): `neighborhood_attention` below.
* FeatUp's `AdaptiveConv`: the sum of the taps in place, as ReSFU's.
* CUDA streams, and the parts of torchvision that the modules use to resize.
"""

import contextlib
import dataclasses
import importlib
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from benchmarks.stand_ins import Taps
from benchmarks.workloads import Skip, Workload


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, *, kernel_size, dilation, scale=None, **options: Any
) -> Tensor:
    """natten.na2d, maps (B, H, W, heads, d) with sides that dilation divides.

    A row of queries of a residue class attends to its K rows of keys, all columns of them under a
    mask, in PyTorch's fused attention. Faster on a CPU than a loop over taps or the gathered
    windows of all pixels, which need K K maps.
    """
    b, height, width, heads, _ = q.shape
    (rows, cols), (dr, dc) = kernel_size, dilation
    if height % dr or width % dc:
        raise Skip("the plain neighbourhood attention needs sides that the dilation divides")
    h, w = height // dr, width // dc

    def classes(x: Tensor) -> Tensor:  # (classes, heads, h, w, d)
        x = x.reshape(b, h, dr, w, dc, heads, -1).permute(0, 2, 4, 5, 1, 3, 6)
        return x.reshape(b * dr * dc, heads, h, w, -1)

    first = (torch.arange(w) - cols // 2).clamp(0, w - cols)
    place = torch.arange(w)
    seen = (place[None] >= first[:, None]) & (place[None] < first[:, None] + cols)
    mask = seen[:, None].expand(w, rows, w).reshape(w, rows * w).to(q.device)
    q, k, v = classes(q), classes(k), classes(v)
    out = []
    for i in range(h):
        top = min(max(i - rows // 2, 0), h - rows)
        keys, values = (x[:, :, top : top + rows].flatten(2, 3) for x in (k, v))
        out.append(
            F.scaled_dot_product_attention(q[:, :, i], keys, values, attn_mask=mask, scale=scale)
        )
    y = torch.stack(out, 2).reshape(b, dr, dc, heads, h, w, -1)
    return y.permute(0, 4, 1, 5, 2, 3, 6).reshape(b, height, width, heads, -1)


class _AdaptiveConv:
    @staticmethod
    def apply(x: Tensor, filters: Tensor) -> Tensor:
        taps = filters.flatten(3).permute(0, 3, 1, 2)
        return Taps.apply(taps, x, filters.shape[3], (1, 1))


def _resize(x: Tensor, size: list[int], interpolation: str = "bilinear") -> Tensor:
    """torchvision.transforms.functional.resize of tensors."""
    if interpolation == "nearest":
        return F.interpolate(x, tuple(size), mode="nearest")
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False, antialias=True)


class _Stream:
    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


class _HubMixin:
    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()


def _nothing(*args: Any, **options: Any) -> None:
    """A transform or a loader that the modules make and do not use."""


_MODES = types.SimpleNamespace(BILINEAR="bilinear", NEAREST="nearest")
_SHELLS: dict[str, dict[str, Any]] = {
    "natten": {"na2d": neighborhood_attention},
    "featup.adaptive_conv_cuda": {},
    "featup.adaptive_conv_cuda.adaptive_conv": {"AdaptiveConv": _AdaptiveConv},
    "huggingface_hub": {"PyTorchModelHubMixin": _HubMixin, "hf_hub_download": _nothing},
    "uplift.uplift_extractor": {"UPLiFTExtractor": _nothing},
    "torchvision": {},
    "torchvision.transforms": {"InterpolationMode": _MODES, "Normalize": _nothing},
    "torchvision.transforms.functional": {"resize": _resize},
}


@contextlib.contextmanager
def _checkout(root: pathlib.Path) -> Iterator[None]:
    """Imports from a checkout, whose packages have names that others have, too."""
    before = dict(sys.modules)
    for name in list(sys.modules):
        if (root / name.partition(".")[0]).exists():
            del sys.modules[name]
    for name, content in _SHELLS.items():
        sys.modules[name] = module = types.ModuleType(name)
        vars(module).update(content)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision.transforms"].functional = sys.modules[
        "torchvision.transforms.functional"
    ]
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in set(sys.modules) - set(before):
            if name in _SHELLS or (root / name.partition(".")[0]).exists():
                del sys.modules[name]
        sys.modules.update(before)


Arrange = Callable[[Tensor, Tensor], tuple]


@dataclasses.dataclass(frozen=True)
class _Official:
    """Where a module is, the arguments that make it the workload's, and how it is called."""

    repository: str
    module: str
    cls: str
    arguments: Callable[[Workload], dict[str, Any]]
    arrange: Arrange
    scales: tuple[int, ...] = ()


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[2], image.shape[3]


def _cameras(image: Tensor) -> tuple[Tensor, Tensor]:
    """RaysUp's without a known pose: the identity, a focal length of one image."""
    b, _, h, w = image.shape
    pose = torch.eye(4, dtype=image.dtype, device=image.device).expand(b, 4, 4)
    camera = torch.tensor([w, h, w / 2, h / 2], dtype=image.dtype, device=image.device)
    return pose, camera.expand(b, 4)


OFFICIAL = {
    "naf": _Official(
        "valeoai/NAF",
        "src.model.naf",
        "NAF",
        lambda w: {},
        lambda x, image: (image, x, _size(image)),
    ),
    "jafar": _Official(
        "PaulCouairon/JAFAR",
        "src.upsampler.jafar",
        "JAFAR",
        lambda w: dict(v_dim=w.channels),
        lambda x, image: (image, x, _size(image)),
    ),
    "anyup": _Official(
        "wimmerth/anyup", "anyup.model", "AnyUp", lambda w: {}, lambda x, image: (image, x)
    ),
    "featup": _Official(
        "mhamilton723/FeatUp",
        "featup.upsamplers",
        "JBUStack",
        lambda w: dict(feat_dim=w.channels),
        lambda x, image: (x, image),
        scales=(16,),
    ),
    "loftup": _Official(
        "andrehuang/loftup",
        "upsamplers.upsamplers",
        "LoftUp",
        lambda w: dict(dim=w.channels),
        lambda x, image: (x, image),
    ),
    "raysup": _Official(
        "MAP-RaysUp/RaysUp",
        "src.upsampler.raysup",
        "RaysUp",
        lambda w: {},
        lambda x, image: (image, x, _cameras(image), _size(image)),
    ),
    "uplift": _Official(
        "mwalmer-umd/UPLiFT",
        "uplift.uplift",
        "UPLiFT",
        lambda w: dict(in_channels=w.channels, patch_size=16),
        lambda x, image: (image, x),
        scales=(2, 4, 8, 16),
    ),
}


def build(name: str, w: Workload, root: str) -> tuple[nn.Module, str, dict[str, Any], Arrange]:
    """The official module in evaluation, its name, arguments, and what it is called with.

    Raises:
      Skip: there is none for these sizes, or not in `root`.
    """
    entry = OFFICIAL[name]
    if entry.scales and w.scale not in entry.scales:
        raise Skip(f"the official module does not go x{w.scale}")
    checkout = pathlib.Path(root).resolve() / entry.repository
    if not checkout.is_dir():
        raise Skip(f"{checkout} does not exist")
    arguments = entry.arguments(w)
    config = dict(arguments)
    with (
        _checkout(checkout),
        mock.patch.object(torch.cuda, "Stream", _Stream),
    ):
        official = importlib.import_module(entry.module)
        if name == "uplift":
            file = checkout / "uplift/configs/uplift_dinov3-splus16.yaml"
            settings = yaml.safe_load(file.read_text())["uplift"]
            config["cfg"], arguments["cfg"] = _namespace(settings), settings
        if name == "jafar":
            make = official.create_coordinate
            official.create_coordinate = lambda h, w: make(h, w, device="cpu")
        module = getattr(official, entry.cls)(**config).eval()
        if name == "uplift":
            module.enable_iterative(w.scale.bit_length() - 1)
        if name == "raysup" and not torch.cuda.is_available():
            encoder = module.image_tokenizer.img_encoder
            encoder.forward = types.MethodType(_without_streams(type(encoder)), encoder)
    return module, f"{entry.repository}:{entry.cls}", arguments, entry.arrange


def _without_streams(cls: type) -> Callable:
    """The method as it is, with CUDA's streams stood in for."""
    forward = cls.forward

    def run(self, *args):
        with (
            mock.patch.object(torch.cuda, "current_stream", _Stream),
            mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            mock.patch.object(Tensor, "record_stream", lambda *args: None),
        ):
            return forward(self, *args)

    return run


def _namespace(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return types.SimpleNamespace(**{k: _namespace(v) for k, v in value.items()})
