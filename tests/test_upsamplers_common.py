"""What every registered upsampler must do. A new one gets all of it by registering.

Upsamplers of other packages: UPSAMPLERS="package.module ..." python -m pytest, as docs/extending.md
tells.
"""

import functools
import importlib
import os
import re

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small import SMALL

from resfu_jax import create_upsampler, list_upsamplers
from resfu_jax.model import evaluating
from resfu_jax.ops import _rows as rows
from resfu_jax.upsamplers import pixel_weights, takes_values, upsampler_entry

for module in os.environ.get("UPSAMPLERS", "").split():
    importlib.import_module(module)


def distinct():
    """All names but those that differ from another one in the scale of some gradients only."""
    seen = {}
    for name in list_upsamplers():
        entry = upsampler_entry(name)
        options = sorted((k, v) for k, v in entry.options.items() if k != "lr_mult")
        seen.setdefault((entry.cls, str(options)), name)
    return list(seen.values())


NAMES = distinct()
GUIDED = [n for n in NAMES if upsampler_entry(n).cls.guide != "none"]
BY_IMAGE = [n for n in GUIDED if upsampler_entry(n).cls.guide == "image"]
REASSEMBLING = [n for n in NAMES if takes_values(upsampler_entry(n).cls)]
every = pytest.mark.parametrize("name", NAMES)

# Where what lies beyond the image counts as zero, only the interior keeps constants.
REACH = 2


@functools.cache
def build(name, scale=2, width=16, **options):
    return evaluating(
        create_upsampler(
            name,
            features=width,
            guide_features=width,
            scale=scale,
            **SMALL.get(name, {}),
            **options,
        )
    )


def inputs(name, *, scale=2, batch=2, size=(3, 5), width=16):
    """Random features, and a guide, a map or an image, if the upsampler takes one."""
    h, w = size
    channels = 3 if name in BY_IMAGE else width
    x = normal(1, batch, h, w, width)
    return (x, normal(2, batch, h * scale, w * scale, channels)) if name in GUIDED else (x,)


def normal(seed, *shape):
    """Random numbers, by NumPy: JAX would compile a program for every shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def disturbed(name, spread=0.2, **options):
    """The upsampler away from its initialisation, where some layers are zero."""
    graphdef, params, rest = nnx.split(build(name, **options), nnx.Param, ...)
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(3)
    leaves = [
        jnp.asarray(np.asarray(p) + np.asarray(spread * rng.normal(size=p.shape), p.dtype))
        for p in leaves
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves), rest)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graphdef, params, arrays, keywords):
    return nnx.merge(graphdef, params)(*arrays, **keywords)


def run(up, arrays, **keywords):
    """The compiled call."""
    return _apply(*nnx.split(up), arrays, keywords)


def gradients(up, arrays):
    """Those of the parameters and the inputs."""
    return _gradients(*nnx.split(up, nnx.Param, ...), arrays)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(graphdef, params, rest, arrays):
    def loss(params, arrays):
        y = jax.checkpoint(lambda p, a: nnx.merge(graphdef, p, rest)(*a))(params, arrays)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))).sum()

    return jax.grad(loss, argnums=(0, 1))(params, arrays)


@every
def test_every_parameter_and_input_receives_a_gradient(name):
    """Odd, non-square, one image; in tree mode and under `jax.checkpoint`."""
    arrays = inputs(name, batch=1)
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        up = disturbed(name)
        params, d_inputs = gradients(up, arrays)
    for path, g in nnx.to_flat_state(params):
        assert np.isfinite(g[...]).all(), path
        dead = any(path[-len(end) :] == end for end in up.without_gradient)
        assert dead == (np.abs(g[...]).max() <= 1e-8), path
    for g, a in zip(d_inputs, arrays, strict=True):
        assert g.shape == a.shape
        assert np.isfinite(g).all()
        assert np.abs(g).max() > 1e-6


@pytest.mark.parametrize("scale", [3, 8])
@every
def test_scales(name, scale):
    """All other tests are of scale 2, or 4 in those that compare with goldens."""
    for width in (16, 64, 72):  # the first that the member takes at this scale
        try:
            up = build(name, scale, width)
            break
        except ValueError:
            continue
    else:
        pytest.skip("it does not know this scale, and says so")
    y = run(up, inputs(name, scale=scale, batch=1, size=(2, 3), width=width))
    assert y.shape == (1, 2 * scale, 3 * scale, width)
    assert np.isfinite(y).all()
    assert np.abs(y).max() > 1e-3


@every
def test_single_pixel(name):
    y = run(disturbed(name), inputs(name, batch=1, size=(1, 1)))
    assert y.shape == (1, 2, 2, 16)
    assert np.isfinite(y).all()


@every
def test_output_size_is_kept_or_refused(name):
    """Any other size is made or, if the member says so, answered by what is possible."""
    up, size = build(name), (7, 11)
    arrays, sizes = (inputs(name, batch=1)[0], normal(2, 1, *size, 16)), ()
    if name in BY_IMAGE:  # larger than the output along one axis, smaller along the other
        arrays, sizes = (arrays[0], normal(2, 1, 9, 8, 3)), (size,)
    elif name not in GUIDED:
        arrays, sizes = arrays[:1], (size,)
    call = jax.jit(lambda *arrays: up(*arrays, *sizes))
    if up.needs_whole_scale:
        with pytest.raises(ValueError, match="scale 2"):
            call.trace(*arrays)
    else:
        y = call(*arrays)
        assert y.shape == (1, *size, 16)
        assert np.isfinite(y).all()
    if name not in GUIDED:  # and its own
        told = jax.jit(lambda x: up(x, (6, 10)))(*arrays)
        np.testing.assert_array_equal(told, run(up, arrays))


@every
def test_jit_equals_eager_and_vmap_equals_batch(name):
    # Not far: LDA-AQU's offsets amplify rounding, which float64 shows to be all that differs.
    up, arrays = disturbed(name, spread=0.1), inputs(name)
    y = run(up, arrays)
    # The metric and the widest tolerance of the goldens.
    goldens.assert_close(up(*arrays), y, 2e-5, "eager")
    single = jax.jit(jax.vmap(lambda *a: up(*(v[None] for v in a))[0]))
    goldens.assert_close(single(*arrays), y, 2e-5, "vmap")


@every
def test_bfloat16_is_finite_and_near_float32(name):
    arrays = inputs(name)
    wanted = run(build(name), arrays)
    low = build(name, dtype=jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(low, nnx.Param)))
    y = run(low, arrays)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=0.1 * np.abs(wanted).max())
    for g in jax.tree.leaves(gradients(low, arrays)):
        assert np.isfinite(g.astype(jnp.float32)).all()


@every
def test_sharded_batch_equals_unsharded(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    # In float64: a batch of one is rounded otherwise than one of eight, and LDA-AQU's steep offsets
    # make that 1e-4 of the values in float32.
    with jax.enable_x64(True):
        graphdef, params, rest = nnx.split(disturbed(name), nnx.Param, ...)
        double = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float64), tree)  # noqa: E731
        up, arrays = nnx.merge(graphdef, double(params), rest), double(inputs(name, batch=8))
        y = run(up, [jax.device_put(a, sharding) for a in arrays])
        assert y.dtype == jnp.float64 and len(y.sharding.device_set) == 8
        np.testing.assert_allclose(y, run(up, arrays), atol=1e-6)


@every
@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_devices_do_not_wait_for_each_other(name, implementation, monkeypatch):
    """Each has its part of the batch; gradients to parameters are not asked for.

    In the forms that are chosen: what gathers in a literal form are made of is of no consequence.
    """
    if implementation == "cpu":
        monkeypatch.setattr(rows, "BLOCK_VALUES", 500)  # several blocks
        jax.clear_caches()  # of programs with other blocks
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    up = nnx.clone(build(name))
    if hasattr(up, "implementation"):
        up.implementation = implementation
    elif implementation != "xla":
        pytest.skip("it has only one form")
    graphdef, params = nnx.split(up)

    def value_and_gradients(*arrays):
        y, vjp = jax.vjp(lambda *arrays: nnx.merge(graphdef, params)(*arrays), *arrays)
        return y, vjp(y)

    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in inputs(name, batch=8)
    ]
    try:
        program = jax.jit(value_and_gradients).lower(*shapes).compile().as_text()
    except ValueError as error:
        if "no such form" not in str(error):
            raise
        pytest.skip("it has no such form")
    assert "num_partitions=8" in program
    assert not re.findall("all-reduce|all-gather|all-to-all|collective-permute", program)


@every
def test_export_with_symbolic_batch_and_sizes(name):
    up = disturbed(name)
    b, h, w = export.symbolic_shape("b, h, w", constraints=["h >= 2", "w >= 2"])
    channels = 3 if name in BY_IMAGE else 16
    shapes = [(b, h, w, 16), (b, 2 * h, 2 * w, channels)][: len(inputs(name))]
    exported = export.export(jax.jit(up.__call__))(
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    )
    reloaded = export.deserialize(exported.serialize())
    arrays = inputs(name, size=(3, 4))
    np.testing.assert_allclose(reloaded.call(*arrays), run(up, arrays), atol=2e-5)


@every
def test_save_and_restore(name, tmp_path):
    up, other = disturbed(name), nnx.clone(build(name))
    state = nnx.as_pure(nnx.state(up))
    if not jax.tree.leaves(state):
        return  # nothing to save
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "up", state)
        checkpointer.wait_until_finished()
        nnx.update(other, checkpointer.restore(tmp_path / "up", state))
    arrays = inputs(name)
    np.testing.assert_array_equal(run(other, arrays), run(up, arrays))


@every
def test_outputs_are_weighted_means(name):
    """Constants stay, and no output lies outside the range of the features."""
    x, *guide = inputs(name, batch=1, size=(6, 7))
    up = build(name)
    if not up.weights_are_convex:
        pytest.skip("it does not say so")
    inner = (slice(None), slice(2 * REACH, -2 * REACH), slice(2 * REACH, -2 * REACH))
    y = run(up, (jnp.full_like(x, -1.25), *guide))
    np.testing.assert_allclose(y[inner], -1.25, rtol=1e-5)
    y = run(up, (x, *guide))
    # Beyond the image counts as zero for the windowed members: it belongs to the range.
    low, high = jnp.minimum(x.min((1, 2)), 0), jnp.maximum(x.max((1, 2)), 0)
    assert (y.max((1, 2)) <= high + 1e-5).all()
    assert (y.min((1, 2)) >= low - 1e-5).all()


@pytest.mark.parametrize("name", REASSEMBLING)
def test_values_stand_in_for_the_features(name):
    up, arrays = disturbed(name), inputs(name)
    x = arrays[0]
    goldens.assert_close(run(up, arrays, values=x), run(up, arrays), 1e-6, "values=features")
    # A member that mixes them with the guide needs as many channels.
    a, b = normal(5, 2, *x.shape[:3], 16 if up.same_width else 8)
    zero, y, both = (run(up, arrays, values=v) for v in (0 * a, a, 3 * a - 2 * b))
    assert y.shape[3] == a.shape[3]
    assert np.abs(y - zero).max() > 0.01
    goldens.assert_close(both, 3 * y - 2 * run(up, arrays, values=b), 1e-5, "linear")


@pytest.mark.parametrize("name", REASSEMBLING)
def test_weights_of_an_output_pixel(name):
    """They are what the pixel makes of any values; they sum to 1 where nothing lies beyond."""
    x, *guide = inputs(name, batch=1, size=(6, 7))
    up, pixel = build(name), (6, 9)
    find = jax.jit(lambda x, *guide: pixel_weights(up, x, pixel, *guide))
    weights = find(x, *guide)
    assert weights.shape == (1, 6, 7)
    values = normal(5, 1, 6, 7, 1)
    y, zero = (
        run(up, (x, *guide), values=jnp.broadcast_to(v, x.shape))[0, *pixel].mean()
        for v in (values, 0 * values)
    )
    np.testing.assert_allclose((weights[..., None] * values).sum(), y - zero, rtol=1e-4)
    if up.weights_are_convex:
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
        assert weights.min() >= 0


@every
def test_wrong_values_are_named(name, as_users_call):
    up, (x, *guide) = build(name), inputs(name, batch=1)

    def trace(f, *arrays, **keywords):
        jax.eval_shape(lambda: f(*arrays, **keywords))

    if name not in REASSEMBLING:
        with pytest.raises(ValueError, match="upsampler must be one that reassembles"):
            trace(pixel_weights, up, x, (0, 0), *guide)
        return
    with pytest.raises(ValueError, match="values must be .* a vector for every pixel"):
        trace(up, x, *guide, values=x[:, 1:])
    with pytest.raises(ValueError, match="pixel must lie in the output of 6x10"):
        trace(pixel_weights, up, x, (6, 0), *guide)
    if 3 % up.value_groups or (up.same_width and up.mixes):
        with pytest.raises(ValueError, match="values must have"):
            trace(up, x, *guide, values=x[..., :3])


@every
def test_wrong_inputs_are_named(name, as_users_call):
    up, (x, *guide) = build(name), inputs(name)
    if not up.any_width:
        with pytest.raises(ValueError, match="features must be"):
            up(x[..., :7], *guide)
    with pytest.raises(ValueError, match="features must be"):
        up(x[0], *guide)
    if guide:
        what = "image" if name in BY_IMAGE else "guide"
        with pytest.raises(ValueError, match=f"{what} must be"):
            up(x, guide[0][0])
        with pytest.raises(ValueError, match=f"{what} must have the features' batch size"):
            up(x, guide[0][:1])
    if name in BY_IMAGE:
        with pytest.raises(ValueError, match="output_size"):
            up(x, *guide, output_size=(0, 3))
    elif guide:
        with pytest.raises(ValueError, match="guide must be"):
            up(x, guide[0][..., :7])
        with pytest.raises(ValueError, match="guide must be at least as large"):
            up(x, guide[0][:, :2])
        with pytest.raises(ValueError, match="guide_features is needed"):
            create_upsampler(name, features=16, scale=2)
    with pytest.raises(ValueError, match="scale must be"):
        create_upsampler(name, features=16, guide_features=16, scale=0)


def named(name, arrays):
    """The call's arrays by their names, values for those that take them."""
    guide = "image" if name in BY_IMAGE else "guide"
    named = dict(zip(("features", guide), arrays, strict=False))
    return named | (dict(values=arrays[0]) if name in REASSEMBLING else {})


@every
def test_what_is_not_real_is_refused(name):
    up, arrays = build(name), named(name, inputs(name, batch=1))
    for argument, a in arrays.items():
        for dtype in (jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64):
            with pytest.raises(ValueError, match=f"^{argument} must be floating point, got"):
                up(**arrays | {argument: a.astype(dtype)})
    for wrong in (jnp.int32, "uint8", bool, jnp.complex64, "floaty"):
        for argument in ("dtype", "param_dtype"):
            with pytest.raises(ValueError, match=f"^{argument} must be a floating-point dtype"):
                build.__wrapped__(name, **{argument: wrong})


@every
def test_float16_with_bfloat16_is_float32(name):
    """The narrowest type that holds both."""
    up, arrays = build(name), named(name, inputs(name, batch=1))
    for argument in arrays if len(arrays) > 1 else ():
        mixed = {
            n: a.astype(jnp.float16 if n == argument else jnp.bfloat16) for n, a in arrays.items()
        }
        assert jax.eval_shape(lambda m=mixed: up(**m)).dtype == jnp.float32
        if argument == "features":
            wide = {n: a.astype(jnp.float32) for n, a in mixed.items()}
            y, expected = (run(up, (), **arrays) for arrays in (mixed, wide))
            goldens.assert_close(y, expected, 2e-6, argument)


@pytest.mark.parametrize("name", REASSEMBLING)
def test_values_are_not_narrowed_to_the_features(name):
    features, *guide = (a.astype(jnp.bfloat16) for a in inputs(name, batch=1))
    up, values = build(name), 1 + 1e-4 * inputs(name, batch=1)[0]
    y = run(up, (features, *guide), values=values)
    assert y.dtype == jnp.float32


@every
def test_an_empty_batch(name):
    """An empty result, empty gradients to inputs, and zeros to parameters."""
    up, arrays = build(name), inputs(name, batch=0)
    y = run(build(name, dtype=jnp.bfloat16), (), **named(name, arrays))
    assert (y.shape, y.dtype) == ((0, 6, 10, 16), jnp.bfloat16)
    params, d_inputs = gradients(up, arrays)
    assert [g.shape for g in d_inputs] == [a.shape for a in arrays]
    for g in jax.tree.leaves(params):
        np.testing.assert_array_equal(g, jnp.zeros_like(g))
    for batch in ((3, 0), (0, 2)):
        y = jax.eval_shape(jax.vmap(up), *(jnp.zeros((*batch, *a.shape[1:])) for a in arrays))
        assert y.shape == (*batch, 6, 10, 16)


@every
def test_maps_without_pixels_or_channels_are_refused(name):
    up, arrays = build(name), named(name, inputs(name, batch=1))
    for argument, a in arrays.items():
        for none in (a[:, :0], a[:, :, :0], a[..., :0]):
            with pytest.raises(ValueError, match=f"^{argument} must have no axis of length 0"):
                up(**arrays | {argument: none})


@pytest.mark.parametrize("name", GUIDED)
def test_the_guide_matters(name):
    x, guide = inputs(name, batch=1)
    up = disturbed(name)
    assert np.abs(run(up, (x, guide)) - run(up, (x, guide[:, ::-1]))).max() > 1e-3
