"""Joint bilateral upsampling and Upsample Anything, their ops included."""

import functools
import re

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from resfu_jax import create_upsampler, ops
from resfu_jax.upsamplers import pixel_weights
from resfu_jax.upsamplers.upsample_anything import Kernels

NAMES = ("jbu", "upsample_anything")
every = pytest.mark.parametrize("name", NAMES)
forms = pytest.mark.parametrize("implementation", ["reference", "xla"])
KERNELS = ("sx_raw", "sy_raw", "th_raw", "sr_raw")


@functools.cache
def build(name, features=8, **options):
    few = dict(steps=2) if name == "upsample_anything" else {}
    return create_upsampler(name, features=features, **few | options)


def inputs(batch=2, size=(3, 5), image=(12, 20), channels=8):
    x = jax.random.normal(jax.random.key(1), (batch, *size, channels))
    return x, jax.random.uniform(jax.random.key(2), (batch, *image, 3))


def value_and_gradients(f, cotangent, *arrays):
    @jax.jit
    def run(cotangent, arrays):
        y, vjp = jax.vjp(f, *arrays)
        return y, vjp(cotangent)

    return run(cotangent, arrays)


# ------------------------------------------------------------------------------------- the goldens
def of_golden(g, name):
    """An array as ours is: maps of one number have no channels."""
    a = goldens.nhwc(g.arrays[name])
    return jnp.asarray(a[..., 0] if re.search("sigma|theta|_raw", name) else a)


def check(g, f, names, prefix="in"):
    """`f` of the golden's arrays against its output and gradients."""
    arrays = [of_golden(g, n) for n in names]
    y, gradients = value_and_gradients(f, of_golden(g, "in/cotangent"), *arrays)
    goldens.assert_close(y, of_golden(g, "out/y"), g.tol_out, "y")
    for n, d in zip(names, gradients, strict=True):
        goldens.assert_close(d, of_golden(g, f"grad/{n}"), g.tol_grad, n)


@forms
@pytest.mark.parametrize("name", goldens.names("jbu_"))
def test_joint_bilateral(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    options = g.args | dict(implementation=implementation)
    check(g, functools.partial(ops.joint_bilateral, **options), ("in/x", "in/guide"))
    if name == "jbu_kopf_nonint":  # the member is the op
        up = build("jbu", 3, **options)
        y = jax.jit(up.__call__)(of_golden(g, "in/x"), of_golden(g, "in/guide"))
        goldens.assert_close(y, of_golden(g, "out/y"), g.tol_out, "member")


@forms
@pytest.mark.parametrize("name", goldens.names("upa_kernel"))
def test_gaussian_splat(name, implementation, x64):
    g = goldens.load(name, x64=x64)
    f = functools.partial(
        ops.gaussian_splat,
        r_max=g.args["R_max"],
        alpha=g.args["alpha_dyn"],
        center_mode=g.args["center_mode"],
        implementation=implementation,
    )
    maps = ("features", "guide", "sigma_x", "sigma_y", "theta", "sigma_r")
    check(g, f, [f"in/{n}" for n in maps])


@forms
def test_rendering(implementation, x64):
    g = goldens.load("upa_module_s8", x64=x64)
    up = build("upsample_anything", 4, implementation=implementation)
    names = ["in/features", "in/guide", *(f"param/{n}" for n in KERNELS)]
    check(g, lambda x, image, *kernels: up.render(Kernels(*kernels), x, image), names)


def fit(g, steps):
    """Kernels, the images' errors, and the features that the kernels make."""
    schedule = {0.1: "code", 0.001: "paper"}[g.args["lr"]]
    x, image = (of_golden(g, f"in/{n}") for n in ("features", "image"))
    up = build("upsample_anything", x.shape[3], steps=steps, schedule=schedule)

    @jax.jit
    def run(x, image):
        kernels, errors = up.optimise(image, x.shape[1:3])
        return kernels, errors[:, 0], up.render(kernels, x, image)

    return run(x, image)


TRAJECTORIES = goldens.names("upa_trajectory")


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(name):
    """In float64, where it is defined to the last digit."""
    with jax.enable_x64(True):
        g = goldens.load(name, x64=True)
        stored = {int(n) for n in re.findall(r"stage/step(\d+)/sx_raw", " ".join(g.arrays))}
        assert stored == ({51} if name.endswith("51") else {0, 1, 5})
        for steps in (1, 5) if name.endswith("paper_lr") else (max(stored),):
            kernels, errors, y = fit(g, steps)
            for n, a in zip(KERNELS, kernels, strict=True):
                goldens.assert_close(a, of_golden(g, f"stage/step{steps}/{n}"), 5e-7, n)
            last = steps == g.args["steps"]
            wanted = "out/y" if last else f"stage/step{steps}/features"
            goldens.assert_close(y, of_golden(g, wanted), 5e-7, f"features after {steps}")
            if last:
                goldens.assert_close(errors, g.arrays["stage/loss"], 5e-7, "loss")


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory_in_float32(name):
    g = goldens.load(name)
    _, errors, y = fit(g, g.args["steps"])
    goldens.assert_close(y, of_golden(g, "out/y"), g.tol_out, "features")
    goldens.assert_close(errors, g.arrays["stage/loss"], 5e-6, "loss")


def test_first_gradients(x64):
    """That to theta is zero, and not rounding errors, which Adam would divide by their own size."""
    g = goldens.load("upa_trajectory_paper_lr", x64=x64)
    up = build("upsample_anything", 3)
    image, small = of_golden(g, "in/image"), of_golden(g, "stage/lr_image")
    start = Kernels(*(of_golden(g, f"stage/step0/{n}") for n in KERNELS))
    goldens.assert_close(
        ops.resize(image, small.shape[1:3], method="bicubic"), small, g.tol_out, "reduced"
    )

    @jax.jit
    @jax.grad
    def gradient(kernels):
        return jnp.abs(up.render(kernels, small, image) - image).mean()

    for n, d in zip(KERNELS, gradient(start), strict=True):
        if n == "th_raw":
            assert g.meta["zero_grads"] == ["stage/step0/grad_th_raw"] and not np.any(d)
        else:
            wanted = of_golden(g, f"stage/step0/grad_{n}")
            goldens.assert_close(d, wanted, 5e-7 if x64 else 1e-4, n)


def test_loss_at_the_rate_of_the_code(x64):
    """All that can be compared of it: the features are chaotic."""
    g = goldens.load("upa_loss_code_51", x64=x64)
    _, errors, _ = fit(g, 51)
    goldens.assert_close(errors, g.arrays["out/y"], 5e-3, "loss")


def test_every_golden_is_compared():
    assert len(goldens.names("jbu_")) == 4
    assert len(goldens.names("upa_kernel")) == 2 and len(TRAJECTORIES) == 3
    assert len(goldens.names("upa_")) == 7


# -------------------------------------------------------------------------------- sizes and forms
@pytest.mark.parametrize(
    ("mode", "size", "out"),
    [
        ("square", (3, 5), (13, 18)),  # any ratio, another for each axis
        ("square", (1, 1), (5, 3)),
        ("square", (9, 4), (36, 40)),
        ("square", (7, 6), (5, 4)),  # down
        ("nearest", (3, 5), (13, 18)),
        ("nearest", (1, 1), (5, 3)),
        ("nearest", (2, 1), (65, 20)),  # more pixels to a cell than a tile has; a last, small tile
        ("floor", (9, 4), (36, 40)),
        ("floor", (7, 6), (5, 4)),
    ],
)
def test_forms_agree(mode, size, out):
    """Values and gradients; windows larger than the map, small ones, and radii that vary."""
    x, guide = inputs(1, size, out, 4)
    draw = lambda i: jax.random.uniform(jax.random.key(i), (1, *size), minval=0.3, maxval=2.5)  # noqa: E731
    if mode == "square":
        op = functools.partial(ops.joint_bilateral, radius=2, sigma_spatial=1.0, sigma_range=0.5)
        arrays = x, guide
    else:
        op = functools.partial(ops.gaussian_splat, r_max=3, center_mode=mode, alpha=1.5)
        arrays = x, guide, draw(3), draw(4), draw(5), draw(6)
    cotangent = jax.random.normal(jax.random.key(7), (1, *out, 4))
    (y, gradients), (wanted, others) = (
        value_and_gradients(functools.partial(op, implementation=i), cotangent, *arrays)
        for i in ("xla", "reference")
    )
    assert y.shape == (1, *out, 4)
    goldens.assert_close(y, wanted, 5e-6, "y")
    for a, b in zip(gradients, others, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(0.1, np.abs(b).max()))


@every
def test_an_image_of_another_size(name):
    """It is resized to the output's size; one that shrinks, with antialiasing."""
    up, (x, image) = build(name), inputs(1)
    if name == "jbu":
        smaller = jax.jit(lambda x, i: up(x, i, (6, 15)))(x, image)
        resized = ops.resize(image, (6, 15), antialias=True)
        np.testing.assert_allclose(smaller, jax.jit(up.__call__)(x, resized), atol=1e-5)
    assert jax.eval_shape(lambda: up(x, image, (24, 21))).shape == (1, 24, 21, 8)
    grey = jax.eval_shape(lambda: up(x, image[..., :1]))
    assert grey.shape == (1, 12, 20, 8)


@every
def test_outputs_are_weighted_means(name):
    up, (x, image) = build(name), inputs(1)
    y = jax.jit(up.__call__)(jnp.full_like(x, -1.25), image)
    np.testing.assert_allclose(y, -1.25, rtol=1e-6)
    weights = jax.jit(lambda x, i: pixel_weights(up, x, (0, 19), i))(x, image)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)


def test_a_pixel_takes_what_looks_alike():
    """Features of two halves, and an image whose halves meet elsewhere."""
    x = jnp.broadcast_to(jnp.asarray([0.0, 0, 1, 1])[None, None, :, None], (1, 4, 4, 1))
    image = jnp.broadcast_to((jnp.arange(32) >= 20)[None, None, :, None], (1, 32, 32, 3))
    for name, gain in (("jbu", 4.0), ("upsample_anything", 1.0)):
        up = build(name, 1)
        y = jax.jit(up.__call__)(x, gain * image.astype(jnp.float32))
        assert y[:, :, :19].max() < 0.3 < 0.9 < y[:, :, 21:].min(), name


# ------------------------------------------------------------------------------ Upsample Anything
def test_the_image_is_restored_better():
    yy, xx = jnp.meshgrid(jnp.arange(24.0), jnp.arange(24.0), indexing="ij")
    image = jnp.stack([xx > yy, xx + yy > 20, yy > 11], axis=-1).astype(jnp.float32)
    for schedule, gain in (("paper", 0.999), ("code", 0.98)):
        up = build("upsample_anything", steps=20, schedule=schedule)
        _, errors = jax.jit(lambda i, up=up: up.optimise(i, (3, 3)))(image[None])
        assert errors.shape == (20, 1)
        assert errors[-1, 0] < gain * errors[0, 0], schedule


def test_fitted_once_and_applied_often():
    up, (x, image) = build("upsample_anything"), inputs()

    @jax.jit
    def run(x, image):
        kernels, _ = up.optimise(image, x.shape[1:3])
        return up(x, image), up(x, image, values=x[..., :3]), up.render(kernels, x, image), kernels

    y, of_values, rendered, kernels = run(x, image)
    np.testing.assert_allclose(rendered, y, atol=2e-5)
    np.testing.assert_allclose(of_values, y[..., :3], atol=2e-5)
    # Every image has kernels of its own.
    alone, _ = jax.jit(lambda i: up.optimise(i, (3, 5)))(image[1:])
    for a, b in zip(kernels, alone, strict=True):
        np.testing.assert_allclose(a[1:], b, atol=1e-5)


def test_gradients_leave_the_kernels_out():
    up, (x, image) = build("upsample_anything"), inputs(1)
    kernels, _ = jax.jit(lambda i: up.optimise(i, x.shape[1:3]))(image)
    cotangent = jnp.ones((1, 12, 20, 8))
    _, held = value_and_gradients(lambda x, i: up.render(kernels, x, i), cotangent, x, image)
    _, given = value_and_gradients(up, cotangent, x, image)
    for a, b in zip(given, held, strict=True):
        goldens.assert_close(a, b, 1e-4, "gradient")
    d = jax.jit(jax.grad(lambda i: sum(k.sum() for k in up.optimise(i, (3, 5))[0])))(image)
    assert not np.any(d)


# -------------------------------------------------------------------------------- transformations
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("jbu", jnp.bfloat16), ("jbu", jnp.float16), ("upsample_anything", jnp.float16)],
)
def test_narrow_types(name, dtype):
    """The kernels are fitted in float32, to the image as it is given."""
    up, (x, image) = build(name), inputs(1)
    low = build(name, dtype=dtype)
    cotangent = jnp.ones((1, 12, 20, 8), dtype)
    y, gradients = value_and_gradients(jax.checkpoint(low.__call__), cotangent, x, image)
    assert y.dtype == dtype
    wanted = jax.jit(up.__call__)(x, image)
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=0.02)
    assert all(np.isfinite(d).all() for d in gradients)
    if name == "upsample_anything":
        narrow = image.astype(dtype)
        kernels, errors = jax.eval_shape(lambda i: low.optimise(i, (3, 5)), narrow)
        assert {a.dtype for a in (*kernels, errors)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("name", "ratio"), [("jbu", 16), ("jbu", None), ("upsample_anything", 16)])
def test_export_with_symbolic_sizes(name, ratio):
    """The image, and so the output, of `ratio` times the size, or of any."""
    up = build(name, **dict(steps=1) if name == "upsample_anything" else {})
    b, h, w, height, width = export.symbolic_shape("b, h, w, H, W")
    size = (height, width) if ratio is None else (ratio * h, ratio * w)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((b, h, w, 8), (b, *size, 3))]
    exported = export.export(jax.jit(up.__call__))(*shapes)
    reloaded = export.deserialize(exported.serialize())
    arrays = inputs(2, (2, 3), (17, 23) if ratio is None else (32, 48))
    np.testing.assert_allclose(reloaded.call(*arrays), jax.jit(up.__call__)(*arrays), atol=2e-5)


@every
def test_memory(name):
    """28 x 28 to 448 x 448, 384 channels, in outputs: that of a few rows, and backward a copy."""
    up = build(name, 384)
    x, image, y = (
        jax.ShapeDtypeStruct((1, *s), jnp.float32)
        for s in ((28, 28, 384), (448, 448, 3), (448, 448, 384))
    )

    def both(x, image, cotangent):
        y, vjp = jax.vjp(up, x, image)
        return y, vjp(cotangent)

    for f, arrays, limit in ((up, (x, image), 0.3), (both, (x, image, y), 1.5)):
        memory = jax.jit(lambda *a, f=f: f(*a)).lower(*arrays).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= limit * 4 * y.size


# -------------------------------------------------------------------------------------- bad input
@every
def test_wrong_inputs_are_named(name, as_users_call):
    up, (x, image) = build(name), inputs()
    for arrays, message in (
        ((x[..., :7], image), "features must be"),
        ((x, image[0]), "image must be"),
        ((x, image[:1]), "image must have the features' batch size"),
        ((x, image, (0, 5)), "output_size must be two positive sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            up(*arrays)
    with pytest.raises(ValueError, match="values must be"):
        up(x, image, values=x[:, 1:])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("jbu", {k: v}) for k, v in dict(radius=-1, sigma_spatial=0, sigma_range=-1.0).items()),
        ("jbu", dict(guide_at_low_resolution="cubic")),
        *(
            ("upsample_anything", {k: v})
            for k, v in dict(r_max=0, alpha=0, init_sigma=0.0, init_sigma_r=-1, steps=-1).items()
        ),
        ("upsample_anything", dict(center_mode="ceil")),
        ("upsample_anything", dict(schedule="cosine")),
        ("upsample_anything", dict(implementation="gpu")),
        ("jbu", dict(scale=0)),
    ],
)
def test_wrong_options_are_named(name, options, as_users_call):
    (argument,) = options
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        create_upsampler(name, features=8, **options)


def test_wrong_arguments_of_the_ops_are_named(as_users_call):
    x, guide = inputs(1)
    a = jnp.ones((1, 3, 5))
    jbu = functools.partial(ops.joint_bilateral, x, guide)
    splat = functools.partial(ops.gaussian_splat, x, guide, a, a, a)
    given = dict(radius=1, sigma_spatial=1.0, sigma_range=1.0)
    for argument, value in (
        ("radius", 1.5),
        ("sigma_spatial", 0.0),
        ("sigma_range", float("nan")),
        ("guide_at_low_resolution", "cubic"),
    ):
        with pytest.raises(ValueError, match=f"^{argument} must be"):
            jbu(**given | {argument: value})
    for argument, value in (("r_max", 0), ("alpha", -1.0), ("center_mode", "ceil")):
        with pytest.raises(ValueError, match=f"^{argument} must be"):
            splat(a, **{argument: value})
    with pytest.raises(ValueError, match="^sigma_r must have a number for each cell"):
        splat(a[:, 1:])
    with pytest.raises(ValueError, match="values .* and guide .* same batch size"):
        ops.joint_bilateral(x, guide[0], **given)
    with pytest.raises(ValueError, match="implementation must be"):
        jbu(**given, implementation="pallas")
