"""Operators of the official modules that exist only as CUDA extensions, in plain PyTorch.

ReSFU's `fns_attn`, SAPA's `sim`, `atn`, `deform_qk` and `deform_av`, mmcv's `carafe`; and `Taps`,
of which FeatUp's is made. In the fastest of the forms that were tried on a CPU, as they say.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


class Taps(torch.autograd.Function):
    """Sum of the K*K shifts of an upsampled and padded map, each times its weight.

    In place, tap after tap in blocks that stay in the cache. Autograd through the same loop pads a
    map for every tap and takes three to four times as long; torch.compile's fusion of it is no
    faster than this.
    """

    @staticmethod
    def forward(ctx, attn: Tensor, x: Tensor, kernel_size: int, step: tuple[int, int]) -> Tensor:
        """The sum; x is upsampled and padded, its taps are `step` pixels apart."""
        ctx.save_for_backward(attn, x)
        ctx.taps = kernel_size, step
        out = x.new_zeros(*x.shape[:2], *attn.shape[2:])
        for block, j, shifted in _blocks(out, kernel_size, step):
            out[block].addcmul_(x[shifted], attn[:, j : j + 1, block[2]])
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        """To the weights and the map."""
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
    up, step = _upsampled(attn, x, kernel_size)
    return Taps.apply(attn, up, kernel_size, step)


def fns_attention_plain(attn: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    """`fns_attention` as one writes it first: an addition a tap over the whole map, autograd's."""
    up, (rows, columns) = _upsampled(attn, x, kernel_size)
    h, w = attn.shape[2:]
    out = up.new_zeros(*x.shape[:2], h, w)
    for j, (u, v) in enumerate(itertools.product(range(kernel_size), repeat=2)):
        shifted = up[:, :, u * rows : u * rows + h, v * columns : v * columns + w]
        out.addcmul_(shifted, attn[:, j : j + 1])
    return out


def _upsampled(attn: Tensor, x: Tensor, kernel_size: int) -> tuple[Tensor, tuple[int, int]]:
    """The map at full size with its border, and the pixels from a tap to the next."""
    size, radius = attn.shape[2:], kernel_size // 2
    rows, columns = (n // m for n, m in zip(size, x.shape[2:], strict=True))
    up = F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
    up = F.pad(up, [radius * columns] * 2 + [radius * rows] * 2, mode="replicate")
    return up, (rows, columns)


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
