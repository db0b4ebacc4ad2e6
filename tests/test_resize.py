"""`ops.resize` and the positions it reads: parity with PyTorch, and laws at random sizes."""

import fractions
import functools
import types

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from resfu_jax.ops import _interp, sizes
from resfu_jax.ops._xla.pcdc import normalised_as_upsampled
from resfu_jax.ops.group_norm import group_norm
from resfu_jax.ops.pad import pad
from resfu_jax.ops.resize import resize
from resfu_jax.ops.sizes import cell_index

METHODS = ["bilinear", "bicubic", "nearest", "nearest-exact"]
SIZES = st.integers(1, 12)


def arguments(args: dict) -> dict:
    """Our arguments for those of `torch.nn.functional.interpolate`."""
    size = tuple(args["size"]) if "size" in args else None
    return dict(
        size=size,
        scale=args.get("scale_factor"),
        method=args["mode"],
        align_corners=bool(args.get("align_corners")),
        antialias=bool(args.get("antialias")),
    )


@pytest.mark.parametrize("implementation", [None, "reference", "xla", "cpu"])
@pytest.mark.parametrize(
    "name", goldens.names("classic_bilinear", "classic_bicubic", "classic_nearest")
)
def test_parity(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    options = arguments(g.args)
    x = jnp.asarray(goldens.nhwc(g.arrays["in/x"]))

    def f(x):
        return resize(x, implementation=implementation, **options)

    applies = {
        None: True,
        "reference": not options["antialias"],
        "xla": not options["antialias"]
        and (options["scale"] in (2, 4) or not options["method"].startswith("nearest")),
        "cpu": options["scale"] in (2, 4) and not options["align_corners"],
    }[implementation]
    if not applies:
        with pytest.raises(ValueError, match="implementation"):
            f(x)
        return
    cotangent = jnp.asarray(goldens.nhwc(g.arrays["in/cotangent"]))
    y, dx = jax.jit(lambda x: (f(x), *jax.vjp(f, x)[1](cotangent)))(x)
    assert y.dtype == x.dtype
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, name)
    goldens.assert_close(dx, goldens.nhwc(g.arrays["grad/in/x"]), g.tol_grad, name)


@pytest.mark.parametrize("name", goldens.names("func_pad"))
def test_jnp_pad_is_torch_pad(name, x64):
    g = goldens.load(name, x64=x64)
    x = jnp.asarray(goldens.nhwc(g.arrays["in/x"]))
    mode = {"reflect": "reflect", "replicate": "edge"}[g.args["mode"]]
    y, vjp = jax.vjp(lambda x: jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode=mode), x)
    (dx,) = vjp(jnp.asarray(goldens.nhwc(g.arrays["in/cotangent"])))
    goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, name)
    goldens.assert_close(dx, goldens.nhwc(g.arrays["grad/in/x"]), g.tol_grad, name)


# The sizes are traced, so that one compiled program serves all of them.
_half_pixel_taps = jax.jit(functools.partial(_interp.half_pixel_taps, count=1000))


@settings(deadline=None)
@given(n_in=st.integers(1, 5000), n_out=st.integers(1, 5000))
def test_half_pixel_positions_are_exact(n_in, n_out):
    check_positions(
        *_half_pixel_taps(n_in, n_out),
        lambda p: fractions.Fraction((2 * p + 1) * n_in, 2 * n_out) - fractions.Fraction(1, 2),
    )


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 5), (5, 1), (37, 37), (41, 123), (901, 257)])
def test_align_corners_positions_are_exact(n_in, n_out):
    check_positions(
        *_interp.align_corners_taps(n_in, n_out),
        lambda p: fractions.Fraction(p * (n_in - 1), max(n_out - 1, 1)),
    )


def check_positions(lower, fraction, exact):
    lower, fraction = np.asarray(lower), np.asarray(fraction)
    assert lower.dtype == np.int32 and fraction.dtype == np.float32
    assert (0 <= fraction).all() and (fraction < 1).all()
    for p in range(0, len(lower), 1 + len(lower) // 20):
        s = exact(p)
        assert lower[p] == s.__floor__()
        # Numerator and denominator are rounded to float32 before the one division.
        assert fraction[p] == pytest.approx(float(s - s.__floor__()), rel=3e-7)


def exact_positions(n, m, kind, ratio=None):
    """Floor of every output pixel's source position, and the fraction, in Python's integers."""
    a, b = ratio or (n, m)
    p = np.arange(m, dtype=object)
    numerator, d = {
        "half": ((2 * p + 1) * a - b, 2 * b),
        "corners": (p * (n - 1), max(m - 1, 1)),
        "nearest": (p * a, b),
        "nearest-exact": ((2 * p + 1) * a, 2 * b),
    }[kind]
    lower = numerator // d
    return lower.astype(np.int64), ((numerator - lower * d) / d).astype(np.float64)


@pytest.mark.parametrize(
    ("n", "m"),
    [(40_000, 60_001), (46_000, 46_001), (70_000, 35_001), (3_000, 900_001), (2_500_007, 3)]
    + [(3, 1_500_001), (1_500_001, 1_000_003)],
)
def test_positions_on_long_axes(n, m):
    """Products of the sizes do not fit int32; positions do not fit float32."""
    for taps, kind in ((_interp.half_pixel_taps, "half"), (_interp.align_corners_taps, "corners")):
        lower, fraction = taps(n, m)
        wanted_lower, wanted_fraction = exact_positions(n, m, kind)
        np.testing.assert_array_equal(lower, wanted_lower)
        np.testing.assert_allclose(fraction, wanted_fraction, rtol=4e-7)
    np.testing.assert_array_equal(cell_index(n, m), exact_positions(n, m, "nearest")[0])


@settings(deadline=None)
@given(data=st.data())
def test_divides_products_of_any_size(data):
    """Up to the longest axes, near and far from where int32 and float32 end."""
    d = data.draw(st.integers(1, 2 * sizes.LONGEST))
    n = data.draw(st.integers(1, 2 * sizes.LONGEST))
    offset = data.draw(st.integers(-d // 2, d // 2))
    first = data.draw(st.integers(0, min(2**31 - 20, (2**31 - 1) * d // n)))
    first = max(0, first - max(20, 20 * d // n))
    numbers = (jnp.int32(i) for i in (n, d, first, offset))
    got = divide_products(*numbers)
    wanted = [divmod((first + i) * n + offset, d) for i in range(10)]
    for lower, rest, (wanted_lower, wanted_rest) in zip(*got, wanted, strict=True):
        if wanted_lower < 2**31:
            assert (lower, rest) == (wanted_lower, wanted_rest)


@jax.jit
def divide_products(n, d, first, offset):
    return sizes.divide_products(10, n, d, first=first, offset=offset)


def expected_1d(x, m, method, align_corners=False, ratio=None):
    """A resized axis in float64, from exact positions."""
    x, n = x.astype(np.float64), len(x)
    if method.startswith("nearest"):
        return x[np.clip(exact_positions(n, m, method, ratio)[0], 0, n - 1)]
    lower, t = exact_positions(n, m, "corners" if align_corners else "half", ratio)
    a = -0.75
    weights = {
        "bilinear": {0: 1 - t, 1: t},
        "bicubic": {
            -1: a * (t**3 - 2 * t**2 + t),
            0: (a + 2) * t**3 - (a + 3) * t**2 + 1,
            1: -(a + 2) * t**3 + (2 * a + 3) * t**2 - a * t,
            2: a * (t**2 - t**3),
        },
    }[method]
    return sum(w * x[np.clip(lower + i, 0, n - 1)] for i, w in weights.items())


@pytest.mark.parametrize("symbolic", [False, True], ids=["concrete", "symbolic"])
@pytest.mark.parametrize(
    ("method", "align_corners"),
    [(m, False) for m in METHODS] + [("bilinear", True), ("bicubic", True)],
)
def test_long_axes(method, align_corners, symbolic):
    rng = np.random.default_rng(0)
    for n, m in ((40_000, 60_001), (3_000, 900_001), (70_000, 35_001)):
        x = rng.normal(size=n).astype(np.float32)

        def f(x, m=m):
            return resize(x, (1, m), method=method, align_corners=align_corners)

        if symbolic:
            (w,) = export.symbolic_shape("w")
            f = export.export(jax.jit(f))(jax.ShapeDtypeStruct((1, 1, w, 1), jnp.float32)).call
        y = jax.jit(f)(x[None, None, :, None])[0, 0, :, 0]
        np.testing.assert_allclose(y, expected_1d(x, m, method, align_corners), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "scale"), [(25_000, 0.9999371), (600_000, 2.0001)])
def test_scale_on_long_axes(method, n, scale):
    x = np.random.default_rng(0).normal(size=n).astype(np.float32)
    given = jnp.stack([x, x])[None, :, :, None]  # floor(2 scale) is at least 1
    y = jax.jit(lambda x: resize(x, scale=scale, method=method))(given)[0, 0, :, 0]
    ratio = fractions.Fraction(str(scale))  # ties of nearest are those of the number as written
    wanted = expected_1d(x, int(n * scale), method, ratio=(ratio.denominator, ratio.numerator))
    assert len(y) == len(wanted)
    np.testing.assert_allclose(y, wanted, atol=1e-3)

    (w,) = export.symbolic_shape("w")
    spec = jax.ShapeDtypeStruct((1, 2, w, 1), jnp.float32)
    exported = export.export(jax.jit(lambda x: resize(x, scale=scale, method=method)))(spec)
    np.testing.assert_allclose(exported.call(given)[0, 0, :, 0], y, atol=1e-5)


# What PyTorch 2.14 gives on a CPU for the ramp 0, 1, 2, 3, in both memory layouts:
# torch.nn.functional.interpolate(ramp, scale_factor=scale, mode=method, antialias=antialias).
SAME = [0, 1, 2, 3]
DOUBLE = [0, 0, 1, 1, 2, 2, 3, 3]
SCALED = [
    (1.2, "nearest", False, SAME),
    (1.2, "bilinear", False, SAME),
    (1.2, "bilinear", True, SAME),
    (1.2, "bicubic", True, SAME),
    (1.2, "nearest-exact", False, [0, 1, 2, 2]),
    (1.2, "bicubic", False, [-0.05252, 0.66797, 1.56308, 2.51288]),
    (2.2, "nearest", False, DOUBLE),
    (2.2, "nearest-exact", False, [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0]),
    (2.2, "bilinear", False, [0.0, 0.18182, 0.63636, 1.09091, 1.54545, 2.0, 2.45455, 2.90909]),
    (2.2, "bicubic", False, [-0.10819, 0.13787, 0.5417, 1.12472, 1.53418, 2.0, 2.55034, 2.93163]),
    (2.2, "bilinear", True, [0.0, 0.18182, 0.63636, 1.09091, 1.54545, 2.0, 2.45455, 2.90909]),
]


@pytest.mark.parametrize("symbolic", [False, True], ids=["concrete", "symbolic"])
@pytest.mark.parametrize(("scale", "method", "antialias", "wanted"), SCALED)
def test_scale_that_keeps_or_doubles_the_size(scale, method, antialias, wanted, symbolic):
    def f(x):
        return resize(x, scale=scale, method=method, antialias=antialias)

    ramp = jnp.arange(4, dtype=jnp.float32)
    for shape in ((1, 1, 4, 1), (1, 4, 1, 1)):
        if symbolic:
            h, w = export.symbolic_shape("h, w")
            f = export.export(jax.jit(f))(jax.ShapeDtypeStruct((1, h, w, 1), jnp.float32)).call
        x = jnp.broadcast_to(ramp.reshape(shape), (1, 4, 4, 1))
        y = f(x)
        y = y[0, 0, :, 0] if shape[2] == 4 else y[0, :, 0, 0]
        np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_positions_where_float32_is_off_by_one():
    n_in, n_out = 41, 123
    lower, fraction = _interp.half_pixel_taps(n_in, n_out)
    # A whole ratio of 3: every third output lies exactly on an input pixel.
    np.testing.assert_array_equal(lower[1::3], np.arange(n_in))
    np.testing.assert_array_equal(fraction[1::3], 0)


@settings(deadline=None, max_examples=8)
@given(
    sizes=st.tuples(SIZES, SIZES, SIZES, SIZES),
    method=st.sampled_from(METHODS),
    align_corners=st.booleans(),
    antialias=st.booleans(),
)
def test_constant_stays_constant(sizes, method, align_corners, antialias):
    if method.startswith("nearest"):
        align_corners = antialias = False
    if antialias:
        align_corners = False
    h, w, height, width = sizes
    x = jnp.full((1, h, w, 2), 3.0)
    options = dict(method=method, align_corners=align_corners, antialias=antialias)
    y = jax.jit(lambda x: resize(x, (height, width), **options))(x)
    assert y.shape == (1, height, width, 2)
    np.testing.assert_allclose(y, 3, rtol=2e-6)


@settings(deadline=None, max_examples=6)
@given(
    size=st.tuples(SIZES, SIZES),
    ratio=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    method=st.sampled_from(METHODS),
)
def test_implementations_agree(size, ratio, method):
    """Values and gradients, also where the map is narrower than the kernel."""
    h, w = size
    x = jax.random.normal(jax.random.key(0), (2, h, w, 3))
    out = (h * ratio[0], w * ratio[1])
    cotangent = jax.random.normal(jax.random.key(1), (2, *out, 3))
    results = []
    for implementation in ("reference", "xla", "cpu"):

        @jax.jit
        def f(x, implementation=implementation):
            y, vjp = jax.vjp(
                lambda x: resize(x, out, method=method, implementation=implementation), x
            )
            return y, *vjp(cotangent)

        results.append(f(x))
    for reference, *others in zip(*results, strict=True):
        for result in others:
            np.testing.assert_allclose(result, reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(6, 9), (12, 20)])
def test_jit_and_vmap_and_bfloat16(method, size):
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))

    def f(x):
        return resize(x, size, method=method)

    y = f(x)
    np.testing.assert_allclose(jax.jit(f)(x), y, atol=2e-6)
    np.testing.assert_allclose(jax.vmap(f)(jnp.stack([x, 2 * x]))[1], 2 * y, atol=4e-6)
    half = f(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    # One rounding of the input and one of the output: the weights are exact.
    exact = f(x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("ratio", [(1, 2), (2, 3), (16, 4)])
def test_moments_of_the_upsampled_map(ratio):
    """A map normalised for its upsampling: what group normalisation makes of the upsampled one."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 6))
    scale, bias = 1 + jax.random.normal(jax.random.key(1), (2, 6))
    size, parameters = (
        (5 * ratio[0], 4 * ratio[1]),
        types.SimpleNamespace(scale=scale, norm_bias=bias),
    )

    def upsampled(x):
        return group_norm(resize(x, size, implementation="reference"), scale, bias, groups=3)

    def small(x):
        return resize(normalised_as_upsampled(x, parameters, size, 3, 1e-5), size)

    ours, vjp = jax.vjp(small, x)
    wanted, expected = jax.vjp(upsampled, x)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)
    g = jax.random.normal(jax.random.key(2), ours.shape)
    np.testing.assert_allclose(vjp(g)[0], expected(g)[0], rtol=1e-4, atol=1e-5)


def test_nearest_takes_labels():
    labels = jnp.arange(6, dtype=jnp.uint8).reshape(1, 2, 3, 1)
    y = resize(labels, scale=2, method="nearest")
    assert y.dtype == jnp.uint8
    np.testing.assert_array_equal(y, np.asarray(labels).repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize("scale", [1.5, 0.3, 2.7])
def test_rounded_scale_reads_at_the_scale(scale):
    """With `scale`, a ramp is read at (p + 1/2) / scale - 1/2, not at the ratio of the sizes."""
    n = 11
    m = int(n * scale)
    ramp = jnp.arange(n, dtype=jnp.float32)[None, :, None, None]
    y = resize(jnp.broadcast_to(ramp, (1, n, n, 1)), scale=scale)
    assert y.shape[1] == m
    wanted = np.clip((np.arange(m) + 0.5) / scale - 0.5, 0, n - 1)
    np.testing.assert_allclose(y[0, :, 0, 0], wanted, rtol=1e-5)


def test_antialias_averages_when_shrinking():
    """A checkerboard of the finest period turns grey away from the border."""
    x = (jnp.indices((12, 12)).sum(0) % 2).astype(jnp.float32)[None, :, :, None]
    y = resize(x, (4, 4), antialias=True)
    np.testing.assert_allclose(y[0, 1:-1, 1:-1], 0.5, atol=0.05)
    assert np.ptp(resize(x, (4, 4))) == 1


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_symbolic_export(method, antialias):
    if method.startswith("nearest") and antialias:
        return
    # In float64: compiled for known sizes, sums may be rounded otherwise than for unknown ones.
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 4, 5, 3), jnp.float64)
        b, h, w = export.symbolic_shape("b, h, w")
        spec = jax.ShapeDtypeStruct((b, h, w, 3), jnp.float64)
        sizes = {
            (4 * h, 2 * w): (16, 10),  # a whole ratio: no gather
            (h + 3, w): (7, 5),
            (6, 7): (6, 7),
        }
        for symbolic, size in sizes.items():

            def f(x, size=symbolic):
                return resize(x, size, method=method, antialias=antialias)

            exported = export.export(jax.jit(f))(spec)
            np.testing.assert_allclose(exported.call(x), f(x, size), atol=1e-12)
        scaled = export.export(jax.jit(lambda x: resize(x, scale=2.5, method=method)))(spec)
        np.testing.assert_allclose(scaled.call(x), resize(x, scale=2.5, method=method), atol=1e-12)


def test_batch_sharding_needs_no_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (8, 4, 5, 2)), sharding)
    for size in ((7, 9), (8, 10)):
        gradient = jax.jit(jax.grad(lambda x, s=size: jnp.sum(jnp.square(resize(x, s)))))
        program = gradient.lower(x).compile().as_text()
        assert "all-gather" not in program and "all-reduce" not in program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "either size or scale"),
        (dict(size=(2, 2), scale=2), "either size or scale"),
        (dict(size=(0, 2)), "at least 1"),
        (dict(size=(1, 2**29 + 1)), r"at most 2\*\*29"),
        (dict(scale=0), "scale must be positive"),
        (dict(scale=0.1), "at least 1"),
        (dict(scale=2, method="nearest", align_corners=True), "do not apply"),
        (dict(scale=2, method="nearest", antialias=True), "do not apply"),
        (dict(scale=2, antialias=True, align_corners=True), "antialias needs"),
        (dict(size=(9, 10), implementation="cpu"), "whole upsampling ratio"),
        (dict(scale=2, align_corners=True, implementation="cpu"), "align_corners=False"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        resize(jnp.zeros((1, 4, 5, 2)), **options)


def test_interpolating_integers_is_an_error():
    with pytest.raises(ValueError, match="floating-point"):
        resize(jnp.zeros((1, 4, 5, 2), jnp.uint8), scale=2)


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
@pytest.mark.parametrize("border", [(0, 0), (1, 2), (3, 0)])
def test_borders(mode, border):
    """Values and gradient of `jnp.pad`, also of borders wider than the map."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, 2))
    widths = ((0, 0), *((n, n) for n in border), (0, 0))
    ours, vjp = jax.vjp(lambda x: pad(x, border, mode), x)
    wanted, expected = jax.vjp(lambda x: jnp.pad(x, widths, mode=mode), x)
    np.testing.assert_array_equal(ours, wanted)
    g = jax.random.normal(jax.random.key(1), ours.shape)
    np.testing.assert_allclose(vjp(g)[0], expected(g)[0], rtol=1e-5, atol=1e-6)
