"""Upsamplers as their repositories save them: behind a norm of the features, beside a backbone."""

from collections.abc import Mapping
from typing import Any

from resfu_jax.convert._places import below

_NORMS = ("channelnorm.norm.", "model.1.norm.")


def unwrapped(state: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The entries of an upsampler, and whether those of a norm before it are among them.

    Of `upsampler.*`, and of `channelnorm.norm.*` or `model.1.norm.*` as `norm_features.*`. All else
    (backbone, downsampler, projections of the training) is dropped. A state without `upsampler.*`
    is taken as it is.
    """
    own: dict[str, Any] = below(state, "upsampler.")
    if not own:
        return dict(state), False
    for norm in _NORMS:
        if found := below(state, norm):
            return own | {f"norm_features.{name}": value for name, value in found.items()}, True
    return own, False
