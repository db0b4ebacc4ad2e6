"""What every op, backbone, head and model takes: real arrays, and any number of images, also none.

The upsamplers' part is in tests/test_upsamplers_common.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax import ops
from resfu_jax.backbones import create_backbone
from resfu_jax.heads import DEPTH_HEADS, HEADS, create_head
from resfu_jax.inference import Inference
from resfu_jax.model import create_model
from resfu_jax.ops.dtypes import promote


class Op(NamedTuple):
    """The arguments of an op that are arrays, by their shapes, and all others."""

    maps: dict[str, tuple[int, ...]]  # one of everything an image
    others: dict[str, tuple[int, ...]] = {}  # the same for all images
    keywords: dict[str, Any] = {}
    moves: bool = False  # values, of any type


X, SMALL, CELLS = (2, 6, 4, 8), (2, 3, 2, 8), (2, 3, 2)
OPS = {
    "adaptive_avg_pool": Op(dict(x=X), keywords=dict(output_size=(3, 3))),
    "adaptive_filter": Op(dict(x=SMALL, weights=(2, 6, 4, 9))),
    "box_filter": Op(dict(x=X), keywords=dict(radius=1)),
    "conv": Op(dict(x=X), dict(kernel=(3, 3, 8, 5))),
    "cross_attention": Op(dict(q=X, k=SMALL, v=SMALL), keywords=dict(heads=2)),
    "deformable_attention": Op(
        dict(q=X, k=SMALL, v=SMALL, points=(2, 6, 4, 2, 3, 2)),
        dict(bias=(2, 3, 4)),
        dict(heads=2),
    ),
    "deformable_sample": Op(dict(x=SMALL, points=(2, 6, 4, 2, 3, 2))),
    "depthwise_conv": Op(dict(x=X), dict(kernel=(3, 3, 8))),
    "fns_attention": Op(dict(attn=(2, 6, 4, 9), x=SMALL)),
    "gaussian_blur": Op(dict(x=X)),
    "gaussian_splat": Op(
        dict(values=SMALL, guide=X)
        | dict.fromkeys(("sigma_x", "sigma_y", "theta", "sigma_r"), CELLS),
        keywords=dict(r_max=2),
    ),
    "grid_sample": Op(dict(x=X, grid=(2, 3, 5, 2))),
    "group_norm": Op(dict(x=X), dict(scale=(8,), bias=(8,)), dict(groups=2)),
    "grouped_conv": Op(dict(x=X), dict(kernel=(3, 3, 4, 6)), dict(groups=2)),
    "grouped_linear": Op(dict(x=X), dict(kernel=(4, 6)), dict(groups=2)),
    "guided_filter": Op(dict(guide=X, x=X), keywords=dict(radius=2, eps=0.1)),
    "joint_bilateral": Op(
        dict(values=SMALL, guide=X), keywords=dict(radius=1, sigma_spatial=1.0, sigma_range=1.0)
    ),
    "layer_norm": Op(dict(x=X), dict(scale=(8,), bias=(8,))),
    "local_attention": Op(dict(scores=(2, 6, 4, 9), v=SMALL, scale=(2, 6, 4, 1))),
    "local_reassembly": Op(dict(weights=(2, 6, 4, 9), v=SMALL)),
    "local_similarity": Op(dict(q=X, k=SMALL), keywords=dict(kernel_size=3)),
    "cross_scale_attention": Op(
        dict(q=(2, 6, 4, 2, 3), k=(2, 3, 2, 2, 3), v=(2, 3, 2, 2, 5)), keywords=dict(kernel_size=2)
    ),
    "neighborhood_attention": Op(
        dict(q=(2, 6, 4, 2, 3), k=(2, 6, 4, 2, 3), v=(2, 6, 4, 2, 5)), keywords=dict(kernel_size=3)
    ),
    "norm_linear": Op(
        dict(x=X),
        dict(scale=(8,), norm_bias=(8,), kernel=(8, 5), bias=(5,)),
        dict(norm="layer"),
    ),
    "pad": Op(dict(x=X), keywords=dict(border=(1, 2)), moves=True),
    "pixel_shuffle": Op(dict(x=X), keywords=dict(factor=2), moves=True),
    "pixel_unshuffle": Op(dict(x=X), keywords=dict(factor=2), moves=True),
    "reflect_conv": Op(
        dict(x=X),
        dict(kernel=(3, 3, 8, 5), bias=(5,), scale=(8,), norm_bias=(8,)),
        dict(groups=2),
    ),
    "resize": Op(dict(x=X), keywords=dict(scale=2, method="nearest"), moves=True),
    "unfold": Op(dict(x=X), keywords=dict(kernel_size=3, padding=1), moves=True),
}
every = pytest.mark.parametrize("name", OPS)
REAL = [
    (name, argument)
    for name, op in OPS.items()
    for argument in (*op.maps, *op.others)
    if not op.moves
]
SEVERAL = [(name, a) for name, op in OPS.items() if len(op.maps) > 1 for a in op.maps]


def arguments(name, **changed):
    """Random arrays, with some of other shapes or dtypes."""
    rng = np.random.default_rng(0)
    op, arrays = OPS[name], {}
    for argument, shape in (op.maps | op.others).items():
        dtype = changed.get(argument, jnp.float32)
        arrays[argument] = jnp.asarray(3 * rng.random(shape), jnp.float32).astype(dtype)
    return arrays


def call(name, arrays):
    return getattr(ops, name)(**arrays, **OPS[name].keywords)


def test_every_op_is_listed():
    of_any_axes = {"map_rows", "rotate"}
    assert {*OPS, *of_any_axes, "Implementation"} == set(ops.__all__)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
@pytest.mark.parametrize(("name", "argument"), REAL)
def test_what_is_not_real_is_refused(name, argument, dtype):
    arrays = arguments(name, **{argument: dtype})
    with pytest.raises(ValueError, match=f"^{argument} must be floating point, got {dtype.dtype}"):
        call(name, arrays)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
@pytest.mark.parametrize("name", [name for name in OPS if OPS[name].moves])
def test_labels_are_moved_as_they_are(name, dtype):
    y = call(name, arguments(name, x=dtype))
    assert y.dtype == dtype
    x = arguments(name)["x"]
    expected = call(name, dict(x=x.astype(dtype).real.astype(jnp.float32)))
    np.testing.assert_array_equal(y.real.astype(jnp.float32), expected)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_interpolated_labels_are_refused(method):
    with pytest.raises(ValueError, match="needs a floating-point x, got int32; cast it"):
        ops.resize(jnp.ones(X, jnp.int32), scale=2, method=method)


@pytest.mark.parametrize(("name", "argument"), SEVERAL)
def test_float16_with_bfloat16_is_float32(name, argument):
    """The narrowest type that holds both; the values are those of the same numbers in float32."""
    kinds = {a: jnp.bfloat16 for a in OPS[name].maps} | {argument: jnp.float16}
    arrays = arguments(name, **kinds)
    y = call(name, arrays)
    assert y.dtype == jnp.float32
    expected = call(name, {a: x.astype(jnp.float32) for a, x in arrays.items()})
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("name", ["conv", "depthwise_conv", "grouped_conv", "grouped_linear"])
def test_kernels_have_the_dtype_of_what_they_filter(name):
    arrays = arguments(name, x=jnp.float16, kernel=jnp.bfloat16)
    with pytest.raises(ValueError, match="kernel must have x's dtype float16, got bfloat16"):
        call(name, arrays)


def test_promotion():
    half, brain = jnp.float16, jnp.bfloat16
    assert promote(half, half) == half
    assert promote(brain) == brain
    assert promote(half, brain) == promote(brain, half, brain) == jnp.float32
    assert promote(brain, jnp.float32) == jnp.float32
    assert promote(half, jnp.float64, brain) == jnp.float64


# ----------------------------------------------------------------------------------------- no image
def none_of(arrays, names):
    return {n: a[:0] if n in names else a for n, a in arrays.items()}


@every
def test_an_empty_batch(name):
    """An empty result and gradients, of the shapes that one image has."""
    op, arrays = OPS[name], arguments(name)
    one = jax.eval_shape(lambda a: call(name, a), arrays)
    empty = none_of(arrays, op.maps)
    for run in (call, jax.jit(call, static_argnums=0)):
        y = run(name, empty)
        assert (y.shape, y.dtype) == ((0, *one.shape[1:]), one.dtype)
    y, vjp = jax.vjp(lambda a: call(name, a), empty)
    (gradients,) = vjp(y)
    for argument, a in empty.items():
        assert gradients[argument].shape == a.shape
        np.testing.assert_array_equal(gradients[argument], jnp.zeros_like(a))
    per_call = jax.vmap(lambda maps: call(name, empty | maps))
    y = per_call({n: jnp.zeros((3, 0, *shape[1:])) for n, shape in op.maps.items()})
    assert y.shape == (3, 0, *one.shape[1:])


@pytest.mark.parametrize("axis", [1, 2, 3])
@every
def test_maps_without_pixels_or_channels_are_refused(name, axis):
    if name == "grouped_linear":  # a matrix product, of any number of vectors
        return
    for argument, shape in OPS[name].maps.items():
        arrays = arguments(name)
        none = jnp.zeros([0 if i == axis else n for i, n in enumerate(shape)])
        if axis >= len(shape):  # one number a pixel
            continue
        with pytest.raises(ValueError, match=f"^{argument} must have no axis of length 0"):
            call(name, arrays | {argument: none})


def test_what_is_no_array_is_refused():
    with pytest.raises(ValueError, match="x must be an array, got list"):
        ops.box_filter([[1.0]], 1)
    with pytest.raises(ValueError, match="x must be a batch of maps"):
        ops.unfold(jnp.float32(1), 3)


def test_numpy_arrays_are_arrays():
    x = np.random.default_rng(0).random(X).astype(np.float32)
    np.testing.assert_array_equal(ops.box_filter(x, 1), ops.box_filter(jnp.asarray(x), 1))


# ------------------------------------------------------------------------- backbones, heads, models
BACKBONES = {
    "mit": dict(widths=(8, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 1, 1)),
    "resnet": dict(variant="18", widths=(4, 4, 4, 4), depths=(1, 1, 1, 1), stem_width=4),
    "vit": dict(variant="tiny", width=8, depth=1, heads=1, image_size=32),
}
IMAGES = (0, 64, 64, 3)


def seed():
    return nnx.Rngs(0)


def check_empty(module, shapes, *arrays):
    """Empty results, gradients that are zero, and a state that nothing has changed."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    @jax.jit
    def run(params, rest, arrays):
        def f(params, arrays):
            module = nnx.merge(graphdef, params, rest, copy=True)
            return module(*arrays), nnx.state(module, nnx.BatchStat)

        y, vjp, stats = jax.vjp(f, params, arrays, has_aux=True)
        return y, vjp(y), stats

    y, gradients, stats = run(params, rest, arrays)
    assert [a.shape for a in jax.tree.leaves(y)] == shapes
    for g, a in zip(jax.tree.leaves(gradients), jax.tree.leaves((params, arrays)), strict=True):
        np.testing.assert_array_equal(g, jnp.zeros_like(a))
    before = nnx.state(module, nnx.BatchStat)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(stats), nnx.to_pure_dict(before))


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_an_empty_batch(name):
    backbone = create_backbone(name, **BACKBONES[name], rngs=seed())
    shapes = [
        (0, 64 // stride, 64 // stride, width)
        for stride, width in zip(backbone.strides, backbone.features, strict=True)
    ]
    check_empty(backbone, shapes, jnp.zeros(IMAGES))


# Heads of one map, which they upsample with the image as the guide.
OF_ONE_MAP = ("linear", "linear_probe", "bins")


def outputs(name):
    """Channels of a head's output."""
    return 1 if name in DEPTH_HEADS else 3


@pytest.mark.parametrize("upsampler", ["bilinear", "sapa"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_an_empty_batch(name, upsampler):
    widths, sides = ((8,), (4,)) if name in OF_ONE_MAP else ((8,) * 4, (16, 8, 4, 2))
    head = create_head(
        name,
        in_features=widths,
        num_classes=outputs(name),
        width=8,
        upsampler=upsampler,
        rngs=seed(),
    )
    maps = tuple(jnp.zeros((0, n, n, c)) for n, c in zip(sides, widths, strict=True))
    side = 64 if name in ("linear_probe", "bins") else 16
    check_empty(head, [(0, side, side, outputs(name))], maps, jnp.zeros(IMAGES))


@pytest.mark.parametrize("infer", [Inference(), Inference("slide", (32, 32), (16, 16), flip=True)])
def test_models_of_an_empty_batch(infer):
    model = create_model(
        backbone=dict(name="resnet", **BACKBONES["resnet"]),
        head=dict(width=8, upsampler="carafe"),
        num_classes=3,
        rngs=seed(),
    )
    model.eval()
    y = jax.jit(lambda images: infer(model, images))(jnp.zeros((0, 64, 64, 3), jnp.uint8))
    assert y.shape == (0, 64, 64, 3)
    with pytest.raises(ValueError, match="images must have no axis of length 0"):
        infer(model, jnp.zeros((1, 0, 64, 3)))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, jnp.bool_, jnp.complex64])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_take_normalised_images_only(name, dtype, as_users_call):
    backbone = nnx.eval_shape(lambda: create_backbone(name, **BACKBONES[name], rngs=seed()))
    with pytest.raises(ValueError, match="images must be normalised floating point"):
        backbone(jnp.zeros((1, 64, 64, 3), dtype))
    with pytest.raises(ValueError, match="images must have no axis of length 0"):
        backbone(jnp.zeros((1, 64, 0, 3)))


@pytest.mark.parametrize("name", HEADS)
def test_heads_take_real_maps_only(name, as_users_call):
    widths = (8,) if name in OF_ONE_MAP else (8,) * 4
    head = create_head(name, in_features=widths, num_classes=outputs(name), width=8, rngs=seed())
    maps, images = [jnp.zeros((1, 4, 4, 8)) for _ in widths], jnp.zeros((1, 64, 64, 3))
    wrong = [*maps[:-1], maps[-1].astype(jnp.int32)]
    with pytest.raises(ValueError, match=rf"features\[{len(maps) - 1}\] must be floating point"):
        head(wrong, images)
    with pytest.raises(ValueError, match=r"features\[0\] must have no axis of length 0"):
        head([maps[0][:, :0], *maps[1:]], images)
    if len(widths) == 1:  # the image is the guide
        with pytest.raises(ValueError, match="images must be normalised floating point"):
            head(maps, images.astype(jnp.uint8))


BUILDERS: dict[str, Callable] = {
    **{name: lambda name=name, **o: create_backbone(name, rngs=seed(), **o) for name in BACKBONES},
    **{
        name: lambda name=name, **o: create_head(
            name, in_features=(8,) * 4, num_classes=outputs(name), rngs=seed(), **o
        )
        for name in HEADS
    },
}


@pytest.mark.parametrize("argument", ["dtype", "param_dtype"])
@pytest.mark.parametrize("builder", BUILDERS)
def test_dtypes_of_modules_are_floating(builder, argument):
    for wrong in (jnp.int32, "uint8", bool, jnp.complex64, "floaty"):
        with pytest.raises(ValueError, match=f"^{argument} must be a floating-point dtype"):
            BUILDERS[builder](**{argument: wrong})
