"""Features at full resolution: a frozen backbone and an upsampler, from photos of any size.

    pipeline = FeaturePipeline("facebook/dinov2-small", "anyup")
    features = pipeline("photo.jpg")  # (H, W, 384), a vector for every pixel of the photo

With I the photo of H x W pixels, f the backbone, P its stride and U the upsampler,

    low = f(resize(I, (P round(H / P), P round(W / P))))        (h, w, C), the photo whole
    out = U(low, I, (ceil(H / stride), ceil(W / stride)))       (H, W, C) for stride 1

The photo is *resized* to what the patches divide, never padded: its sides change by less than half
a patch, and the cells of the map cover the photo exactly, without a border that has seen padding.
(Networks see padding: tokens beside it differ more from the others than these among themselves.)
Both networks get the photo in the colours that each was trained with.

**Memory.** The backbone sees the photo whole; a ViT's attention then takes some queries after the
others. The upsampler makes the channels of the result in passes, so that what is on the device at
once stays below a limit (`pass_bytes`) and what its weights need: that is exact where its output is
a sum of features, since weights depend on the image and all features, and are the same in every
pass. `FeaturePipeline.memory` says what a size takes, without computing anything.

Arrays need nothing but JAX, Flax and NumPy; files need Pillow (`pip install 'resfu_jax[train]'`).
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Num

from resfu_jax._checks import check_flag, check_whole, need
from resfu_jax._feature_sources import (
    COLOURS,
    Normalisation,
    Three,
    backbone_colours,
    check_upsampler,
    create_member,
)
from resfu_jax._running import (
    Images,
    Item,
    check_fields,
    compute_type,
    failed,
    find_images,
    in_threads,
    local_devices,
    open_run,
    restore,
)
from resfu_jax.backbones import ViT
from resfu_jax.backbones.vit import check_layers
from resfu_jax.convert import load_backbone
from resfu_jax.model import evaluating, normalise
from resfu_jax.ops.resize import resize
from resfu_jax.preprocess import Preprocess
from resfu_jax.upsamplers import keeps_space, list_upsamplers, upsampler_entry

if TYPE_CHECKING:
    from resfu_jax.images import ImageError

_LESS = "dtype='bfloat16', a larger stride or a smaller pass_bytes"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFeatures:
    """The result for one image of H x W.

    Attributes:
      id: the file's name without folder and suffix; of an array, its position in the input.
      path: the file; None for an array.
      features: at the size that was asked for.
      low: what the backbone gave, before the upsampler.
      class_token: of a ViT, if asked for.
    """

    id: str
    path: pathlib.Path | None
    features: Float[np.ndarray, "h w c"]
    low: Float[np.ndarray, "_h _w c"]
    class_token: Float[np.ndarray, " c"] | None = None


class Memory(NamedTuple):
    """What one batch takes, in bytes: of each device, and of the host for the result.

    Attributes:
      encode: the backbone's program, with its arguments, results and everything in between.
      upsample: one pass of the upsampler's program, likewise.
      passes: how many there are.
      result: the features of the batch, in the memory of the host (or the file of `out`).
      weights: of both networks.
    """

    encode: int
    upsample: int
    passes: int
    result: int
    weights: int

    @property
    def peak(self) -> int:
        """What a machine needs whose device and host share their memory, as a CPU.

        Of a single pass the result is the program's output itself, not a copy.
        """
        return max(self.encode, self.upsample + (self.result if self.passes > 1 else 0))


class FeaturePipeline:
    """A frozen backbone and an upsampler: images of any size to features of any resolution.

    Args:
      backbone: weights, as `load_backbone` takes them, of a ViT, DINO, DINOv2, DINOv3, MiT or
        ResNet, which its entries tell: a file, or a repository of the Hugging Face hub; or a
        module, images `(B, H, W, 3)` to feature maps, with `features` and `strides`. None: there is
        none, and features come from elsewhere.
      upsampler: a name; a module that is guided by the image or not at all; or a
        `GuidedUpsampler`. A name of released weights (`resfu upsamplers --weights`) fetches them,
        `bilinear`, `nearest`, `bicubic`, `jbu` and `upsample_anything` have nothing to learn. All
        others are **untrained**: there is a warning.
      weights: of the upsampler, for a name of `load_upsampler`: what that takes. None: where they
        were released.
      normalisation: of the backbone's images: `"imagenet"`, `"half"` (mean and deviation 127.5),
        `"clip"`, `"unit"` (0 .. 1), or a mean and a deviation, three numbers in 0 .. 255 each.
        None: as the file beside the weights says (`preprocessor_config.json`, `config.json`), else
        ImageNet's. Plain ViTs were published with several: they need it.
      image_normalisation: of the upsampler's images, likewise. None: as its release says.
      layers: blocks of a ViT whose maps to take, counted from 0, ascending; their channels follow
        each other in `features`. None: the module's own, which is the last one by default.
      channel_norm: the backbone's maps are normalised over their channels, without parameters, as
        AnyUp and JAFAR are trained with; class tokens are not.
      dtype: to compute in, and of the result: None (float32), `"bfloat16"`, `"float16"`. Norms and
        softmax are float32.
      batch_size: images at once in lists and folders, a multiple of the number of devices; None:
        one per device. Only images of the same size share a batch.
      devices: which share a batch; None: all of this process.
      pass_bytes: how much of the result each device computes at once: more channels follow in
        further passes, which compute the upsampler's weights again. (Upsamplers that make new
        features, `loftup`, `featup`, `fade` and others, have one pass.)
      **changes: fields of `Preprocess`: `resize_to` and `scale` are the size at which the backbone
        sees a photo (the upsampler sees all pixels), `orientation` whether files are turned.

    Attributes:
      channels: C; None without a backbone.
      stride: pixels of the backbone's image from one cell of its map to the next; None without one.
      multiple: what the sides of its images must be multiples of.
      name: of the upsampler.
      preprocess: how the backbone's images are normalised and resized.

    Raises:
      ValueError: an argument is out of range, or backbone and upsampler do not fit.
      FileNotFoundError: weights that could not be found or fetched.
    """

    def __init__(
        self,
        backbone: str | os.PathLike[str] | nnx.Module | None = None,
        upsampler: str | nnx.Module = "bilinear",
        *,
        weights: Any = None,
        normalisation: Normalisation | None = None,
        image_normalisation: Normalisation | None = None,
        layers: Sequence[int] | None = None,
        channel_norm: bool = False,
        dtype: Dtype | None = None,
        batch_size: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        pass_bytes: int = 2**31,
        **changes: Any,
    ):
        self.dtype = jnp.dtype("float32" if dtype is None else compute_type(dtype))
        check_flag(channel_norm=channel_norm)
        self._channel_norm = channel_norm
        devices = local_devices(devices)
        batch_size = len(devices) if batch_size is None else batch_size
        check_whole(batch_size=batch_size, pass_bytes=pass_bytes)
        need(
            batch_size % len(devices) == 0,
            f"batch_size must be a multiple of {len(devices)} (the devices), got {batch_size}",
        )
        check_fields(Preprocess, changes, "an option of FeaturePipeline")
        for field in ("mean", "std", "multiple", "growth"):
            need(
                field not in changes,
                f"{field} is not set here: give normalisation; images are resized to what the "
                "backbone's stride divides, not padded",
            )
        self.batch_size, self.pass_bytes = batch_size, pass_bytes
        self._devices = devices
        mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
        self._over_batch = NamedSharding(mesh, PartitionSpec("data"))
        self._everywhere = NamedSharding(mesh, PartitionSpec())

        check_upsampler(upsampler, weights)
        source = None if isinstance(backbone, nnx.Module) else backbone
        if source is not None:
            need(
                isinstance(source, str | os.PathLike),
                "backbone must be a file of weights, a repository, or a module, got "
                f"{type(source).__name__}",
            )
            backbone = load_backbone(source)
        self.channels: Any = None
        self.stride: Any = None
        self.multiple: int = 1
        self._layers: tuple[int, ...] | None = None
        self._is_vit = isinstance(backbone, ViT)
        colours = COLOURS["imagenet"]
        if backbone is not None:
            colours = backbone_colours(backbone, source, normalisation)
            self._set_backbone(backbone, layers)
        else:
            for name, value in (("normalisation", normalisation), ("layers", layers)):
                need(value is None, f"{name} is the backbone's, and there is none")
        self.preprocess = Preprocess(
            mean=colours[0], std=colours[1], multiple=self.multiple, growth=1, **changes
        )

        self._upsampler, self._weights_of_upsampler = upsampler, weights
        self._image_normalisation = image_normalisation
        self.name = upsampler if isinstance(upsampler, str) else _name(upsampler)
        self._members: dict[int, _Member] = {}
        if self.channels is not None:
            self._member(self.channels)  # what does not fit is told now

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        which: str | int = "best",
        *,
        dtype: Dtype | None = None,
        devices: Sequence[jax.Device] | None = None,
        **options: Any,
    ) -> "FeaturePipeline":
        """The backbone and upsampler of a run of train.py with `task="features"`.

        Nothing in the workdir is changed; the run may still be going on.

        Args:
          path: the workdir, or one checkpoint in it, `WORKDIR/checkpoints/STEP`.
          which: "best" by held-out error, "latest", or a step.
          dtype: compute type of both; None: as in the run, whose upsampler computes in float32.
          devices: as for the class.
          **options: further arguments of the class. Normalisation is that of the run.

        Raises:
          ValueError: the folder does not hold such a run, or an argument is out of range.
          CheckpointError: there is no such checkpoint, or it is of another architecture.
        """
        from resfu_jax.tasks import create_task

        for name in ("backbone", "upsampler", "weights", "normalisation", "channel_norm"):
            need(name not in options, f"{name} is that of the run")
        devices = local_devices(devices)
        workdir, which, config = open_run(path, which, "features", dtype)
        task: Any = create_task(config)
        model, _ = restore(workdir, which, lambda: task.create_model(nnx.Rngs(0)), devices)
        return cls(
            model.backbone,
            model.head,
            normalisation=(model.mean, model.std),
            channel_norm=model.channel_norm,
            dtype=dtype,
            devices=devices,
            **options,
        )

    # ------------------------------------------------------------------------------ whole photos
    def __call__(
        self,
        images: Images,
        stride: int | None = 1,
        *,
        features: Any = None,
        class_token: bool = False,
        out: np.ndarray | None = None,
    ) -> Any:
        """Features of a photo, or of several.

            pipeline("photo.jpg")  # (H, W, C)
            pipeline(["a.jpg", "b.jpg"], stride=4)  # two arrays (ceil(H / 4), ceil(W / 4), C)
            pipeline("photo.jpg", features=of_another_model)  # (h, w, C) to (H, W, C)

        Args:
          images: a file, a folder, an array (H, W, 3) or (B, H, W, 3) of uint8, RGB, or a list of
            these, as `Predictor.predict` takes.
          stride: pixels of the photo from one vector of the result to the next, down and across:
            the result has ceil(H / stride) rows. None: no upsampling, the backbone's own map.
          features: of any model: a map (h, w, C), or (B, h, w, C) for (B, H, W, 3). It must cover
            the photo whole: its first and last rows are at the photo's edges. What NumPy makes an
            array of is taken, such as a tensor of PyTorch on the CPU.
          class_token: return a pair, with the ViT's class token (C,) as the second.
          out: for one photo: an array of the result's shape to write it to, such as a
            `numpy.memmap` of `"float16"`, in passes. It is also returned.

        Returns:
          Of one photo (H', W', C), of an array of B photos (B, H', W', C), of a list or folder a
          list of such arrays in order. NumPy's, of `dtype`.

        Raises:
          ImageError: an image that cannot be read (`stream` goes on with the others), or the device
            has not enough memory.
          ValueError: arrays of other shapes, or an argument out of range.
        """
        check_flag(class_token=class_token)
        alone = isinstance(images, str | os.PathLike) and not os.path.isdir(images)
        ndim = getattr(images, "ndim", None)
        alone |= ndim == 3
        need(out is None or alone, "out is for one photo, got several")
        results: dict[int, ImageFeatures] = {}
        for index, result in self._stream(images, stride, features, class_token, out):
            if isinstance(result, Exception):
                raise result
            results[index] = result
        maps = [results[i].features for i in sorted(results)]
        tokens: list[Any] = [results[i].class_token for i in sorted(results)]
        if alone:
            whole = maps[0] if out is None else out
            return (whole, tokens[0]) if class_token else whole
        if ndim == 4:
            stacked = np.stack(maps)
            return (stacked, np.stack(tokens)) if class_token else stacked
        return (maps, tokens) if class_token else maps

    def stream(
        self, images: Images, stride: int | None = 1, *, class_token: bool = False
    ) -> "Iterator[ImageFeatures | ImageError]":
        """Each image's result, or an `ImageError`, as soon as it is there, so not in order.

        Few images are in memory at any time. Arguments are those of a call.
        """
        check_flag(class_token=class_token)
        for _, result in self._stream(images, stride, None, class_token, None):
            yield result

    # ---------------------------------------------------------------------------------- batches
    def encode(
        self, images: Num[Array | np.ndarray, "b H W 3"], *, class_token: bool = False
    ) -> Any:
        """The backbone's map of images `(B, H, W, 3)`, and nothing else: `(B, h, w, C)`, jitted.

        Args:
          images: RGB in 0 .. 255, uint8 or floating point; both sides multiples of `multiple`.
          class_token: return a pair, with the class tokens (B, C).

        Raises:
          ValueError: no backbone, images of another shape, or no class token.
        """
        check_flag(class_token=class_token)
        self._need_backbone(class_token)
        need(
            images.ndim == 4 and images.shape[3] == 3,
            f"images must be (batch, height, width, 3), got shape {images.shape}",
        )
        need(
            all(n % self.multiple == 0 and n > 0 for n in images.shape[1:3]),
            f"images must have sides that are multiples of {self.multiple}, got "
            f"{images.shape[1]}x{images.shape[2]}; call the pipeline itself, which resizes them",
        )
        count = images.shape[0]
        maps, tokens = self._encoded(self._placed(images), images.shape[1:3])
        return (maps[:count], tokens[:count]) if class_token else maps[:count]

    def upsample(
        self,
        features: Float[Array | np.ndarray, "b h w c"],
        images: Num[Array | np.ndarray, "b Hi Wi 3"],
        size: Sequence[int] | None = None,
        *,
        values: Float[Array | np.ndarray, "_b _h _w d"] | None = None,
    ) -> Float[Array, "b H W _d"]:
        """Features `(B, h, w, C)` at `size`, guided by the images, all at once: jitted.

        Args:
          features: of the backbone, or of any other.
          images: RGB in 0 .. 255, uint8 or floating point, of any size; they show what the features
            are of, from edge to edge.
          size: height and width of the result; None: those of the images.
          values: maps of as many cells that get the features' weights in their stead, such as
            classes' probabilities; channels a multiple of `value_groups`.

        Raises:
          ValueError: arrays that do not fit, a size below that of the features, or values for an
            upsampler whose output is more than a sum of features.
        """
        need(
            images.ndim == 4 and images.shape[3] == 3,
            f"images must be (batch, height, width, 3), got shape {images.shape}",
        )
        need(
            features.ndim == 4 and features.shape[0] == images.shape[0],
            "features must be (batch, height, width, channels), with the images' batch size "
            f"{images.shape[0]}, got shape {features.shape}",
        )
        size = tuple(images.shape[1:3] if size is None else size)
        self._check_size(size, features.shape[1:3])
        member = self._member(features.shape[3])
        count = images.shape[0]
        placed = self._placed(features, dtype=self.dtype), self._placed(images)
        if values is not None:
            need(
                member.groups > 0, f"values cannot be given to {self.name!r}: it makes new features"
            )
            need(
                values.shape[:3] == features.shape[:3] and values.shape[3] % member.groups == 0,
                f"values must be of the features' cells, {features.shape[:3]}, with a multiple of "
                f"{member.groups} channels, got shape {values.shape}",
            )
            values = self._placed(values, dtype=self.dtype)
        return member.program(member.weights, *placed, values, size)[:count]

    @property
    def value_groups(self) -> int:
        """Blocks of channels that get weights of their own, for `values`; 0: none can be given."""
        need(self.channels is not None, "backbone is None: value_groups are not known yet")
        return self._member(self.channels).groups

    def memory(
        self,
        height: int,
        width: int,
        stride: int = 1,
        *,
        channels: int | None = None,
        batch_size: int | None = None,
    ) -> Memory:
        """What photos of this size take. It compiles both programs and runs neither.

        Args:
          height: of the photo.
          width: of the photo.
          stride: as in a call.
          channels: of features from elsewhere; then a cell is taken to be 16 x 16 pixels.
          batch_size: photos at once; None: those of the pipeline.
        """
        check_whole(height=height, width=width, stride=stride)
        batch = self.batch_size if batch_size is None else batch_size
        images = self._abstract((batch, height, width, 3), jnp.uint8)
        encode, of_backbone = 0, 0
        low: tuple[Any, ...] = (batch, -(-height // 16), -(-width // 16), channels)
        if self.channels is not None:
            seen = self._seen(height, width)
            encode = _bytes(self._encode.lower(self._backbone_weights, images, seen).compile())
            low = (batch, *(n // self.stride for n in seen), self.channels)
            of_backbone = _size(self._backbone_weights)
        need(low[3] is not None, "channels is needed: there is no backbone that says it")
        size = (-(-height // stride), -(-width // stride))
        self._check_size(size, low[1:3])
        member = self._member(low[3])
        parts = self._passes(member, batch, size, low[3])
        features = self._abstract(low, self.dtype)
        values = None
        if len(parts) > 1:
            values = self._abstract((*low[:3], len(parts[0])), self.dtype)
        lowered = member.program.lower(member.weights, features, images, values, size)
        return Memory(
            encode=encode,
            upsample=_bytes(lowered.compile()),
            passes=len(parts),
            result=batch * size[0] * size[1] * low[3] * self.dtype.itemsize,
            weights=of_backbone + _size(member.weights),
        )

    # ---------------------------------------------------------------------------------- backbone
    def _set_backbone(self, backbone: Any, layers: Sequence[int] | None) -> None:
        """Its program, its weights on the devices, and what is known of its maps."""
        widths: Any = getattr(backbone, "features", None)
        strides: Any = getattr(backbone, "strides", None)
        need(
            isinstance(widths, tuple) and isinstance(strides, tuple),
            "backbone must be a module with the attributes features and strides, a tuple each; "
            f"{type(backbone).__name__} lacks them",
        )
        need(
            layers is None or self._is_vit,
            f"layers are blocks of a ViT, got a {type(backbone).__name__}",
        )
        if self._is_vit:
            self._layers = backbone.layers if layers is None else check_layers(backbone, layers)
            widths = (len(self._layers) * widths[0],)
        self.channels, self.stride = widths[-1], strides[-1]
        self.multiple = int(np.lcm.reduce(strides))
        graphdef, weights = nnx.split(evaluating(backbone))
        weights = _cast(weights, self.dtype)
        self._backbone_weights = jax.device_put(weights, self._everywhere)

        def encode(weights: Any, images: Array, size: tuple[int, int]) -> tuple[Array, Any]:
            """Maps, and class tokens; of all layers, one after the other along the channels."""
            x = normalise(images, self.preprocess.mean, self.preprocess.std)
            if x.shape[1:3] != size:
                x = resize(x, size, antialias=True)
            module: Any = nnx.merge(graphdef, weights)
            x = x.astype(self.dtype)
            if self._layers is None:
                maps, tokens = module(x)[-1:], None
            else:
                maps, tokens = module.maps_and_class_tokens(x, self._layers)
                tokens = jnp.concatenate(tokens, axis=-1).astype(self.dtype)
            if self._channel_norm:
                wide = [y.astype(jnp.float32) for y in maps]
                maps = [jax.nn.standardize(y, axis=-1, epsilon=1e-5) for y in wide]
            return jnp.concatenate(maps, axis=-1).astype(self.dtype), tokens

        self._encode = jax.jit(encode, static_argnames="size", out_shardings=self._over_batch)

    def _need_backbone(self, class_token: bool) -> None:
        need(self.channels is not None, "backbone is None: give one, or features")
        need(self._is_vit or not class_token, "class_token is of a ViT; this backbone is none")

    def _encoded(self, images: Array, size: Sequence[int]) -> tuple[Array, Array]:
        return self._encode(self._backbone_weights, images, tuple(size))

    def _seen(self, height: int, width: int) -> tuple[int, int]:
        """The size at which the backbone sees a photo: the nearest multiples of its stride."""
        sides = self.preprocess.resized_size(height, width)
        height, width = (self.multiple * max(1, round(n / self.multiple)) for n in sides)
        return height, width

    # --------------------------------------------------------------------------------- upsampler
    def _member(self, channels: int) -> "_Member":
        """The upsampler for features of so many channels."""
        if channels not in self._members:
            module, colours = create_member(
                self._upsampler,
                self._weights_of_upsampler,
                channels,
                scale=self.stride or 16,
                normalisation=self._image_normalisation,
            )
            self._members[channels] = _Member(module, colours, self)
        return self._members[channels]

    def _check_size(self, size: Sequence[int], low: Sequence[int]) -> None:
        need(len(size) == 2, f"size must be height and width, got {size}")
        need(
            all(n >= m for n, m in zip(size, low, strict=True)),
            f"the result of {size[0]}x{size[1]} must not be smaller than the features, "
            f"{low[0]}x{low[1]}: take a smaller stride, or stride=None for the features themselves",
        )

    def _passes(
        self, member: "_Member", batch: int, size: tuple[int, int], channels: int
    ) -> list[np.ndarray]:
        """The channels of each pass, as many in each, from all groups alike."""
        groups = member.groups
        if not groups:
            return [np.arange(channels)]
        rows = -(-batch // len(self._devices))
        wanted = rows * size[0] * size[1] * channels * self.dtype.itemsize / self.pass_bytes
        each = channels // groups
        count = next(n for n in range(1, each + 1) if each % n == 0 and (n >= wanted or n == each))
        parts = np.split(np.arange(channels).reshape(groups, each), count, axis=1)
        return [part.ravel() for part in parts]

    # ---------------------------------------------------------------------------------- pipeline
    def _stream(
        self,
        images: Images,
        stride: int | None,
        features: Any,
        class_token: bool,
        out: np.ndarray | None,
    ) -> Iterator[tuple[int, Any]]:
        if stride is not None:
            check_whole(stride=stride)
        if features is None:
            self._need_backbone(class_token)
        else:
            need(not class_token, "class_token is the backbone's: not with features from elsewhere")
            need(stride is not None, "stride is None, which gives features as they are: they are")
        items = find_images(images)
        given = None if features is None else _as_maps(features, len(items))
        waiting: dict[tuple[int, ...], list[Item]] = {}
        # Batches are filled up: another number of photos would be another program.
        full = self.batch_size if len(items) > 1 else len(self._devices)

        def start(rows: list[Item]) -> Iterator[tuple[int, Any]]:
            maps = None if given is None else np.stack([given[item.index] for item in rows])
            try:
                results = self._run(rows, maps, full, stride, class_token, out)
            except jax.errors.JaxRuntimeError as error:
                yield from ((item.index, failed(item, error, _LESS)) for item in rows)
                return
            yield from zip((item.index for item in rows), results, strict=True)

        for item in in_threads(self._load, items) if any(i.path for i in items) else items:
            if item.error is not None or item.pixels is None:
                yield item.index, item.error
                continue
            size = item.pixels.shape[:2]
            rows = waiting.setdefault(size, [])
            rows.append(item)
            if len(rows) == self.batch_size:
                yield from start(waiting.pop(size))
        for rows in waiting.values():
            yield from start(rows)

    def _load(self, item: Item) -> Item:
        if item.error is not None or item.path is None:
            return item
        from resfu_jax.images import ImageError, read_image

        try:
            pixels = read_image(item.path, orientation=self.preprocess.orientation)
        except ImageError as error:
            return dataclasses.replace(item, error=error)
        return dataclasses.replace(item, pixels=pixels)

    def _run(
        self,
        rows: list[Item],
        maps: np.ndarray | None,
        full: int,
        stride: int | None,
        class_token: bool,
        out: np.ndarray | None,
    ) -> list[ImageFeatures]:
        """The results of photos of one size."""
        pixels = np.stack([item.pixels for item in rows if item.pixels is not None])
        height, width = pixels.shape[1:3]
        images, tokens, count = self._placed(pixels, rows=full), None, len(rows)
        if maps is None:
            low, tokens = self._encoded(images, self._seen(height, width))
        else:
            low = self._placed(maps, rows=full, dtype=self.dtype)
        shown = np.asarray(low)[:count]
        if stride is None:
            high = shown if out is None else _checked_out(out[None], shown.shape)
            if out is not None:
                high[...] = shown
        else:
            size = (-(-height // stride), -(-width // stride))
            self._check_size(size, low.shape[1:3])
            high = self._upsampled(low, images, size, count, out)
        rows_of_tokens = np.asarray(tokens)[:count] if class_token else [None] * count
        return [
            ImageFeatures(item.id, item.path, *parts)
            for item, *parts in zip(rows, high, shown, rows_of_tokens, strict=True)
        ]

    def _upsampled(
        self,
        low: Array,
        images: Array,
        size: tuple[int, int],
        count: int,
        out: np.ndarray | None,
    ) -> np.ndarray:
        """The features of the first `count` images, on the host, pass by pass."""
        channels = low.shape[3]
        member = self._member(channels)
        passes = self._passes(member, low.shape[0], size, channels)
        if len(passes) == 1 and out is None:
            return np.asarray(member.program(member.weights, low, images, None, size))[:count]
        shape = (count, *size, channels)
        result = np.empty(shape, self.dtype) if out is None else _checked_out(out[None], shape)
        for part in passes:
            values = None if len(passes) == 1 else low[..., part]
            found = np.asarray(member.program(member.weights, low, images, values, size))[:count]
            # Channels in a row are written as a slice: NumPy's index arrays are much slower.
            runs = np.split(np.arange(len(part)), np.flatnonzero(np.diff(part) != 1) + 1)
            for run in runs:
                first, last = part[run[0]], part[run[-1]]
                result[..., first : last + 1] = found[..., run[0] : run[-1] + 1]
            del found
        return result

    def _placed(self, x: Any, *, rows: int | None = None, dtype: Any = None) -> Array:
        """A batch on the devices; missing rows repeat the last one."""
        x = x if isinstance(x, np.ndarray | jax.Array) else np.asarray(x)
        if dtype is not None:
            x = x.astype(dtype)
        missing = -x.shape[0] % len(self._devices) if rows is None else rows - x.shape[0]
        if missing:
            together = jnp.concatenate if isinstance(x, jax.Array) else np.concatenate
            x = together([x, *[x[-1:]] * missing])
        return jax.device_put(x, self._over_batch)

    def _abstract(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._over_batch)


class _Member:
    """An upsampler on the devices, and its program.

    Attributes:
      weights: its state.
      program: of weights, features, images in 0 .. 255, values or None, and the size.
      groups: blocks of channels whose weights differ; 0 if channels cannot be computed apart.
    """

    def __init__(self, module: Any, colours: tuple[Three, Three], pipeline: FeaturePipeline):
        # A `GuidedUpsampler` holds the member. It makes guides of maps itself, by its stem; of the
        # image, as in this pipeline, the member sees all pixels.
        member = getattr(module, "upsample", module)
        whole = module if getattr(module, "stem", None) is not None else member
        scale: Any = getattr(module, "scale", None) or getattr(member, "scale", 1)
        self.groups = member.value_groups if keeps_space(member) else 0
        graphdef, weights = nnx.split(evaluating(whole))
        self.weights = jax.device_put(weights, pipeline._everywhere)

        def upsample(
            weights: Any,
            features: Array,
            images: Array,
            values: Array | None,
            size: tuple[int, int],
        ) -> Array:
            up: Any = nnx.merge(graphdef, weights)
            target = size
            if member.needs_whole_scale:
                target = scale * features.shape[1], scale * features.shape[2]
            options = {} if values is None else dict(values=values)
            if whole is not member:
                y = up(features, images, target, **options)
            elif member.guide == "none":
                y = up(features, output_size=target, **options)
            else:
                image = normalise(images, *colours).astype(features.dtype)
                y = up(features, image, output_size=target, **options)
            if y.shape[1:3] != size:
                y = resize(y, size, antialias=True)
            return y.astype(features.dtype)

        self.program = jax.jit(upsample, static_argnames="size", out_shardings=pipeline._over_batch)


# ------------------------------------------------------------------------------------------- parts
def _name(module: Any) -> str:
    """The registry's name of a module's class, the shortest of several."""
    cls = type(getattr(module, "upsample", module))
    names = [name for name in list_upsamplers() if upsampler_entry(name).cls is cls]
    return min(names, key=len, default=cls.__name__)


def _cast(state: Any, dtype: Any) -> Any:
    """Parameters in the type to compute in: layers without one of their own take theirs."""
    if dtype == jnp.float32:
        return state
    params, rest = nnx.split_state(state, nnx.Param, ...)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return nnx.merge_state(params, rest)


def _as_maps(features: Any, count: int) -> np.ndarray:
    """Maps (B, h, w, C) from elsewhere, one for each photo."""
    maps = np.asarray(features)
    maps = maps[None] if maps.ndim == 3 else maps
    need(
        maps.ndim == 4 and maps.shape[0] == count and maps.size > 0,
        f"features must be a map (h, w, C), or (B, h, w, C) for B = {count} photos, got shape "
        f"{np.shape(features)}",
    )
    need(
        jnp.issubdtype(maps.dtype, jnp.floating),
        f"features must be floating point, got {maps.dtype}",
    )
    return maps


def _checked_out(out: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    need(
        out.shape == shape and jnp.issubdtype(out.dtype, jnp.floating),
        f"out must be floating point of shape {shape[1:]}, got {out.dtype} of {out.shape[1:]}",
    )
    return out


def _bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def _size(state: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
