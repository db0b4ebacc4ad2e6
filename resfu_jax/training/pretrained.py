"""Weights that a run starts from."""

from typing import Any

from flax import nnx

from resfu_jax.backbones import create_backbone
from resfu_jax.convert import load_pretrained
from resfu_jax.training.config import BackboneConfig


def pretrained_backbone(config: BackboneConfig) -> Any:
    """Weights, an `nnx.State` for `nnx.update(model.backbone, ...)`; None if there are none.

    Raises:
      ValueError: the weights do not fit the backbone; says the likely cause, and what differs.
      FileNotFoundError: they are not there.
    """
    if config.pretrained is None:
        return None
    options = dict(name=config.name, variant=config.variant, **config.options)
    # Abstract: no random weights are drawn only to be replaced.
    backbone = nnx.eval_shape(lambda: create_backbone(**options, rngs=nnx.Rngs(0)))
    load_pretrained(config.pretrained, backbone, prefix=config.pretrained_prefix)
    return nnx.as_pure(nnx.state(backbone, nnx.Any(nnx.Param, nnx.BatchStat)))
