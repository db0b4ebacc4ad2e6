"""From a model of one image size to logits of any image: windows, mirrored and rescaled views."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer, Num

from resfu_jax.ops.checks import check_not_empty, check_real
from resfu_jax.ops.dtypes import at_least_float32
from resfu_jax.ops.resize import resize
from resfu_jax.preprocess import Preprocess, is_integer, is_real, preprocess_of

Apply = Callable[[Array], Array]  # images (b, h, w, 3) to logits (b, h, w, k), as a model does
Mode = Literal["whole", "slide"]


@dataclasses.dataclass(frozen=True)
class Inference:
    """How images become logits, the test protocols of the field (MMSegmentation's, exactly).

        infer = Inference(mode="slide", crop=(512, 512), stride=(480, 480), flip=True)
        logits = jax.jit(lambda images: infer(model, images))(images)

    A view of an image is the image at one of `scales`, mirrored or not. Its logits, from one pass
    (`"whole"`) or from overlapping windows (`"slide"`, see the function `slide`), are brought back
    to the size of the image. The probabilities of n views are averaged, not their logits:

        result = log( (softmax(logits_1) + ... + softmax(logits_n)) / n )

    A single view returns its logits as they are, hence the defaults are `apply(images)`.

    Scaled images have sides round(scale * side / m) * m, with m the multiple of `Preprocess`, for
    the backbone's sake; scale 1 keeps the size of the image. They are resampled bilinearly,
    antialiased when shrinking like the images of `resfu_jax.data` (MMSegmentation's are not);
    logits are resampled bilinearly.

    Args:
      mode: `"whole"` or `"slide"`.
      crop: height and width of the windows; `"slide"` needs it, `"whole"` ignores it.
      stride: pixels between windows, down and across; at most `crop`. As `crop`.
      scales: sizes of the views over the size of the image.
      flip: also a mirrored view (left-right) at every scale.
      windows_per_step: windows of each image that pass through the model at once. More keep a
        large device busy when the batch is small; memory grows with them.
      whole_up_to: with `"slide"`, arrays of at most so many pixels, height times width and padding
        included, are seen in one pass all the same.

    Raises:
      ValueError: an option is out of range. The message starts with its name.
    """

    mode: Mode = "whole"
    crop: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    windows_per_step: int = 1
    whole_up_to: int = 0

    def __post_init__(self):
        if self.mode not in list(get_args(Mode)):
            raise ValueError(f"mode must be 'whole' or 'slide', got {self.mode!r}")
        for name in ("crop", "stride"):
            if getattr(self, name) is None and self.mode == "slide":
                raise ValueError(f"{name} must be (height, width) when mode is 'slide', got None")
        if self.crop is not None:
            _check_pair("crop", self.crop)
        if self.stride is not None:
            _check_pair("stride", self.stride, self.crop)
        if (
            not isinstance(self.scales, tuple | list)
            or not self.scales
            or not all(is_real(scale) and scale > 0 for scale in self.scales)
        ):
            raise ValueError(f"scales must be positive, at least one, got {self.scales!r}")
        if not isinstance(self.flip, bool | np.bool_):
            raise ValueError(f"flip must be True or False, got {self.flip!r}")
        _check_count("windows_per_step", self.windows_per_step)
        _check_count("whole_up_to", self.whole_up_to, least=0)

    def in_windows(self, height: int, width: int) -> bool:
        """Whether images of this size, padding included, are seen in windows."""
        return self.mode == "slide" and height * width > self.whole_up_to

    @property
    def plain(self) -> bool:
        """Whether the result is `apply(images)`, one pass over the image as it is."""
        return self.mode == "whole" and tuple(self.scales) == (1.0,) and not self.flip

    def __call__(
        self,
        apply: Apply,
        images: Num[Array, "b h w 3"],
        *,
        sizes: Integer[Array, "b 2"] | None = None,
        preprocess: Preprocess | None = None,
    ) -> Float[Array, "b h w k"]:
        """Logits of every pixel, or log-probabilities if there are several views.

        Works inside `jit`; the number of compiled copies of `apply` is that of the views, however
        many windows they have.

        Args:
          apply: images `(n, h', w', 3)` to logits `(n, h', w', k)` of any sizes: a model, set to
            evaluation, or a function.
          images: RGB in 0 .. 255, uint8 or floating point.
          sizes: height and width of each image before it was padded at the bottom and right. With
            them, windows and mirroring follow the image: at scale 1, images that are seen in
            windows get the logits that they get alone, whatever the padding. The result means
            nothing in the padding. None: the arrays hold nothing but the images.
          preprocess: what images smaller than a window are padded with, and what sides of scaled
            images are multiples of. None: as the model `apply` needs it, see `preprocess_of`.

        Raises:
          ValueError: shapes that do not fit.
        """
        _check_images(images, sizes)
        preprocess = preprocess or preprocess_of(apply)
        views = [(s, mirrored) for s in self.scales for mirrored in (False, True)[: 1 + self.flip]]
        if len(views) == 1:
            return self._view(apply, images, sizes, preprocess, *views[0])
        total: Any = None
        for view in views:
            logits = self._view(apply, images, sizes, preprocess, *view)
            if logits.shape[3] < 2:
                raise ValueError("averaging views takes logits of 2 or more classes, got 1")
            logits = jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)))
            total = logits if total is None else jnp.logaddexp(total, logits)
        return total - math.log(len(views))

    def _view(self, apply, images, sizes, preprocess, scale: float, mirrored: bool) -> Array:
        if mirrored:
            images = _mirror(images, sizes)
        size = images.shape[1:3]
        scaled, scaled_sizes = size, sizes
        if scale != 1:
            m = preprocess.multiple
            scaled = tuple(max(1, round(scale * n / m)) * m for n in size)
            images = resize(
                images.astype(at_least_float32(images.dtype)), scaled, antialias=scale < 1
            )
            if sizes is not None:
                ratio = [jnp.array(n, sizes.dtype)[None, :] for n in (scaled, size)]
                scaled_sizes = -(-sizes * ratio[0] // ratio[1])
        if self.in_windows(*images.shape[1:3]):
            assert self.crop is not None and self.stride is not None  # as they were checked
            logits = slide(
                apply,
                images,
                crop=self.crop,
                stride=self.stride,
                windows_per_step=self.windows_per_step,
                sizes=scaled_sizes,
                preprocess=preprocess,
            )
        else:
            logits = apply(images)
            _check_logits(logits, images.shape)
        if scale != 1:
            logits = resize(logits.astype(at_least_float32(logits.dtype)), size)
        return _mirror(logits, sizes) if mirrored else logits


def slide(
    apply: Apply,
    images: Num[Array, "b h w 3"],
    *,
    crop: tuple[int, int],
    stride: tuple[int, int],
    windows_per_step: int = 1,
    sizes: Integer[Array, "b 2"] | None = None,
    preprocess: Preprocess | None = None,
) -> Float[Array, "b h w k"]:
    """Logits from overlapping windows: the mean of all windows that cover a pixel.

    Along an axis of n pixels there are ceil((n - crop) / stride) + 1 windows, starting at
    0, stride, 2 stride, ..., the last moved back to end at the border, as in MMSegmentation. An
    image smaller than the window is padded at the bottom and right with the mean colour.

    `apply` is compiled once, for `b * windows_per_step` windows; a loop takes it over the images,
    until the one with most windows has had its last: those of the padding alone take no time. The
    mean is computed in float32 at least.

    Args:
      apply: images `(n, *crop, 3)` to logits `(n, *crop, k)`: a model, set to evaluation, or a
        function. The state of a model does not change.
      images: RGB in 0 .. 255, uint8 or floating point.
      crop: height and width of the windows.
      stride: pixels between windows, down and across; at most `crop`.
      windows_per_step: windows of each image that pass through `apply` at once.
      sizes: height and width of each image before it was padded at the bottom and right: each has
        windows of its own, and padding beyond all of them gets zeros. None: no padding. (If they
        are traced, there are forward derivatives only.)
      preprocess: has the mean colour. None: that of the model `apply`, see `preprocess_of`.

    Raises:
      ValueError: shapes or options that do not fit.
    """
    color = (preprocess or preprocess_of(apply)).pad_color
    if isinstance(apply, nnx.Module):
        # Modules are bound to the trace they are in: `nnx.remat` updates them, and could not in a
        # loop. So a copy is made there.
        graphdef, state = nnx.split(apply)
        apply = lambda images: nnx.merge(graphdef, state, copy=True)(images)  # noqa: E731
    _check_images(images, sizes)
    _check_pair("crop", crop)
    _check_pair("stride", stride, crop)
    _check_count("windows_per_step", windows_per_step)
    batch, height, width, _ = images.shape
    padded = sizes is not None
    if sizes is None:
        sizes = jnp.broadcast_to(jnp.array([[height, width]]), (batch, 2))
    images = _pad(images, crop, color)
    (y, y_used), (x, x_used) = (
        _starts(sizes[:, a], images.shape[a + 1], crop[a], stride[a]) for a in (0, 1)
    )

    # The windows of each image row by row, in equal steps of n.
    rows, columns = (used.sum(axis=1, dtype=jnp.int32)[:, None] for used in (y_used, x_used))
    steps = -(-y.shape[1] * x.shape[1] // windows_per_step)
    n = -(-y.shape[1] * x.shape[1] // steps)
    if padded:
        steps = -(-jnp.max(rows * columns) // n)

    windows = jax.ShapeDtypeStruct((batch * n, *crop, 3), images.dtype)
    logits = jax.eval_shape(apply, windows)
    _check_logits(logits, windows.shape)
    dtype = at_least_float32(logits.dtype)

    def step(i: Array, total: Array) -> Array:
        numbers = i.astype(jnp.int32) * n + jnp.arange(n, dtype=jnp.int32)[None, :]
        row, column = jnp.divmod(numbers, columns)
        used = row < rows  # those beyond repeat windows
        tops = jnp.take_along_axis(y, row, axis=1, mode="clip")
        lefts = jnp.take_along_axis(x, column, axis=1)
        of_image = jax.vmap(_cut, in_axes=(None, 0, 0, None))
        cut = jax.vmap(of_image, in_axes=(0, 0, 0, None))(images, tops, lefts, crop)
        logits = apply(cut.reshape(windows.shape)).astype(dtype)
        logits = logits.reshape(batch, n, *logits.shape[1:])
        logits = jnp.where(used[:, :, None, None, None], logits, jnp.zeros((), dtype))

        def add(i: Array, total: Array) -> Array:
            take = lambda values: jax.lax.dynamic_index_in_dim(values, i, 1, keepdims=False)  # noqa: E731
            return jax.vmap(_add)(total, take(logits), take(tops), take(lefts))

        return jax.lax.fori_loop(0, n, add, total)

    total = jnp.zeros((*images.shape[:3], logits.shape[3]), dtype)
    total = jax.lax.fori_loop(0, steps, step, total)
    down = _coverage(y, y_used, crop[0], images.shape[1])
    across = _coverage(x, x_used, crop[1], images.shape[2])
    windows_there = (down[:, :, None] * across[:, None, :])[..., None]
    mean = total / jnp.maximum(windows_there, 1).astype(dtype)
    return mean[:, :height, :width]


def _starts(
    sizes: Integer[Array, "b"], n: int, crop: int, stride: int
) -> tuple[Int[Array, "b m"], Bool[Array, "b m"]]:
    """First pixels of the windows along an axis of n pixels, and which of them an image needs."""
    start = stride * jnp.arange(-(-(n - crop) // stride) + 1, dtype=jnp.int32)[None, :]
    last = jnp.maximum(sizes.astype(jnp.int32) - crop, 0)[:, None]
    return jnp.minimum(start, last), start - last < stride


def _coverage(
    starts: Int[Array, "b m"], used: Bool[Array, "b m"], crop: int, n: int
) -> Int[Array, "b {n}"]:
    """Number of used windows over each of n pixels."""
    distance = jnp.arange(n, dtype=jnp.int32)[None, None, :] - starts[:, :, None]
    inside = (distance >= 0) & (distance < crop) & used[:, :, None]
    return inside.sum(axis=1, dtype=jnp.int32)


def _cut(image: Array, top: Array, left: Array, crop: tuple[int, int]) -> Array:
    start = (top, left, jnp.zeros_like(top))  # of one dtype, whatever that of a literal is
    return jax.lax.dynamic_slice(image, start, (*crop, image.shape[2]))


def _add(total: Array, window: Array, top: Array, left: Array) -> Array:
    """`total` with `window` added at (top, left)."""
    there = _cut(total, top, left, (window.shape[0], window.shape[1]))
    return jax.lax.dynamic_update_slice(total, there + window, (top, left, jnp.zeros_like(top)))


def _pad(images: Array, size: tuple[int, int], color: tuple[int, int, int]) -> Array:
    """Images that are smaller get the mean colour at the bottom and right, as in training."""
    batch, height, width, _ = images.shape
    if height >= size[0] and width >= size[1]:
        return images
    padding = jnp.asarray(color, images.dtype)
    size = max(height, size[0]), max(width, size[1])
    return jnp.broadcast_to(padding, (batch, *size, 3)).at[:, :height, :width].set(images)


def _mirror(x: Array, sizes: Array | None) -> Array:
    """Left-right. With sizes, each image within its own width, its padding left as it is."""
    if sizes is None:
        return jnp.flip(x, axis=2)
    column = jnp.arange(x.shape[2], dtype=jnp.int32)[None, :]
    widths = sizes[:, 1:].astype(jnp.int32)
    source = jnp.where(column < widths, widths - 1 - column, column)
    return jnp.take_along_axis(x, source[:, None, :, None], axis=2)


def _check_pair(name: str, value: tuple[int, int], largest: tuple[int, int] | None = None) -> None:
    two = isinstance(value, tuple | list) and len(value) == 2
    if not two or not all(is_integer(n) and n >= 1 for n in value):
        raise ValueError(f"{name} must be (height, width), at least 1, got {value!r}")
    if largest is not None and (value[0] > largest[0] or value[1] > largest[1]):
        raise ValueError(f"{name} must be at most the crop {largest}, got {value}")


def _check_count(name: str, value: int, least: int = 1) -> None:
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def _check_images(images: Array, sizes: Array | None) -> None:
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be (batch, height, width, 3), got {images.shape}")
    if images.dtype != jnp.uint8:
        check_real("images", images)
    check_not_empty("images", images)
    if sizes is not None and not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"sizes must be whole numbers of pixels, got {sizes.dtype}")
    if sizes is not None and sizes.shape != (images.shape[0], 2):
        raise ValueError(f"sizes must be ({images.shape[0]}, 2), got {sizes.shape}")
    if sizes is not None and not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"sizes must be whole numbers of pixels, got {sizes.dtype}")


def _check_logits(logits: Array | jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> None:
    check_real("what apply returns", logits)
    if len(logits.shape) != 4 or logits.shape[:3] != shape[:3]:
        raise ValueError(
            f"apply must return logits {(*shape[:3], 'k')} for images {shape}, got {logits.shape}"
        )
