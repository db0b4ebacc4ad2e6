"""What members say about themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resfu_jax import create_upsampler, list_upsamplers
from resfu_jax.heads import create_head
from resfu_jax.upsamplers import (
    Upsampler,
    _registry,
    path_weights,
    pixel_weights,
    register,
    takes_values,
    upsampler_entry,
)


def names_that(attribute):
    ups = {n: create_upsampler(n, features=16, guide_features=16) for n in list_upsamplers()}
    return {name for name, up in ups.items() if getattr(up, attribute)}


def test_which_upsamplers_take_values():
    makes_new = {n for n in list_upsamplers() if not takes_values(upsampler_entry(n).cls)}
    assert makes_new == {"deconv", "pixel_shuffle", "featup", "loftup"}


def test_what_members_say():
    dysample = {n for n in list_upsamplers() if n.startswith("dysample")}
    whole = {"carafe", "deconv", "featup", "pixel_shuffle", "sapa_deform", *dysample}
    assert names_that("needs_whole_scale") == whole
    assert names_that("same_width") == {"fade", "fade_lite", "sapa_i"}
    assert names_that("any_width") == {"anyup"}
    assert names_that("mixes") == {"fade", "fade_lite", "featup", "loftup"}
    others = {"bicubic", "deconv", "pixel_shuffle", "fade", "fade_lite"}
    others |= {"featup", "featup_jbu", "loftup"}
    assert names_that("weights_are_convex") == set(list_upsamplers()) - others


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fade", dict(gate=False), dict(same_width=False, mixes=False, weights_are_convex=True)),
        ("sapa", dict(v_embed=True), dict(mixes=True, weights_are_convex=True)),
        ("sapa", dict(out_dim=8), dict(mixes=True)),
        ("sapa_deform", dict(high_offset=False), dict(needs_whole_scale=False)),
        ("carafe", dict(up_group=2), dict(value_groups=2)),
        ("lda_aqu", dict(nh=2, n_groups=4, reduction_factor=2), dict(value_groups=4)),
    ],
)
def test_options_change_what_they_say(name, options, said):
    up = create_upsampler(name, features=16, guide_features=16, **options)
    assert {attribute: getattr(up, attribute) for attribute in said} == said


@pytest.mark.parametrize("name", ["fade", "fade_lite"])
def test_the_gate_gives_the_rest_to_the_guide(name):
    up = create_upsampler(name, features=16, guide_features=16, scale=2)
    x, guide = (jax.random.normal(jax.random.key(n), (1, n, n, 16)) for n in (6, 12))
    assert 0.01 < pixel_weights(up, x, (6, 5), guide).sum() < 0.99


@pytest.mark.parametrize("name, options", [("segformer", {"wiring": "stagewise"}), ("fpn", {})])
def test_weights_through_the_upsamplers_of_a_head(name, options):
    """Bilinear interpolation, three times: of a quarter, a half and the whole."""
    options |= dict(width=4, upsampler="bilinear", rngs=nnx.Rngs(0))
    head = create_head(name, in_features=(2, 2, 2, 2), num_classes=3, **options)
    head.eval()
    sides = (64, 32, 16, 8)
    maps = [jax.random.normal(jax.random.key(n), (1, n, n, 2)) for n in sides]
    weights = path_weights(head.upsampler_path(maps), (9, 20))
    cells = jnp.eye(64).reshape(64, 8, 8, 1)
    for n in sides[-2::-1]:
        cells = jax.image.resize(cells, (64, n, n, 1), "bilinear")
    np.testing.assert_allclose(weights.ravel(), cells[:, 9, 20, 0], atol=1e-6)


def test_a_plain_module_gets_the_defaults(monkeypatch):
    monkeypatch.setattr(_registry, "_ENTRIES", dict(_registry._ENTRIES))

    @register("plain")
    class Plain(nnx.Module):
        guide = "features"
        same_width = True

        def __call__(self, features, guide):
            return features

    said = {name: getattr(Plain, name) for name in Upsampler.__annotations__}
    defaults = {name: getattr(Upsampler, name) for name in Upsampler.__annotations__}
    assert said == defaults | dict(guide="features", same_width=True)
