"""Neighbourhood attention across scales: fine queries attend to the coarse pixels around them.

Keys and values stay at their own, low resolution (h, w). The result is that of bringing them to the
queries' (H, W) by nearest-neighbour resizing (PyTorch's "nearest-exact") and attending to windows
whose K members are d = max(1, floor(H / h)) rows apart, and columns likewise:

    repeated(x)[m] = x[floor((m + 1/2) h / H)]
    out = neighborhood_attention(q, repeated(k), repeated(v), dilation=d),

with NATTEN's rule for the members (`ops.neighborhood_attention`). Where H / h is whole, they show
the K x K low-resolution pixels around the query's own cell, at borders shifted inwards. Otherwise
two neighbouring members may show the same pixel, which then counts twice: with n_j members of the
query's window that show the low-resolution pixel j,

    out = sum_j p_j v_j,    p_j = n_j exp(s_j) / sum_i n_i exp(s_i),    s_j = scale q . k_j.

Sources: the attention of NAF, of RaysUp (K = 6) and of AnyUp's NATTEN flavour, which repeat keys
and values and call NATTEN's operator.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from resfu_jax.ops._forms import Form, Forms, Implementation
from resfu_jax.ops._pallas import cross_scale as pallas
from resfu_jax.ops._windows import NO_MEMBER, check_pair, repeated_members
from resfu_jax.ops._xla import cross_scale as xla
from resfu_jax.ops.checks import takes_maps
from resfu_jax.ops.dtypes import at_least_float32


@takes_maps("q", "k", "v")
def cross_scale_attention(
    q: Float[Array, "b H W heads d"],
    k: Float[Array, "b h w heads d"],
    v: Float[Array, "b h w heads dv"],
    *,
    kernel_size: int | tuple[int, int],
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b H W heads dv"]:
    """Attention of every fine pixel to the K x K coarse ones around it; see the module's docstring.

    Args:
      q: queries, at high resolution.
      k: keys, at low resolution, in q's dtype.
      v: values, at low resolution; their width may differ.
      kernel_size: K, or (rows, columns). An even window has one member more before the pixel than
        after it.
      scale: factor of the scores, `d ** -0.5` if not given. (For a learned one, multiply q.)
      implementation: `"reference"` gathers the window of every pixel; `"xla"`, unless q is the
        smaller one, makes matrix products of strips of queries with all keys around them;
        `"pallas"`, for whole ratios on a TPU, the same without the scores ever leaving the chip.
        `None` takes the best of the platform.

    Returns:
      The attended values at (H, W), in v's dtype. Scores and softmax are in float32 or better.

    Raises:
      ValueError: shapes or dtypes do not match, the window does not fit (`kernel_size * d` must not
        exceed (H, W); where symbolic sizes turn out to be smaller, the window is the largest that
        fits), or `implementation` does not apply.
    """
    if q.ndim != 5 or k.ndim != 5 or (k.shape[0], *k.shape[3:]) != (q.shape[0], *q.shape[3:]):
        raise ValueError(
            "q must be (batch, H, W, heads, d) and k (batch, h, w, heads, d), "
            f"got q {q.shape} and k {k.shape}"
        )
    if v.ndim != 5 or v.shape[:4] != k.shape[:4]:
        raise ValueError(f"v must be k's shape {k.shape} up to the last axis, got {v.shape}")
    if k.dtype != q.dtype:
        raise ValueError(f"k must have q's dtype {q.dtype}, got {k.dtype}; cast it")
    kernel = check_pair("kernel_size", kernel_size)
    for name, n, size, taps in zip(
        ("height", "width"), k.shape[1:3], q.shape[1:3], kernel, strict=True
    ):
        if isinstance(n, int) and isinstance(size, int) and taps * max(1, size // n) > size:
            raise ValueError(
                f"kernel_size must be at most {size // max(1, size // n)} for a {name} of {n} at "
                f"low and {size} at high resolution, got {taps}; the window must fit"
            )
    scale = q.shape[4] ** -0.5 if scale is None else float(scale)
    return _FORMS(implementation, q, k, v, kernel=kernel, scale=scale)


def _reference(q: Array, k: Array, v: Array, *, kernel: tuple[int, int], scale: float) -> Array:
    dtype = at_least_float32(q.dtype)
    rows = repeated_members(k.shape[1], q.shape[1], kernel[0])
    columns = repeated_members(k.shape[2], q.shape[2], kernel[1])

    def windows(x):  # b H u W v heads d
        x = jnp.take(x, rows, axis=1, mode="clip")
        return jnp.take(x, columns, axis=3, mode="clip")

    scores = scale * jnp.einsum(
        "bijhd,biujvhd->bijhuv", q, windows(k), preferred_element_type=dtype
    )
    there = (rows < NO_MEMBER)[:, None, :, None] & (columns < NO_MEMBER)[None, :, None]
    scores = jnp.where(there[None, :, :, None], scores, -jnp.inf)
    p = jax.nn.softmax(scores, axis=(-2, -1)).astype(v.dtype)
    out = jnp.einsum("bijhuv,biujvhd->bijhd", p, windows(v), preferred_element_type=dtype)
    return out.astype(v.dtype)


_FORMS = Forms(
    "cross_scale_attention",
    _reference,
    xla=Form(xla.attention, xla.refusal),
    pallas=pallas.attention,
)
