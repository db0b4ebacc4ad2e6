"""The official PyTorch modules as peers: with `peers_image`, what needs PyTorch, the extra `bench`.

Official files are imported unchanged from checkouts under one root, ROOT/owner/repository. What
they import in turn and a CPU does not have is stood in for:

* operators that exist only as CUDA extensions (ReSFU's `fns_attn`, SAPA's `sim`, `atn`, `deform_qk`
  and `deform_av`, mmcv's `carafe`): plain PyTorch, `stand_ins`. On a GPU an extension that is
  installed is used instead.
* detection and training frameworks that only decorate: empty shells.

CARAFEPack, which mmcv does not offer without its extension, is written out here.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

from benchmarks import peers_image
from benchmarks.call import Call
from benchmarks.stand_ins import (
    carafe,
    deform_reassembly,
    deform_similarity,
    fns_attention,
    fns_attention_plain,
    reassembly,
    similarity,
)
from benchmarks.workloads import Skip, Workload, is_guided
from resfu_jax import from_torch
from resfu_jax.upsamplers import upsampler_entry

# Of official files that leave the argument out.
warnings.filterwarnings("ignore", message="torch.meshgrid")

# --------------------------------------------------------------------------- stand-ins


class CARAFEPack(nn.Module):
    """mmcv.ops.carafe.CARAFEPack with its defaults, around `carafe`."""

    def __init__(self, channels: int, scale_factor: int):
        super().__init__()
        self.scale_factor = scale_factor
        self.channel_compressor = nn.Conv2d(channels, 64, 1)
        self.content_encoder = nn.Conv2d(64, 25 * scale_factor**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """NCHW."""
        masks = self.content_encoder(self.channel_compressor(x))
        masks = F.pixel_shuffle(masks, self.scale_factor).softmax(1)
        return carafe(x, masks, 5, 1, self.scale_factor)


# --------------------------------------------------------------------------- official modules


def _nothing(*args, **kwargs) -> None:
    """Initialises a layer: not needed, as any weights do."""


class _Registry:
    def register_module(self):
        return lambda cls: cls


# Module -> what it offers. Parents come before their children.
_SHELLS: dict[str, dict[str, Any]] = {
    "FNS_Attn": {"fns_attn": fns_attention},
    "sapa": {"sim": similarity, "atn": reassembly},
    "deformsapa": {"deform_qk": deform_similarity, "deform_av": deform_reassembly},
    "mmcv": {},
    "mmcv.cnn": {"xavier_init": _nothing, "ConvModule": None, "build_upsample_layer": None},
    "mmcv.ops": {},
    "mmcv.ops.carafe": {
        "carafe": carafe,
        "CARAFEPack": CARAFEPack,
        "normal_init": _nothing,
        "xavier_init": _nothing,
    },
    "mmcv.runner": {"BaseModule": nn.Module, "ModuleList": nn.ModuleList},
    "timm": {},
    "timm.models": {},
    "timm.models.layers": {"trunc_normal_": nn.init.trunc_normal_, "DropPath": 0, "to_2tuple": 0},
    # The package that an official file believes to be in.
    "official": {},
    "official.models": {},
    "official.models.builder": {"NECKS": _Registry()},
    "official.models.here": {},
}
# Instead of that of `_SHELLS`, for the form `torch.plain`.
_PLAIN = {"FNS_Attn": {"fns_attn": fns_attention_plain}}


@contextlib.contextmanager
def _shells(directory: pathlib.Path, shells: dict[str, dict[str, Any]] = _SHELLS) -> Iterator[None]:
    """Puts the shells where `import` finds them, for files that lie in `directory`."""
    # torch.compile imports a module's file again: what was loaded last stays until here.
    for name in list(sys.modules):
        if name.partition(".")[0] == "official":
            del sys.modules[name]
    before = dict(sys.modules)
    packages = {name.partition(".")[0] for name in shells}
    cuda = torch.cuda.is_available()
    real = {package for package in packages if cuda and importlib.util.find_spec(package)}
    for name, content in shells.items():
        if name.partition(".")[0] not in real:
            sys.modules[name] = module = types.ModuleType(name)
            vars(module).update(content)
    sys.modules["official.models.here"].__path__ = [str(directory)]
    # On a machine without CUDA, ReSFU's constructor could not put its blur kernel there.
    stay = mock.patch.object(Tensor, "cuda", lambda self, *args, **kwargs: self)
    try:
        with contextlib.nullcontext() if cuda else stay:
            yield
    finally:
        for name in set(sys.modules) - set(before):
            if name in shells and name.partition(".")[0] != "official":
                del sys.modules[name]
        sys.modules.update({n: m for n, m in before.items() if n in shells})


@dataclasses.dataclass(frozen=True)
class _Official:
    """Where a module is, and the arguments that make it the workload's."""

    repository: str
    file: str
    cls: str
    arguments: Callable[[Workload], dict[str, Any]]
    only_scale: int | None = None
    result: int | None = None  # which of several


def _guided(w: Workload) -> dict[str, Any]:
    return dict(dim_y=w.guide, dim_x=w.channels)


_RESFU = _Official(
    "zmhhmz/ReSFU",
    # The demo's file is the same, but for an unused nearest-neighbour upsampling at full width.
    "mmsegmentation/mmseg/models/upsamplers/resfu.py",
    "ReSFU",
    lambda w: _guided(w) | dict(scale_factor=w.scale),
)
_SAPA = dict(arguments=lambda w: _guided(w) | dict(up_factor=w.scale, embedding_dim=32))
_FADE = dict(
    repository="poppinace/fade",
    file="FADE_L2H.py",
    arguments=lambda w: dict(in_channels_en=w.guide, in_channels_de=w.channels),
    only_scale=2,
)
_DYSAMPLE = _Official(
    "tiny-smart/dysample",
    "dysample.py",
    "DySample",
    lambda w: dict(in_channels=w.channels, scale=w.scale),
)
_OFFICIAL = {
    "freqfusion": _Official(
        "Linwei-Chen/FreqFusion",
        "FreqFusion.py",
        "FreqFusion",
        lambda w: dict(hr_channels=w.guide, lr_channels=w.channels),
        only_scale=2,
        result=2,
    ),
    "resfu": _RESFU,
    "resfu_segmenter": _RESFU,
    "resfu_segformer": _RESFU,
    "sapa": _Official("poppinace/sapa", "SAPA.py", "SAPA", **_SAPA),
    "sapa_g": _Official("poppinace/sapa", "SAPAExp.py", "SAPAExp", **_SAPA),
    "sapa_deform": _Official("tiny-smart/sapa", "sapa_deform.py", "SAPADeform", **_SAPA),
    "fade": _Official(cls="FADE", **_FADE),
    "fade_lite": _Official(cls="FADELite", **_FADE),
    "semishift": _Official(cls="SemiShiftUp", **_FADE),
    "dysample": _DYSAMPLE,
    "dysample_plus": _DYSAMPLE,
    "dysample_s": _DYSAMPLE,
    "dysample_s_plus": _DYSAMPLE,
    "lda_aqu": _Official(
        "duzw9311/LDA-AQU",
        "mmdet/models/necks/fpn_lau.py",
        "LDA_AQU",
        lambda w: dict(in_channels=w.channels, scale_factor=float(w.scale)),
    ),
}


class Peer:
    """An official module for a workload.

    Args:
      module: the PyTorch module.
      official: its name for `from_torch`; None if it has no weights.
      arguments: of its constructor.
      arrange: features and, if it takes one, the guide -> what it is called with.
    """

    def __init__(
        self,
        module: nn.Module,
        official: str | None,
        arguments: dict[str, Any],
        arrange: Callable[..., tuple],
    ):
        self.module, self._arrange = module, arrange
        self._official, self._arguments = official, arguments

    def parameters(self) -> nnx.State | None:
        """Its weights as the state of our module."""
        if self._official is None:
            return None
        return nnx.state(from_torch(self._official, self.module.state_dict(), **self._arguments))

    def call(
        self, inputs: list[jax.Array], cotangent: jax.Array | None, dtype: str, *, compiled: bool
    ) -> Call:
        """The module as a form; `compiled` by torch.compile.

        Args:
          inputs: features and, if guided, the guide, NHWC, where the module shall run.
          cotangent: of the output, for gradients too.
          dtype: of the computation.
          compiled: by `torch.compile`.
        """
        tensors = [_channels_first(a) for a in inputs]
        module = self.module.to(tensors[0].device, getattr(torch, dtype))
        # Constants that official modules keep as plain attributes.
        for m in module.modules():
            for key, value in vars(m).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    setattr(m, key, value.to(tensors[0]))
        called = module
        if compiled:
            # Layouts of its own choice break ReSFU's gradient (PyTorch 2.15).
            called = torch.compile(module, options={"layout_optimization": False})
        order = self._arrange(*tensors)

        if cotangent is None:

            def run():
                with torch.inference_mode():
                    return _done([called(*order)])
        else:
            weights = list(module.parameters())
            ct = _channels_first(cotangent)
            for t in tensors:
                t.requires_grad_()

            def run():
                y = called(*order)
                gradients = torch.autograd.grad(y, [*tensors, *weights], ct, allow_unused=True)
                return _done([y, *gradients])

        def arrays(result: list[Tensor | None]) -> list[np.ndarray]:
            kept = result[: 1 + (len(tensors) if cotangent is not None else 0)]
            return [t.detach().permute(0, 2, 3, 1).float().cpu().numpy() for t in kept]

        start, seconds = time.perf_counter(), None
        if compiled:
            run()
            seconds = time.perf_counter() - start
        return Call(run, arrays, _temporary(run), seconds)


def build(name: str, w: Workload, root: str, *, plain: bool = False) -> Peer:
    """The official module that `name` stands for, with random weights, the same at every call.

    Args:
      name: of our upsampler.
      w: sizes.
      root: directory of the checkouts.
      plain: with the stand-in as one writes it first, not the fastest.

    Raises:
      Skip: there is no official module, none for these sizes, or not in `root`; no plain stand-in.
    """
    if plain and not name.startswith("resfu"):
        raise Skip("only ReSFU has a plain stand-in")
    torch.manual_seed(0)
    options = upsampler_entry(name).options
    c, r = w.channels, w.scale
    if name == "carafe":
        arguments = dict(channels=c, scale_factor=r)
        return Peer(CARAFEPack(**arguments), "open-mmlab/mmcv:CARAFEPack", arguments, _alone)
    if name in ("nearest", "bilinear", "bicubic"):
        return Peer(nn.Upsample(scale_factor=r, mode=name), None, {}, _alone)
    if name == "deconv":
        arguments = dict(in_channels=c, out_channels=c, kernel_size=r, stride=r)
        module = nn.ConvTranspose2d(**arguments)
        return Peer(module, "pytorch/pytorch:ConvTranspose2d", arguments, _alone)
    if name == "pixel_shuffle":
        module = nn.Sequential(nn.Conv2d(c, c * r**2, 3, padding=1), nn.PixelShuffle(r))
        arguments = dict(in_channels=c, out_channels_conv=c * r**2, upscale_factor=r)
        official = "pytorch/pytorch:Sequential(Conv2d, PixelShuffle)"
        return Peer(module, official, arguments, _alone)
    if name in peers_image.OFFICIAL:
        return Peer(*peers_image.build(name, w, root))
    if name not in _OFFICIAL:
        raise Skip("no official module")

    entry = _OFFICIAL[name]
    if entry.only_scale not in (None, r):
        raise Skip(f"the official module is x{entry.only_scale} only")
    file = pathlib.Path(root) / entry.repository / entry.file
    if not file.is_file():
        raise Skip(f"{file} does not exist")
    options = {} if entry.only_scale else options  # FADE's forms are classes, not options
    arguments = entry.arguments(w) | options
    with _shells(file.parent, _SHELLS | _PLAIN if plain else _SHELLS):
        official = importlib.import_module(f"official.models.here.{file.stem}")
        module = getattr(official, entry.cls)(**arguments)
    if entry.result is not None:
        forward = module.forward
        module.forward = lambda *inputs: forward(*inputs)[entry.result]
    arrange = _guide_first if is_guided(name) else _alone
    return Peer(module, f"{entry.repository}:{entry.cls}", arguments, arrange)


def _alone(x: Tensor) -> tuple[Tensor]:
    return (x,)


def _guide_first(x: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
    return guide, x


def _channels_first(a: jax.Array) -> Tensor:
    return torch.from_dlpack(a).permute(0, 3, 1, 2).contiguous()


def _done(results: list[Tensor | None]) -> list[Tensor | None]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return results


def _temporary(run: Callable[[], list[Tensor | None]]) -> int:
    """Most bytes of tensors alive at once in a call, less those of its results."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no progress reports
        with torch.profiler.profile(profile_memory=True) as profile:
            results = run()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        peak = max(itertools.accumulate(e.nbytes() for e in events), default=0)
    return peak - sum(t.nbytes for t in results if t is not None)
