"""What photos of 2048 x 2048 take, by the programs that would run."""

import jax
import pytest
from flax import nnx

from resfu_jax import FeaturePipeline, create_upsampler
from resfu_jax.backbones import create_backbone

GB = 10**9


@pytest.mark.optimized
def test_2048_pixels_of_a_small_vit_fit_16_gigabytes():
    vit = create_backbone("vit", variant="small", rngs=nnx.Rngs(0))
    up = create_upsampler("anyup", features=384, rngs=nnx.Rngs(0))
    one = jax.devices()[:1]
    memory = FeaturePipeline(vit, up, normalisation="half", devices=one).memory(2048, 2048)
    assert memory.result == 2048 * 2048 * 384 * 4
    assert memory.passes == 3
    # All scores of one attention alone would be 6 heads x 16385^2 x 4 bytes = 6.4 GB.
    assert memory.encode < 3 * GB
    assert memory.upsample + memory.result == memory.peak < 16 * GB
