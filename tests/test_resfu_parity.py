"""ReSFU and its parts against the official modules: values and gradients, all implementations."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax.convert import from_torch
from resfu_jax.ops.filters import gaussian_blur, guided_filter
from resfu_jax.ops.fns_attention import fns_attention
from resfu_jax.ops.resize import resize
from resfu_jax.ops.sizes import whole_ratio
from resfu_jax.upsamplers.resfu import ReSFU

FILTERS = goldens.names("resfu_gf_")
BRANCHES = goldens.names("resfu_pcdc_")
MODULES = [n for n in goldens.names("resfu_") if n not in FILTERS + BRANCHES]


def load(name, x64):
    g = goldens.load(name, x64=x64)
    inputs = {k: jnp.asarray(goldens.nhwc(v)) for k, v in g.group("in").items()}
    return g, inputs, inputs.pop("cotangent")


def expected(g, key):
    return goldens.nhwc(g.arrays[key])


def check_gradients(g, actual, wanted):
    """Compare two trees of gradients; those that are mathematically zero by the goldens' scale."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True
    ):
        if np.any(np.asarray(b)):
            goldens.assert_close(a, b, g.tol_grad, f"{g.name} {jax.tree_util.keystr(path)}")
        else:
            assert np.max(np.abs(a)) <= 1e-4 * g.meta["grad_scale"], (g.name, path)


@goldens.forms
@pytest.mark.parametrize("name", goldens.names("fns_attn"))
def test_fns_attention(name, implementation, x64):
    g, inputs, cotangent = load(name, x64)

    def f(attn, x):
        return fns_attention(attn, x, implementation=implementation)

    if implementation == "cpu" and "_to_" in name:  # not a whole ratio
        with pytest.raises(ValueError, match="whole ratios"):
            f(**inputs)
        return

    @jax.jit
    def value_and_gradients(attn, x, cotangent):
        y, vjp = jax.vjp(f, attn, x)
        return y, *vjp(cotangent)

    y, d_attn, d_x = value_and_gradients(inputs["attn"], inputs["x"], cotangent)
    goldens.assert_close(y, expected(g, "out/y"), g.tol_out, "y")
    goldens.assert_close(d_attn, expected(g, "grad/in/attn"), g.tol_grad, "d_attn")
    goldens.assert_close(d_x, expected(g, "grad/in/x"), g.tol_grad, "d_x")


@pytest.mark.parametrize("name", FILTERS)
def test_guided_filter(name, x64):
    g, inputs, cotangent = load(name, x64)
    options = dict(radius=g.args["radius"], eps=g.args["epsilon"], gf_scale=g.args["scale"])

    @jax.jit
    def value_and_gradients(i, p, cotangent):
        y, vjp = jax.vjp(lambda i, p: guided_filter(i, p, **options), i, p)
        return y, vjp(cotangent)

    y, gradients = value_and_gradients(inputs["I"], inputs["p"], cotangent)
    goldens.assert_close(y, expected(g, "out/y"), g.tol_out, "y")
    for key, d in zip(("I", "p"), gradients, strict=True):
        goldens.assert_close(d, expected(g, f"grad/in/{key}"), g.tol_grad, f"d_{key}")


# At one pixel of this golden the input of a hidden unit's ReLU is 7e-8, of values up to 7: float32
# cannot tell its sign, on which the gradient depends. x64 is compared with the golden itself;
# float32 with x64 after that unit's bias moved by 1e-3, which takes the pixel off the edge.
EDGE = {"resfu_pcdc_k3_d2": 12}


def branch_gradients(g, implementation, nudged=None):
    """Output and gradients to the parameters, k and q, in the mode that g was loaded in."""
    branch = from_torch("PCDC_Block", g.group("param"), **g.args)
    if nudged is not None:
        branch.mix_bias.set_value(branch.mix_bias[...].at[nudged].add(1e-3))
    graphdef, params = nnx.split(branch)
    k, q, cotangent = (jnp.asarray(expected(g, f"in/{n}")) for n in ("k", "q", "cotangent"))

    @jax.jit
    def value_and_gradients(params, k, q, cotangent):
        def f(p, *a):
            return nnx.merge(graphdef, p)(*a, implementation=implementation)

        y, vjp = jax.vjp(f, params, k, q)
        return y, vjp(cotangent)

    return value_and_gradients(params, k, q, cotangent)


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu"])
@pytest.mark.parametrize("name", BRANCHES)
def test_score_branch(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    y, (d_params, d_k, d_q) = branch_gradients(g, implementation)
    goldens.assert_close(y, expected(g, "out/y"), g.tol_out, "y")
    wanted_k, wanted_q = expected(g, "grad/in/k"), expected(g, "grad/in/q")
    wanted = nnx.state(from_torch("PCDC_Block", g.group("grad/param"), **g.args), nnx.Param)
    if not x64 and name in EDGE:
        _, (d_params, d_k, d_q) = branch_gradients(g, implementation, EDGE[name])
        with jax.enable_x64(True):
            _, (wanted, wanted_k, wanted_q) = branch_gradients(
                goldens.load(name, x64=True), implementation, EDGE[name]
            )
            wanted = jax.tree.map(lambda a: np.where(np.abs(a) < 1e-12, 0, a), wanted)
    goldens.assert_close(d_k, wanted_k, g.tol_grad, "d_k")
    goldens.assert_close(d_q, wanted_q, g.tol_grad, "d_q")
    check_gradients(g, d_params, wanted)


@goldens.forms
@pytest.mark.parametrize("name", MODULES)
def test_module(name, implementation, x64):
    g, inputs, cotangent = load(name, x64)
    buffers = {k: g.arrays[f"param/{k}"] for k in g.meta["buffers"]}
    module = from_torch("ReSFU", g.group("param"), **g.args, implementation=implementation)
    if (
        implementation == "cpu"
        and whole_ratio(inputs["x"].shape[1:3], inputs["y"].shape[1:3]) is None
    ):
        with pytest.raises(ValueError, match="whole ratios"):
            module(inputs["x"], inputs["y"])
        return
    wanted = from_torch("zmhhmz/ReSFU:ReSFU", g.group("grad/param") | buffers, **g.args)
    graphdef, params = nnx.split(module)

    @jax.jit
    def value_and_gradients(params, x, guide, cotangent):
        y, vjp = jax.vjp(lambda p, x, g: nnx.merge(graphdef, p)(x, g), params, x, guide)
        return y, vjp(cotangent)

    y, (d_params, d_x, d_y) = value_and_gradients(params, inputs["x"], inputs["y"], cotangent)
    goldens.assert_close(y, expected(g, "out/y"), g.tol_out, "y")
    goldens.assert_close(d_x, expected(g, "grad/in/x"), g.tol_grad, "d_features")
    goldens.assert_close(d_y, expected(g, "grad/in/y"), g.tol_grad, "d_guide")
    check_gradients(g, d_params, nnx.state(wanted, nnx.Param))


def test_stages(x64):
    g, inputs, _ = load("resfu_s4_k3_gf2_stages", x64)
    up = from_torch("ReSFU", g.group("param"), **g.args)

    @jax.jit
    def stages(x, y):
        q, k = up.query(y), up.key(x)
        k_up = resize(k, q.shape[1:3])
        q_gs, q_gf = up.query_blurred(q), up.query_filtered(q, k_up)
        return dict(
            q=q,
            k=k,
            k_up=k_up,
            q_gs=q_gs,
            q_gf=q_gf,
            semantic_scores=up.semantic_scores(k_up, q_gf),
            detail_scores=up.detail_scores(q_gs, q),
            attn=up.attention(x, y),
        )

    for name, value in stages(inputs["x"], inputs["y"]).items():
        goldens.assert_close(value, expected(g, f"stage/{name}"), g.tol_out, name)


def test_blur_kernel():
    impulse = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2, 0].set(1)
    wanted = goldens.load("resfu_s4_k3_gf2_stages").arrays["const/blur_kernel"]
    blurred = gaussian_blur(impulse, kernel_size=3, sigma=1.0)[0, 1:4, 1:4, 0]
    goldens.assert_close(blurred, wanted, 1e-6, "kernel")


@pytest.mark.parametrize(
    ("guide", "features", "count"), [(256, 256, 47_570), (32, 384, 44_306), (32, 768, 57_362)]
)
def test_parameter_count(guide, features, count):
    up = nnx.eval_shape(lambda: ReSFU(features, guide, rngs=nnx.Rngs(0)))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(up, nnx.Param))) == count


def test_state_dict_problems_are_all_named():
    g = goldens.load("resfu_s2_k3_gf1")
    state = g.group("param")
    del state["q.weight"]
    state["k.bias"] = np.zeros(3, np.float32)
    state["extra"] = np.zeros(1, np.float32)
    with pytest.raises(ValueError) as e:
        from_torch("ReSFU", state, **g.args)
    for text in ("missing 'q.weight'", "'k.bias' has shape (3,)", "unexpected 'extra'"):
        assert text in str(e.value)
    with pytest.raises(ValueError, match="did you mean 'ReSFU'"):
        from_torch("RESFU", g.group("param"), **g.args)
