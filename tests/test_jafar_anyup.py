"""JAFAR and AnyUp: against the official modules, and what the common suite does not know."""

import functools
import pathlib

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from safetensors.numpy import load_file

from resfu_jax import create_upsampler, from_torch, ops
from resfu_jax.upsamplers import anyup, upsampler_entry

FORMS = ("reference", "xla")
OFFICIAL = {"jafar": "PaulCouairon/JAFAR:JAFAR", "anyup": "wimmerth/anyup:AnyUp"}
MODULES = goldens.names("jafar_q16", "anyup_q16")
BLOCKS = goldens.names("anyup_natten_block")
WEIGHTS = pathlib.Path(next(iter(goldens.index().values()))["path"]).parent.parent / "weights"
every = pytest.mark.parametrize("name", ["jafar", "anyup"])


def contents(name):
    """Arrays of a golden that has no tolerance."""
    with np.load(goldens.index()[name]["path"]) as z:
        return {key: z[key] for key in z.files if key != "meta"}


def last(a):
    return jnp.asarray(goldens.nhwc(a))


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_gradients(graphdef, params, inputs, cotangents, keywords=()):
    """The output, and the gradients of each cotangent."""
    y, vjp = jax.vjp(lambda p, i: nnx.merge(graphdef, p)(*i, **dict(keywords)), params, inputs)
    return y, jax.vmap(vjp)(cotangents)


@pytest.fixture
def forms(x64, monkeypatch):
    """In float64 all forms of the attention, side by side: the rest of a program takes longer."""
    attention, names = ops.cross_attention, FORMS if x64 else FORMS[-1:]

    def by_all(*arrays, implementation, **options):
        made = [attention(*arrays, implementation=form, **options) for form in names]
        return jnp.concatenate(made, axis=-1)

    monkeypatch.setattr(ops, "cross_attention", by_all)
    return names


@pytest.mark.parametrize("name", MODULES + BLOCKS)
def test_golden(name, x64, forms, as_users_call):  # the output has channels of all forms
    g = goldens.load(name, x64=x64)
    block = name in BLOCKS
    cls = "NATTENCrossAttentionBlock" if block else OFFICIAL[name.partition("_")[0]]
    args = g.args | g.meta.get("call_kwargs", {})  # AnyUp's q_chunk_size, which changes nothing
    module = from_torch(cls, g.group("param"), **args)
    wanted = nnx.state(from_torch(cls, g.group("grad/param"), **args), nnx.Param)
    names = ("q", "k", "v") if block else ("features", "image")
    inputs = [last(g.arrays[f"in/{n}"]) for n in names]
    keywords = () if block else (("output_size", tuple(g.meta["output_size"])),)
    cotangent, y = last(g.arrays["in/cotangent"]), goldens.nhwc(g.arrays["out/y"])
    each = [[cotangent if i == j else 0 * cotangent for j in forms] for i in forms]
    each = jnp.stack([jnp.concatenate(cotangents, axis=-1) for cotangents in each])
    ys, (d_params, d_inputs) = value_and_gradients(*nnx.split(module), inputs, each, keywords)
    for i, form in enumerate(forms):
        goldens.assert_close(jnp.split(ys, len(forms), axis=-1)[i], y, g.tol_out, form)
        for n, d in zip(names, d_inputs, strict=True):
            goldens.assert_close(d[i], goldens.nhwc(g.arrays[f"grad/in/{n}"]), g.tol_grad, n)
        leaves = jax.tree_util.tree_leaves_with_path(d_params)
        for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
            goldens.assert_close(a[i], b, g.tol_grad, jax.tree_util.keystr(path))
            assert np.any(b)


def test_every_golden_is_compared():
    assert (len(MODULES), len(BLOCKS)) == (10, 2)
    others = {"jafar_rope_init", "jafar_pretrained_dinov2_vits14_10x14"} | {
        f"anyup_{n}"
        for n in (
            "gauss_basis",
            "window_masks",
            "paper",
            "multi_backbone",
            "pretrained_paper_64",
            "pretrained_multi_64",
        )
    }
    assert others.union(MODULES, BLOCKS) == set(goldens.names("jafar", "anyup"))


def test_what_conversion_drops_has_no_gradient():
    for name in MODULES + BLOCKS:
        g = goldens.load(name)
        for key, d in g.group("grad/param").items():
            n = len(d) // 3
            unused = f"param/{key}" in g.meta["unused"] or key in BLOCK_UNUSED
            if key.endswith("in_proj_bias"):  # its thirds for keys and values
                d, unused = d[n:], True
            elif key.endswith("in_proj_weight"):  # its third for values
                d, unused = d[2 * n :], True
            assert unused == (np.abs(d).max() <= 1e-6 * g.meta["grad_scale"]), (name, key)


BLOCK_UNUSED = ("cross_attn.k_proj.bias",)


def stages(up, features, image, size):
    """What the goldens tell of the way, by our own layers."""
    e = up.encode
    tokens = e.rope(norope := e.image(image))
    queries, keys = e(image, size, features.shape[1:3])
    seen = {"encoded_image_norope": norope, "encoded_image_tokens": tokens}
    if hasattr(up, "gamma"):
        from resfu_jax.upsamplers.jafar import _norm, unit

        f = up.encode_features(unit(features))
        keys = up.gamma(f) * _norm(keys) + up.beta(f)
        seen |= {"query_norm": _norm(queries), "key_features": f, "keys_sft": keys}
    else:
        x = anyup.unit(features)
        f = up.encode_features(x)
        keys = up.aggregate(jnp.concatenate([keys, f], axis=-1))
        seen |= {"lfu": anyup.unify(x, up.encode_features.basis[...]), "key_features": f}
        seen |= {"keys": keys, "q_conv": up.attention.conv(queries)}
    h, w = features.shape[1:3]
    one_hot = jnp.eye(h * w, dtype=features.dtype).reshape(1, h, w, h * w)
    return seen | {"attn": up(features, image, size, values=one_hot)}


@pytest.mark.parametrize("name", ["jafar_q16_v8_stages", "anyup_q16_stages"])
def test_stages(name, x64):
    g = goldens.load(name, x64=x64)
    up = from_torch(OFFICIAL[name.partition("_")[0]], g.group("param"), **g.args)
    graphdef, params = nnx.split(up)
    run = jax.jit(lambda p, *a: stages(nnx.merge(graphdef, p), *a, tuple(g.meta["output_size"])))
    seen = run(params, *(last(g.arrays[f"in/{n}"]) for n in ("features", "image")))
    wanted = g.group("stage")
    assert seen.keys() == wanted.keys()
    for key, a in wanted.items():
        flat = key in ("encoded_image_tokens", "attn")
        goldens.assert_close(
            seen[key].reshape(a.shape) if flat else seen[key],
            a if flat else goldens.nhwc(a),
            g.tol_out,
            key,
        )


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="without the released weights")
@pytest.mark.parametrize("name", goldens.names("jafar_pretrained", "anyup_pretrained"))
def test_released_weights(name):
    g = goldens.load(name)
    if name.startswith("jafar"):
        state = load_file(WEIGHTS / g.meta["weights"])
    else:
        state = contents(g.meta["weights"].removesuffix(".npz"))
    up = from_torch(OFFICIAL[name.partition("_")[0]], state, **g.args)
    graphdef, params = nnx.split(up)
    features, image = (last(g.arrays[f"in/{n}"]) for n in ("features", "image"))
    size = tuple(g.meta["output_size"])
    y = jax.jit(lambda p, *a: nnx.merge(graphdef, p)(*a, size))(params, features, image)
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    dropped = {"jafar": 384 + 128 * 384, "anyup": 128**2}[name.partition("_")[0]]  # of values
    dropped += 2 * 128 + 128**2 + 128  # biases of keys and values; the output's layer
    official = sum(a.size for a in state.values())
    assert sum(a.size for a in jax.tree.leaves(params)) == official - dropped


def test_windows_of_symbolic_and_known_sizes():
    masks = contents("anyup_window_masks")
    for key in masks:
        if not key.startswith("out/window"):
            continue
        _, out, size, ratio = key.split("_")
        (height, width), (h, w) = (map(int, s.split("x")) for s in (out, size))
        ratio = float(ratio[1:])
        windows = anyup.mask_windows((h, w), (height, width), ratio)
        blocked = np.unpackbits(masks[key.replace("window", "blocked")])
        blocked = blocked[: height * width * h * w].reshape(height, width, h, w)
        seen = windows.rows[:, None, :, None] & windows.columns[None, :, None]
        np.testing.assert_array_equal(seen, blocked == 0)
        traced = _symbolic_windows(ratio).call(
            *(np.zeros(s, np.int8) for s in (h, w, height, width))
        )
        for a, b in zip(traced, windows, strict=True):
            np.testing.assert_array_equal(a, b)
    (n,) = export.symbolic_shape("n")
    with pytest.raises(ValueError, match="window='natten' needs sizes that are known"):
        anyup.natten_windows((n, 4), (16 * n, 64), 0.1)


@functools.cache
def _symbolic_windows(ratio):
    sizes = export.symbolic_shape("h, w, H, W")

    def f(*maps):
        h, w, height, width = (a.shape[0] for a in maps)
        return anyup.mask_windows((h, w), (height, width), ratio)

    return export.export(jax.jit(f))(*(jax.ShapeDtypeStruct((n,), jnp.int8) for n in sizes))


def test_initial_weights(as_users_call):
    bases = contents("anyup_gauss_basis")
    for key, wanted in bases.items():
        basis = anyup.gaussian_derivatives(len(wanted), wanted.shape[-1])
        goldens.assert_close(basis.T.reshape(wanted.shape), wanted, 1e-6, key)
    freqs = contents("jafar_rope_init")["out/freqs_16"]
    for name, features in (("jafar", 32), ("jafar", 16), ("anyup", 32)):
        up = create_upsampler(name, features=features, qk_dim=16, num_heads=2)
        goldens.assert_close(up.encode.rope.freqs[...], freqs, 1e-6, "freqs")
        # One matrix of 3 x 16 outputs, unless JAFAR's values are of another width.
        bound = (6 / (32 if name == "jafar" and features != 16 else 64)) ** 0.5
        for layer in (up.attention.q, up.attention.k):
            largest = np.abs(layer.linear.kernel[...]).max()
            assert 0.9 * bound < largest <= bound
        assert not up.attention.q.linear.bias[...].any()
        conv = np.abs(up.attention.conv.kernel[...]).max()
        assert 0.95 * 144**-0.5 < conv <= 144**-0.5
    natten = create_upsampler("anyup", features=8, qk_dim=16, window="natten").attention
    assert 0.9 / 4 < np.abs(natten.q.linear.kernel[...]).max() <= 1 / 4
    assert natten.q.linear.bias[...].any()
    gauss = create_upsampler("anyup", features=8, qk_dim=16, init_gaussian_derivatives=True)
    np.testing.assert_allclose(
        gauss.encode_features.basis[...].T.reshape(16, 1, 5, 5),
        bases["out/basis_16_k5"],
        atol=1e-6,
    )
    random = create_upsampler("anyup", features=8).encode_features.basis[...]
    assert abs(random.std() - 1) < 0.05 and abs(random.mean()) < 0.05


def small(name, features=6, **options):
    return create_upsampler(name, features=features, qk_dim=16, num_heads=2, **options)


def arrays(size, image, batch=2, channels=6, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return tuple(
        jax.random.normal(k, (batch, *s, c), dtype)
        for k, s, c in zip(keys, (size, image), (channels, 3), strict=True)
    )


@every
def test_any_size(name):
    """Odd, not square, the output of another size than the image and smaller than the features."""
    up = small(name)
    a = arrays((3, 5), (7, 9))
    large, little = jax.jit(lambda *a: (up(*a, (11, 4)), up(*a, (2, 2))))(*a)
    assert large.shape == (2, 11, 4, 6) and little.shape == (2, 2, 2, 6)
    assert np.isfinite(large).all() and np.isfinite(little).all()
    assert up(*arrays((3, 5), (7, 9), batch=0), (11, 4)).shape == (0, 11, 4, 6)


@pytest.mark.parametrize(
    "name, options", [("jafar", {}), ("anyup", {}), ("anyup", dict(window="natten"))]
)
def test_maps_of_one_pixel(name, options):
    """A map that has one pixel gives it to all of the output; one row keeps its mean."""
    up = small(name, **options)
    x, image = arrays((1, 1), (4, 6))
    one, row = jax.jit(lambda x, image: (up(x, image), up(jnp.ones((2, 1, 3, 6)), image)))(x, image)
    np.testing.assert_allclose(one, jnp.broadcast_to(x, one.shape), rtol=1e-5)
    np.testing.assert_allclose(row, 1, rtol=1e-5)


def test_anyup_takes_any_number_of_channels_and_depends_on_their_order():
    up = small("anyup", features=1)
    x, image = arrays((4, 4), (8, 8), channels=10)
    y = jax.jit(up.__call__)(x, image)
    assert y.shape == (2, 8, 8, 10)
    turned = jax.jit(up.__call__)(x[..., ::-1], image)[..., ::-1]
    assert np.abs(turned - y).max() > 1e-6


def test_natten_weights_from_the_papers_block():
    """`use_natten=True` with the released model's names, as the official hub gives it."""
    g = goldens.load("anyup_q16")
    mask = from_torch("AnyUp", g.group("param"), **g.args)
    natten = from_torch("AnyUp", g.group("param"), **g.args, use_natten=True)
    assert natten.attention.window == "natten" and mask.attention.window == "mask"
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (mask, natten)), strict=True):
        np.testing.assert_array_equal(a, b)
    own = {
        k.replace("attention.", "").replace("cross_attn.norm", "norm"): v
        for k, v in g.group("param").items()
        if "attention.out" not in k and "in_proj" not in k
    }
    for i, n in enumerate("qk"):
        fused = (
            g.arrays[f"param/cross_decode.cross_attn.attention.in_proj_{p}"]
            for p in ("weight", "bias")
        )
        weight, bias = (a[16 * i : 16 * (i + 1)] for a in fused)
        own[f"cross_decode.cross_attn.{n}_proj.weight"] = weight[..., None, None]
        own[f"cross_decode.cross_attn.{n}_proj.bias"] = bias
    again = from_torch("AnyUp", own, **g.args, use_natten=True)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (again, natten)), strict=True):
        np.testing.assert_array_equal(a, b)


@every
def test_float16(name):
    """Also of features and an image that would overflow where they are squared."""
    up, low = small(name), small(name, dtype=jnp.float16)
    x, image = arrays((4, 5), (16, 20))
    x, image = 300 * x, 300 * image
    y, wanted = jax.jit(lambda *a: (low(*a), up(*a)))(x, image)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=0.1 * np.abs(wanted).max())


@pytest.mark.parametrize("name, gradients", [("jafar", True), ("anyup", False)])
def test_memory(name, gradients):
    """28 x 28 to 448 x 448: at most 1.5 outputs forward, and 12 with the gradients."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: create_upsampler(name, features=384)))
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x, image, y = (shape((1, n, n, c)) for n, c in ((28, 384), (448, 3), (448, 384)))

    def forward(params, *inputs):
        return nnx.merge(graphdef, params)(*inputs)

    def both(params, cotangent, *inputs):
        y, vjp = jax.vjp(forward, params, *inputs)
        return y, vjp(cotangent)

    f, first, limit = (both, (params, y), 12) if gradients else (forward, (params,), 1.5)
    memory = jax.jit(f).lower(*first, x, image).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= limit * y.size * 4


def test_wrong_arguments(as_users_call):
    for options, message in (
        (dict(qk_dim=20), "qk_dim must be a multiple of 8 and of num_heads=4, got 20"),
        (dict(qk_dim=24, num_heads=5), "qk_dim must be a multiple of 8 and of num_heads=5, got 24"),
        (dict(kernel_size=2), "kernel_size must be odd"),
        (dict(implementation="fast"), "implementation must be one of"),
        (dict(kernel_size_lfu=0), "kernel_size_lfu must be a positive"),
        (dict(window="all"), "window must be one of"),
        (dict(window_ratio=-1), "window_ratio must be a number, 0 or more"),
        (dict(init_gaussian_derivatives=1), "init_gaussian_derivatives must be True or False"),
        (dict(init_gaussian_derivatives=True, kernel_size_lfu=1), "kernel_size_lfu of at least 3"),
        (dict(lfu_dim=12), "width must be a multiple of 8"),
    ):
        for name in ("jafar", "anyup") if "kernel_size_lfu" not in str(options) else ("anyup",):
            if name == "jafar" and not options.keys() <= {
                "qk_dim",
                "num_heads",
                "kernel_size",
                "implementation",
            }:
                continue
            with pytest.raises(ValueError, match=message):
                nnx.eval_shape(lambda: create_upsampler(name, features=8, **options))  # noqa: B023
    x, image = arrays((2, 2), (4, 4))
    for name in ("jafar", "anyup"):
        up = small(name)
        with pytest.raises(ValueError, match="image must have the features' batch size 2, got 1"):
            up(x, image[:1])
        with pytest.raises(ValueError, match=r"image must be \(batch, height, width, 3\)"):
            up(x, image[..., :2])
        with pytest.raises(ValueError, match="values must be"):
            up(x, image, values=x[:, :1])
        with pytest.raises(ValueError, match="output_size must be two positive sizes"):
            up(x, image, (0, 4))
    with pytest.raises(ValueError, match=r"features must be \(batch, height, width, 6\)"):
        small("jafar")(x[..., :5], image)
    with pytest.raises(ValueError, match="features must be"):
        small("anyup")(x[0], image)


def test_from_torch_tells_what_is_wrong():
    for name in ("jafar_q16_v12", "anyup_q16"):
        g = goldens.load(name)
        cls, state = OFFICIAL[name.partition("_")[0]], g.group("param")
        without = {k: v for k, v in state.items() if not k.endswith("out_proj.bias")}
        with pytest.raises(ValueError, match=r"missing.*out_proj.bias"):
            from_torch(cls, without, **g.args)
        with pytest.raises(ValueError, match="unexpected 'extra'"):
            from_torch(cls, state | {"extra": state["rope.freqs"]}, **g.args)
        with pytest.raises(ValueError, match=r"\(16, 3, 1, 1\), expected \(32, 3, 1, 1\)"):
            from_torch(cls, state, **g.args | dict(qk_dim=32))


def test_what_they_say_of_themselves():
    for name in ("jafar", "anyup"):
        cls = upsampler_entry(name).cls
        assert (cls.guide, cls.image, cls.weights_are_convex) == ("image", "imagenet", True)
