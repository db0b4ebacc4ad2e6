"""NAF and RaysUp against the official modules, and what they promise."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from resfu_jax import create_upsampler, from_torch, ops
from resfu_jax.ops._windows import window_members
from resfu_jax.upsamplers._encoder import encode_in_turn

FAMILIES = {"naf": 5, "raysup": 3}
SMALL = {
    "naf": dict(dim=32, heads_attn=2, heads_rope=2, kernel_size=3),
    "raysup": dict(qk_dim=32, num_heads=2),
}
# tests/conftest.py switches it off, in versions that can.
AS_IN_USE = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}

every = pytest.mark.parametrize("name", SMALL)


# ------------------------------------------------------------------------------------------ parity


def official(g):
    return f"{g.meta['repo']}:{g.meta['official_class'].split()[0]}"


def inputs_of(g):
    """Features, image and cotangent; and the cameras if there are any."""
    arrays = {k: jnp.asarray(v) for k, v in g.group("in").items()}
    maps = [jnp.moveaxis(arrays[k], 1, -1) for k in ("features", "image", "cotangent")]
    cameras = [arrays[k] for k in ("c2w", "fxfycxcy") if k in arrays]
    return maps, dict(cameras=tuple(cameras)) if cameras else {}


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_gradients(graphdef, params, inputs, cotangent, size, keywords):
    y, vjp = jax.vjp(lambda p, i: nnx.merge(graphdef, p)(*i, size, **keywords), params, inputs)
    return y, vjp(cotangent)


# On a CPU, None is "xla".
@pytest.mark.parametrize(
    ("implementation", "x64"), [("xla", False), ("xla", True), ("reference", True)]
)
@pytest.mark.parametrize("name", goldens.names(*FAMILIES))
def test_equals_the_official_module(name, implementation, x64):
    with jax.enable_x64(x64):
        check_parity(goldens.load(name, x64=x64), implementation)


def check_parity(g, implementation):
    module = from_torch(official(g), g.group("param"), implementation=implementation, **g.args)
    (*inputs, cotangent), keywords = inputs_of(g)
    y, (d_params, d_inputs) = value_and_gradients(
        *nnx.split(module), inputs, cotangent, tuple(g.meta["output_size"]), keywords
    )
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    for what, d in zip(("features", "image"), d_inputs, strict=True):
        goldens.assert_close(d, goldens.nhwc(g.arrays[f"grad/in/{what}"]), g.tol_grad, what)
    buffers = {k: g.arrays[f"param/{k}"] for k in g.meta["buffers"]}
    wanted = jax.tree.leaves(
        nnx.state(from_torch(official(g), g.group("grad/param") | buffers, **g.args))
    )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(d_params), wanted, strict=True):
        what = jax.tree_util.keystr(path)
        if np.any(b):
            goldens.assert_close(a, b, g.tol_grad, what)
        else:
            assert np.abs(a).max() <= 1e-4 * g.meta["grad_scale"], what
    assert sum(not np.any(b) for b in wanted) == len(g.zero_grads)


def test_every_golden_of_the_families_is_compared():
    for family, count in FAMILIES.items():
        assert len(goldens.names(family)) == count, family


def test_stages():
    g = goldens.load("naf_d16_k3_stages")
    up = from_torch("NAF", g.group("param"), **g.args)
    (features, image, _), _ = inputs_of(g)

    @jax.jit
    def stages(image):
        size = tuple(g.meta["output_size"])
        encoded = encode_in_turn((up.encoder, up.sem_encoder), image)
        pooled = [ops.adaptive_avg_pool(e, size) for e in encoded]
        queries = up.queries(image, size)
        return dict(
            encoder=encoded[0],
            sem_encoder=encoded[1],
            pooled=jnp.concatenate(pooled, axis=-1),
            queries=queries,
            keys=ops.adaptive_avg_pool(queries, features.shape[1:3]),
        )

    for what, a in stages(image).items():
        goldens.assert_close(a, goldens.nhwc(g.arrays[f"stage/{what}"]), g.tol_out, what)


@pytest.mark.parametrize("name", goldens.names("raysup"))
def test_even_windows(name):
    g = goldens.load(name)
    for axis, dilation in zip("hw", g.meta["dilation"], strict=True):
        wanted = g.arrays[f"const/index_{axis}"]
        np.testing.assert_array_equal(window_members(len(wanted), 6, dilation), wanted)


def test_cameras():
    """The default is the pose-free script's; only directions matter, and have gradients."""
    g = goldens.load("raysup_q96_h2_fakepose")
    up = from_torch("RaysUp", g.group("param"), **g.args)
    (features, image, _), keywords = inputs_of(g)
    size, wanted = tuple(g.meta["output_size"]), goldens.nhwc(g.arrays["out/y"])
    goldens.assert_close(up(features, image, size), wanted, g.tol_out, "without cameras")
    poses, intrinsics = keywords["cameras"]
    moved = poses.at[:, :3, 3].set(7.0)
    goldens.assert_close(
        up(features, image, size, cameras=(moved, intrinsics)), wanted, g.tol_out, "moved"
    )
    turned = poses.at[:, :3, :3].set(jnp.roll(jnp.eye(3), 1, axis=0))

    def loss(poses, intrinsics):
        return jnp.square(up(features, image, size, cameras=(poses, intrinsics))).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(turned, intrinsics)
    assert all(np.isfinite(d).all() and np.abs(d).max() > 1e-3 for d in gradients)
    empty = [jnp.zeros((0, *a.shape[1:])) for a in (features, image, poses, intrinsics)]
    assert up(*empty[:2], size, cameras=tuple(empty[2:])).shape == (0, *size, 4)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [("naf", {}, 662_528), ("raysup", {}, 102_592), ("raysup", dict(use_spe=False), 3 * 256)],
)
def test_parameter_counts_as_published(name, options, count):
    up = nnx.eval_shape(lambda: create_upsampler(name, features=384, **options))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(up, nnx.Param))) == count


def test_from_torch_tells_what_is_wrong():
    g = goldens.load("naf_d16_k3_stages")
    with pytest.raises(ValueError, match="periods' is not that of rope_base=100.0, dim=16"):
        from_torch("NAF", g.group("param"), **g.args | dict(rope_base=100.0))
    with pytest.raises(ValueError, match="of another shape"):
        from_torch("NAF", g.group("param"), **g.args | dict(dim=32))
    with pytest.raises(ValueError, match="use_encoder must be True"):
        from_torch("NAF", g.group("param"), **g.args, use_encoder=False)
    g = goldens.load("raysup_q64_x2")
    with pytest.raises(ValueError, match="unexpected 'other'"):
        from_torch("RaysUp", g.group("param") | dict(other=np.zeros(1, np.float32)), **g.args)
    with pytest.raises(ValueError, match="missing 'image_tokenizer.weight'"):
        from_torch("RaysUp", g.group("param"), **g.args, use_spe=False)


@every
def test_initial_weights(name):
    """PyTorch's default: within 1 / sqrt(fan in), biases too."""
    up = create_upsampler(name, features=8)
    encoders = up.encoders if name == "raysup" else (up.encoder, up.sem_encoder)
    for encoder in encoders:
        for conv in (encoder.conv, encoder.blocks[0].conv1, encoder.blocks[0].conv2):
            kernel, bias = np.asarray(conv.kernel[...]), np.asarray(conv.bias[...])
            bound = np.prod(kernel.shape[:3]) ** -0.5
            assert 0.9 * bound < np.abs(kernel).max() <= bound
            assert 0.8 * bound < np.abs(bias).max() <= bound
            assert abs(kernel.std() * 3**0.5 / bound - 1) < 4 / kernel.size**0.5
        assert (encoder.blocks[0].norm1.scale[...] == 1).all()
        assert not encoder.blocks[0].norm2.bias[...].any()


# ----------------------------------------------------------------------------------- as any member


@functools.cache
def build(name, **options):
    return create_upsampler(name, features=8, **SMALL[name] | options)


def arrays(size=(6, 7), image=(12, 21), batch=2, dtype=jnp.float32):
    shapes = (batch, *size, 8), (batch, *image, 3)
    return [jax.random.normal(jax.random.key(i), s).astype(dtype) for i, s in enumerate(shapes)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _call(graphdef, params, inputs, size, values=None):
    return nnx.merge(graphdef, params)(*inputs, size, values=values)


def call(up, inputs, size=None, **keywords):
    return _call(*nnx.split(up), inputs, size, **keywords)


@pytest.mark.parametrize(
    ("size", "image", "out"),
    [
        ((5, 3), (31, 17), (19, 23)),  # odd, not whole, each its own
        ((1, 1), (2, 3), None),
        ((2, 3), (40, 4), (4, 6)),  # a window larger than the map, a large image
        ((6, 5), (8, 8), (3, 7)),  # an axis made smaller
    ],
)
@every
def test_any_sizes(name, size, image, out):
    up, inputs = build(name), arrays(size, image)
    y = call(up, inputs, out)
    assert y.shape == (2, *(out or image), 8)
    x = inputs[0]
    assert (y <= x.max((1, 2), keepdims=True) + 1e-5).all()
    assert (y >= x.min((1, 2), keepdims=True) - 1e-5).all()
    if size == (1, 1):
        np.testing.assert_allclose(y, jnp.broadcast_to(x, y.shape), rtol=1e-5)


@every
def test_a_window_that_does_not_fit_is_the_map(name):
    inputs = arrays((4, 5), (8, 10))
    actual, wanted = (call(build(name, kernel_size=k), inputs) for k in (9, 5))
    np.testing.assert_allclose(actual, wanted, atol=1e-6)


@every
def test_float16(name):
    dtype = jnp.float16
    up, inputs = build(name), arrays((3, 40), (3, 640))  # far pixels
    wanted, y = call(up, inputs), call(up, [a.astype(dtype) for a in inputs])
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=0.05 * np.abs(wanted).max())
    y, (d_params, d_inputs) = value_and_gradients(
        *nnx.split(build(name, dtype=dtype)), inputs, y, None, {}
    )
    assert all(d.dtype == jnp.float32 for d in jax.tree.leaves(d_params))
    assert all(np.isfinite(d).all() for d in jax.tree.leaves((d_params, d_inputs)))


@every
def test_export_with_symbolic_sizes(name):
    """Also of fewer pixels than the window has."""
    b, h, w = export.symbolic_shape("b, h, w")
    shapes = (b, h, w, 8), (b, 16 * h, 16 * w, 3)
    up = build(name)
    f = jax.jit(lambda *inputs: up(*inputs))
    exported = export.export(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    reloaded = export.deserialize(exported.serialize())
    for size in ((2, 3), (4, 1)):
        inputs = arrays(size, (16 * size[0], 16 * size[1]))
        np.testing.assert_allclose(reloaded.call(*inputs), call(up, inputs), atol=2e-5)


@every
def test_tree_mode_and_checkpoint(name):
    """And every parameter has a gradient."""
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        graphdef, params = nnx.split(build(name))

        @jax.jit
        def gradients(params, inputs):
            def loss(params):
                y = jax.checkpoint(lambda p: nnx.merge(graphdef, p)(*inputs))(params)
                return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

            return jax.grad(loss)(params)

        for path, d in nnx.to_flat_state(gradients(params, arrays())):
            assert np.isfinite(d[...]).all() and np.abs(d[...]).max() > 0, path


def test_random_scale_of_positions_in_training():
    with pytest.raises(ValueError, match="deterministic must be False where the module is made"):
        nnx.view(build("naf"), deterministic=False)(*arrays())
    _, image = arrays(image=(3, 4), batch=1)
    up = create_upsampler("naf", features=8, **SMALL["naf"], deterministic=False)
    assert np.abs(up.queries(image, (3, 4)) - up.queries(image, (3, 4))).max() > 1e-3
    evaluating = [nnx.view(up, deterministic=True), build("naf")]
    np.testing.assert_array_equal(*(one.queries(image, (3, 4)) for one in evaluating))
    factors = jnp.log(jnp.stack([up._factor(jnp.float32) for _ in range(200)]))
    assert 0.95 * np.log(2) < np.abs(factors).max() <= np.log(2)
    assert abs(factors.mean()) < 4 * np.log(2) / 3**0.5 / 200**0.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("naf", dict(dim=24), "dim must be a multiple of 16"),
        ("naf", dict(dim=32, heads_rope=3), "dim must be a multiple of 16, of heads_attn=4"),
        ("naf", dict(dim=48, heads_attn=3), "features must be a multiple of heads_attn=3, got 8"),
        ("naf", dict(kernel_size=0), "kernel_size must be a positive whole number"),
        ("naf", dict(rope_rescale=0.5), "rope_rescale must be at least 1"),
        ("naf", dict(rope_base=-1.0), "rope_base must be a positive number"),
        ("naf", dict(deterministic=1), "deterministic must be True or False"),
        ("naf", dict(implementation="fast"), "implementation must be one of"),
        ("raysup", dict(qk_dim=48), "qk_dim must be a multiple of 32"),
        ("raysup", dict(num_heads=3), "features must be a multiple of num_heads=3, got 8"),
        ("raysup", dict(num_heads=0), "num_heads must be a positive whole number"),
        ("raysup", dict(use_rope=None), "use_rope must be True or False"),
    ],
)
def test_wrong_options(name, options, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        create_upsampler(name, features=8, **options)


@every
def test_wrong_input(name, as_users_call):
    up, (x, image) = build(name), arrays()
    for args, keywords, message in (
        ((x[..., :4], image), {}, "features must be .batch, height, width, 8"),
        ((x, image[..., :2]), {}, "image must be .batch, height, width, 3"),
        ((x, image[:1]), {}, "image must have the features' batch size 2"),
        ((x, image, (0, 3)), {}, "output_size must be two positive sizes"),
        ((x, image), dict(values=x[..., :3]), "values must have a multiple of 2 channels"),
        ((x, image.astype(jnp.int32)), {}, "image must be floating point"),
        ((x, image[:, :1]), {}, "x must have more than 1 pixels along an axis"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda a=args, k=keywords: up(*a, **k))
    if name == "raysup":
        for wrong in ((jnp.eye(4)[None], jnp.ones((2, 4))), (jnp.ones((2, 4, 4)),)):
            with pytest.raises(ValueError, match="cameras must be poses .batch, 4, 4. and"):
                up(x, image, cameras=wrong)
    of_any = nnx.clone(up)
    of_any.features = None
    with pytest.raises(ValueError, match="channels a multiple of the 2 heads"):
        of_any(x[..., :3], image)


@pytest.mark.parametrize(
    ("name", "direction", "limit"),
    [("naf", "forward", 1.5), ("raysup", "forward", 1.5), ("naf", "both", 9.0)],
)
def test_memory(name, direction, limit):
    """Temporaries in outputs, 28 x 28 to 448 x 448, 384 channels."""
    up = nnx.eval_shape(lambda: create_upsampler(name, features=384))
    graphdef, params = nnx.split(up)
    x, image, y = (
        jax.ShapeDtypeStruct((1, n, n, c), jnp.float32)
        for n, c in ((28, 384), (448, 3), (448, 384))
    )

    def forward(params, *inputs):
        return nnx.merge(graphdef, params)(*inputs)

    def both(params, cotangent, *inputs):
        y, vjp = jax.vjp(forward, params, *inputs)
        return y, vjp(cotangent)

    f, args = (forward, (params,)) if direction == "forward" else (both, (params, y))
    memory = jax.jit(f).lower(*args, x, image).compile(AS_IN_USE).memory_analysis()
    assert memory.temp_size_in_bytes <= limit * y.size * y.dtype.itemsize
