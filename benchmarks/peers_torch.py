"""The official PyTorch modules as peers: with `peers_image`, what needs PyTorch, the extra `bench`.

Official files are imported unchanged from checkouts under one root, ROOT/owner/repository. What
they import in turn and a CPU does not have is stood in for:

* operators that exist only as CUDA extensions (ReSFU's `fns_attn`, SAPA's `sim`, `atn`, `deform_qk`
  and `deform_av`, mmcv's `carafe`): plain PyTorch, in the fastest of the forms that were tried on
  a CPU (`fns_attention`, `reassembly` and `similarity` below say which). On a GPU an extension
  that is installed is used instead.
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
from benchmarks.measure import Call
from benchmarks.workloads import Skip, Workload, is_guided
from resfu_jax import from_torch
from resfu_jax.upsamplers import upsampler_entry

# Of official files that leave the argument out.
warnings.filterwarnings("ignore", message="torch.meshgrid")

# --------------------------------------------------------------------------- stand-ins


class _Taps(torch.autograd.Function):
    """Sum of the K*K shifts of an upsampled and padded map, each times its weight.

    In place, tap after tap in blocks that stay in the cache. Autograd through the same loop pads a
    map for every tap and takes three to four times as long; torch.compile's fusion of it is no
    faster than this.
    """

    @staticmethod
    def forward(ctx, attn: Tensor, x: Tensor, kernel_size: int, step: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(attn, x)
        ctx.taps = kernel_size, step
        out = x.new_zeros(*x.shape[:2], *attn.shape[2:])
        for block, j, shifted in _blocks(out, kernel_size, step):
            out[block].addcmul_(x[shifted], attn[:, j : j + 1, block[2]])
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        attn, x = ctx.saved_tensors
        d_attn, d_x = torch.zeros_like(attn), torch.zeros_like(x)
        for block, j, shifted in _blocks(g, *ctx.taps):
            d_attn[:, j, block[2]] += (x[shifted] * g[block]).sum(1)
            d_x[shifted].addcmul_(g[block], attn[:, j : j + 1, block[2]])
        return d_attn, d_x, None, None


def _blocks(out: Tensor, kernel_size: int, step: tuple[int, int]) -> Iterator[tuple]:
    """Blocks of channels and rows; for each, all taps and where they are in the padded map."""
    _, c, h, w = out.shape
    every = slice(None)
    size = (c, h) if out.is_cuda else (32, 32)
    for at, top in itertools.product(range(0, c, size[0]), range(0, h, size[1])):
        channels, bottom = slice(at, at + size[0]), min(top + size[1], h)
        for j, (u, v) in enumerate(itertools.product(range(kernel_size), repeat=2)):
            rows = slice(u * step[0] + top, u * step[0] + bottom)
            columns = slice(v * step[1], v * step[1] + w)
            yield (every, channels, slice(top, bottom)), j, (every, channels, rows, columns)


@torch.compiler.disable
def fns_attention(attn: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    """FNS_Attn.fns_attn at whole ratios: upsample once, then K*K shifts by a ratio each.

    `grid_sample` for each tap takes three to eight times as long.
    """
    size, radius = attn.shape[2:], kernel_size // 2
    rows, columns = (n // m for n, m in zip(size, x.shape[2:], strict=True))
    up = F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
    up = F.pad(up, [radius * columns] * 2 + [radius * rows] * 2, mode="replicate")
    return _Taps.apply(attn, up, kernel_size, (rows, columns))


class _Reassembly(torch.autograd.Function):
    """Sum of a window of values, weighted: a matrix product a cell, row of cells after row.

    (r r, K K) by (K K, C) at every low-resolution pixel, channels last. Windows are written for one
    row at a time and again in the backward pass. All windows at once take twice as long; the same
    with `F.unfold` and an einsum, or a product a tap with the upsampled map, three times and more.
    """

    @staticmethod
    def forward(ctx, attn: Tensor, v: Tensor, kernel_size: int, ratio: int) -> Tensor:
        ctx.save_for_backward(attn, v)
        ctx.sizes = kernel_size, ratio
        padded = _pad(v, kernel_size)
        out = v.new_empty(*attn.shape[:3], v.shape[3])
        for y, (cells, weights) in enumerate(_rows_of_cells(ratio, out, attn)):
            row = weights.flatten(2, 3) @ _row_of_windows(padded, y, kernel_size)
            cells.copy_(row.reshape(cells.shape))
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        attn, v = ctx.saved_tensors
        kernel_size, ratio = ctx.sizes
        padded = _pad(v, kernel_size)
        d_attn, d_padded = attn.new_empty(attn.shape), torch.zeros_like(padded)
        for y, (cells, weights, d_out) in enumerate(_rows_of_cells(ratio, d_attn, attn, g)):
            weights, d_out = weights.flatten(2, 3), d_out.flatten(2, 3)
            values = _row_of_windows(padded, y, kernel_size)
            cells.copy_((d_out @ values.transpose(-1, -2)).reshape(cells.shape))
            _add_row_of_windows(d_padded, y, weights.transpose(-1, -2) @ d_out, kernel_size)
        return d_attn, _unpad(d_padded, kernel_size), None, None


class _Similarity(torch.autograd.Function):
    """Inner products of queries with a window of keys, as `_Reassembly`."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, kernel_size: int, ratio: int) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.sizes = kernel_size, ratio
        padded = _pad(k, kernel_size)
        out = q.new_empty(*q.shape[:3], kernel_size**2)
        for y, (cells, queries) in enumerate(_rows_of_cells(ratio, out, q)):
            keys = _row_of_windows(padded, y, kernel_size)
            row = queries.flatten(2, 3) @ keys.transpose(-1, -2)
            cells.copy_(row.reshape(cells.shape))
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        q, k = ctx.saved_tensors
        kernel_size, ratio = ctx.sizes
        padded = _pad(k, kernel_size)
        d_q, d_padded = q.new_empty(q.shape), torch.zeros_like(padded)
        for y, (cells, queries, d_out) in enumerate(_rows_of_cells(ratio, d_q, q, g)):
            queries, d_out = queries.flatten(2, 3), d_out.flatten(2, 3)
            keys = _row_of_windows(padded, y, kernel_size)
            cells.copy_((d_out @ keys).reshape(cells.shape))
            _add_row_of_windows(d_padded, y, d_out.transpose(-1, -2) @ queries, kernel_size)
        return d_q, _unpad(d_padded, kernel_size), None, None


def _pad(x: Tensor, kernel_size: int) -> Tensor:
    r = kernel_size // 2
    return F.pad(x, (0, 0, r, r, r, r))


def _unpad(x: Tensor, kernel_size: int) -> Tensor:
    r = kernel_size // 2
    return x[:, r : x.shape[1] - r, r : x.shape[2] - r]


def _rows_of_cells(ratio: int, *maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Maps (B, h r, w r, D), together, as h views of (B, w, r, r, D): r r pixels of w cells."""

    def rows(a: Tensor) -> tuple[Tensor, ...]:
        b, h, w, d = a.shape
        cells = a.reshape(b, h // ratio, ratio, w // ratio, ratio, d)
        return cells.transpose(2, 3).unbind(1)

    return zip(*map(rows, maps), strict=True)


def _row_of_windows(padded: Tensor, y: int, kernel_size: int) -> Tensor:
    """Windows of the low-resolution row y, (B, w, K K, C)."""
    b, _, columns, c = padded.shape
    image, row, column, channel = padded.stride()
    size = (b, columns - kernel_size + 1, kernel_size, kernel_size, c)
    strides = (image, column, row, column, channel)
    offset = padded.storage_offset() + y * row
    return padded.as_strided(size, strides, offset).flatten(2, 3)


def _add_row_of_windows(padded: Tensor, y: int, windows: Tensor, kernel_size: int) -> None:
    """Adds windows to where `_row_of_windows` takes them from, a column of taps at a time."""
    windows = windows.unflatten(2, (kernel_size, kernel_size)).permute(0, 2, 1, 3, 4)
    width = windows.shape[2]
    for v in range(kernel_size):
        padded[:, y : y + kernel_size, v : v + width] += windows[:, :, :, v]


@torch.compiler.disable
def similarity(q: Tensor, k: Tensor, kernel_size: int, ratio: int) -> Tensor:
    """sapa.sim, channels last."""
    return _Similarity.apply(q, k, kernel_size, ratio)


@torch.compiler.disable
def reassembly(attn: Tensor, v: Tensor, kernel_size: int, ratio: int) -> Tensor:
    """sapa.atn, channels last."""
    return _Reassembly.apply(attn, v, kernel_size, ratio)


@torch.compiler.disable
def carafe(x: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int):
    """mmcv.ops.carafe.carafe, channels first: `reassembly` group by group."""
    b, c, h, w = x.shape
    x = x.reshape(b * group_size, c // group_size, h, w).permute(0, 2, 3, 1).contiguous()
    masks = masks.reshape(b * group_size, kernel_size**2, *masks.shape[2:])
    masks = masks.permute(0, 2, 3, 1).contiguous()
    y = _Reassembly.apply(masks, x, kernel_size, scale_factor).permute(0, 3, 1, 2)
    return y.reshape(b, c, *y.shape[2:])


def _sample_points(x: Tensor, offset: Tensor, points: int, ratio: int, groups: int) -> Tensor:
    """Samples of x at every output pixel's cell plus offset, (B groups, C/groups, points, H, W)."""
    b, c, h, w = x.shape
    hh, ww = h * ratio, w * ratio
    offset = offset.reshape(b * groups, points, 2, hh, ww).permute(0, 1, 3, 4, 2)
    cols = torch.arange(ww, device=x.device) // ratio + 0.5
    rows = torch.arange(hh, device=x.device) // ratio + 0.5
    own = torch.stack(torch.meshgrid(cols, rows, indexing="xy"), -1).to(offset.dtype)
    grid = 2 * (own + offset) / torch.tensor([w, h], dtype=offset.dtype, device=x.device) - 1
    grid = grid.reshape(b * groups, points * hh, ww, 2)
    x = x.reshape(b * groups, c // groups, h, w)
    samples = F.grid_sample(x, grid, align_corners=False)
    return samples.reshape(b * groups, c // groups, points, hh, ww)


def deform_similarity(q, k, offset, points: int, ratio: int, groups: int) -> Tensor:
    """deformsapa.deform_qk, channels first."""
    b, c, hh, ww = q.shape
    samples = _sample_points(k, offset, points, ratio, groups)
    q = q.reshape(b * groups, c // groups, 1, hh, ww)
    return (q * samples).sum(1).reshape(b, groups, points, hh, ww)


def deform_reassembly(attn, v, offset, points: int, ratio: int, groups: int) -> Tensor:
    """deformsapa.deform_av, channels first."""
    b, c = v.shape[:2]
    hh, ww = attn.shape[-2:]
    samples = _sample_points(v, offset, points, ratio, groups)
    attn = attn.reshape(b * groups, 1, points, hh, ww)
    return (attn * samples).sum(2).reshape(b, c, hh, ww)


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


@contextlib.contextmanager
def _shells(directory: pathlib.Path) -> Iterator[None]:
    """Puts the shells where `import` finds them, for files that lie in `directory`."""
    # torch.compile imports a module's file again: what was loaded last stays until here.
    for name in list(sys.modules):
        if name.partition(".")[0] == "official":
            del sys.modules[name]
    before = dict(sys.modules)
    packages = {name.partition(".")[0] for name in _SHELLS}
    cuda = torch.cuda.is_available()
    real = {package for package in packages if cuda and importlib.util.find_spec(package)}
    for name, content in _SHELLS.items():
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
            if name in _SHELLS and name.partition(".")[0] != "official":
                del sys.modules[name]
        sys.modules.update({n: m for n, m in before.items() if n in _SHELLS})


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


def build(name: str, w: Workload, root: str) -> Peer:
    """The official module that `name` stands for, with random weights.

    Args:
      name: of our upsampler.
      w: sizes.
      root: directory of the checkouts.

    Raises:
      Skip: there is no official module, none for these sizes, or not in `root`.
    """
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
    with _shells(file.parent):
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
