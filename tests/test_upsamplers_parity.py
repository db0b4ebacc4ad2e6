"""CARAFE, SAPA, FADE, DySample, LDA-AQU and their ops against the official modules."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax import create_upsampler, from_torch
from resfu_jax.ops.deformable_sample import deformable_sample
from resfu_jax.ops.local_window import local_reassembly, local_similarity
from resfu_jax.ops.sizes import cell_index

FAMILIES = {"carafe": 5, "sapa": 16, "fade": 6, "dysample": 9, "lda_aqu": 5}  # modules of each
MODULES = [n for n in goldens.names(*FAMILIES) if "_op_" not in n]


def official(g):
    """The golden's class as from_torch takes it, and what only that golden's file needs."""
    scrambled = {"scrambled_phases": True} if g.name == "fade_h2l_s2_pytorch" else {}
    return f"{g.meta['repo']}:{g.meta['official_class'].split()[0]}", g.args | scrambled


def inputs_of(g):
    """The inputs as our modules take them: features, then the guide if there is one."""
    arrays = {k: jnp.asarray(goldens.nhwc(v)) for k, v in g.group("in").items()}
    names = ["de", "en"] if "de" in arrays else ["x", "y"] if "y" in arrays else ["x"]
    return names, [arrays[n] for n in names], arrays["cotangent"]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(graphdef, params, inputs, cotangent):
    y, vjp = jax.vjp(lambda p, i: nnx.merge(graphdef, p)(*i), params, inputs)
    return y, vjp(cotangent)


@goldens.forms
@pytest.mark.parametrize("name", MODULES)
def test_module(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    cls, args = official(g)
    names, inputs, cotangent = inputs_of(g)
    module = from_torch(cls, g.group("param"), **args)
    assert module.implementation is None
    module.implementation = implementation
    buffers = {k: g.arrays[f"param/{k}"] for k in g.meta["buffers"]}
    wanted = nnx.state(from_torch(cls, g.group("grad/param") | buffers, **args), nnx.Param)
    y, (d_params, d_inputs) = value_and_gradients(*nnx.split(module), inputs, cotangent)
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    for n, d in zip(names, d_inputs, strict=True):
        goldens.assert_close(d, goldens.nhwc(g.arrays[f"grad/in/{n}"]), g.tol_grad, f"d_{n}")
    leaves = jax.tree_util.tree_leaves_with_path(d_params)
    for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        goldens.assert_close(a, b, g.tol_grad, jax.tree_util.keystr(path))
        assert np.any(b)  # these families have no gradient that is zero on principle


def test_every_golden_of_the_families_is_compared():
    for family, count in FAMILIES.items():
        assert sum(n.startswith(family) for n in MODULES) == count, family


OPS = {
    "sapa_op_sim": (("q", "k"), local_similarity),
    "sapa_op_atn": (("attn", "v"), local_reassembly),
    "carafe_op": (("mask", "x"), local_reassembly),
}


@goldens.forms
@pytest.mark.parametrize("name", goldens.names(*OPS))
def test_window_ops(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    names, op = next(v for k, v in OPS.items() if name.startswith(k))
    last = goldens.nhwc if g.meta["layout"] == "NCHW" else np.asarray
    inputs = [jnp.asarray(last(g.arrays[f"in/{n}"])) for n in names]
    options = dict(implementation=implementation)
    if op is local_similarity:
        options["kernel_size"] = g.args["kernel_size"]
    elif "group_size" in g.args:
        options["groups"] = g.args["group_size"]

    @jax.jit
    def f(cotangent, *inputs):
        y, vjp = jax.vjp(functools.partial(op, **options), *inputs)
        return y, vjp(cotangent)

    y, gradients = f(jnp.asarray(last(g.arrays["in/cotangent"])), *inputs)
    goldens.assert_close(y, last(g.arrays["out/y"]), g.tol_out, "y")
    for n, d in zip(names, gradients, strict=True):
        goldens.assert_close(d, last(g.arrays[f"grad/in/{n}"]), g.tol_grad, f"d_{n}")


@pytest.mark.parametrize("name", goldens.names("sapa_op_deform"))
def test_point_ops(name, x64):
    """The two halves of `deformable_attention`, as it computes them, for the official operators."""
    g = goldens.load(name, x64=x64)
    groups, scale, points = (g.args[k] for k in ("groups", "scale_factor", "num_point"))

    def place(offset):
        """Channels (group, point, (x, y)) to points in pixels."""
        b, hh, ww, _ = offset.shape
        offset = offset.reshape(b, hh, ww, groups, points, 2)[..., ::-1]
        cells = [cell_index(n // scale, n).astype(offset.dtype) for n in (hh, ww)]
        cells = jnp.stack(jnp.meshgrid(*cells, indexing="ij"), axis=-1)
        return cells[None, :, :, None, None] + offset

    def move(a, official_to_ours=True):
        """Channels last; the attention's two axes (group, point) too."""
        axes = ((1, 2), (-2, -1)) if a.ndim == 5 else (1, -1)
        return jnp.moveaxis(a, *(axes if official_to_ours else axes[::-1]))

    def f(inputs):
        ours = {k: move(v) for k, v in inputs.items()}
        samples = deformable_sample(ours.get("k", ours.get("v")), place(ours["offset"]))
        if "q" in ours:
            q = ours["q"].reshape(*ours["q"].shape[:3], groups, -1)
            return move(jnp.einsum("bhwgd,bhwgpd->bhwgp", q, samples), False)
        out = jnp.einsum("bhwgp,bhwgpc->bhwgc", ours["attn"], samples)
        return move(out.reshape(*out.shape[:3], -1), False)

    @jax.jit
    def value_and_gradients(inputs, cotangent):
        y, vjp = jax.vjp(f, inputs)
        return y, vjp(cotangent)[0]

    arrays = {k: jnp.asarray(v) for k, v in g.group("in").items()}
    cotangent = arrays.pop("cotangent")
    y, gradients = value_and_gradients(arrays, cotangent)
    goldens.assert_close(y, g.arrays["out/y"], g.tol_out, "y")
    for n, d in gradients.items():
        goldens.assert_close(d, g.arrays[f"grad/in/{n}"], g.tol_grad, f"d_{n}")


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("sapa", {}, 17_472),
        ("sapa", dict(embedding_dim=64), 33_920),
        ("sapa_i", {}, 2 * 2 * 256),  # the norms' scales and biases only
        ("fade", {}, 47_514),
        ("fade_lite", {}, 13_332),
        ("carafe", {}, 74_148),
        ("sapa_deform", {}, 139_808),
        ("dysample", {}, 8_224),
        ("dysample_plus", {}, 16_416),
        ("dysample_s", {}, 1_040),
        ("dysample_s_plus", {}, 2_064),
        ("lda_aqu", {}, 39_410),
        ("lda_aqu", dict(reduction_factor=16), 10_250),
    ],
)
def test_parameter_counts_as_published(name, options, count):
    def build():
        return create_upsampler(name, features=256, guide_features=256, scale=2, **options)

    up = nnx.eval_shape(build)
    assert sum(p.size for p in jax.tree.leaves(nnx.state(up, nnx.Param))) == count


def test_from_torch_tells_what_is_wrong():
    g = goldens.load("fade_l2h_s2")
    with pytest.raises(ValueError, match=r"several repositories.*poppinace.*tiny-smart"):
        from_torch("SAPA", {})
    with pytest.raises(ValueError, match="weights of FADE_H2L.py; these are of FADE_L2H.py"):
        from_torch("FADE", g.group("param"), **g.args, scrambled_phases=True)
    d = goldens.load("dysample_lp_s2")
    state = d.group("param") | {"init_pos": np.zeros((1, 32, 1, 1), np.float32)}
    with pytest.raises(ValueError, match="'init_pos' is not that of scale=2"):
        from_torch("DySample", state, **d.args)


def test_high_to_low_differs_only_by_the_phases():
    """Without `scrambled_phases`, FADE_H2L.py's weights give the function of FADE_L2H.py."""
    g = goldens.load("fade_h2l_s2_pytorch")
    _, inputs, _ = inputs_of(g)
    state = g.group("param")
    rename = {
        "kernel_generator.conv2_kernels": "ker_generator.content_encoder.weight",
        "kernel_generator.conv2_bias": "ker_generator.content_encoder.bias",
        "kernel_generator.conv1_en.weight": "ker_generator.compressor_en.weight",
        "kernel_generator.conv1_en.bias": "ker_generator.compressor_en.bias",
        "kernel_generator.conv1_de.weight": "ker_generator.compressor_de.weight",
    }
    low_to_high = {rename.get(k, k): v for k, v in state.items()}
    y = from_torch("FADE", state, **g.args)(*inputs)
    np.testing.assert_array_equal(y, from_torch("FADE", low_to_high, **g.args)(*inputs))
    assert np.abs(y - goldens.nhwc(g.arrays["out/y"])).max() > 0.1


def test_lda_aqu_of_a_single_output_pixel():
    """The official module divides by the output's size minus one."""
    up = create_upsampler("lda_aqu", features=16, scale=2)
    x = jax.random.normal(jax.random.key(0), (1, 1, 3, 16))
    for size in ((1, 1), (2, 1)):

        @jax.jit
        def run(x, size=size):
            y, vjp = jax.vjp(lambda x: up(x, size), x)
            return y, vjp(y)

        y, gradient = run(x)
        assert y.shape == (1, *size, 16)
        assert np.isfinite(y).all()
        assert np.isfinite(gradient).all()
