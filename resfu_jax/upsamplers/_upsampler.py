"""What an upsampler says about itself."""

from typing import Literal

from flax import nnx

Guide = Literal["none", "features"]


class Upsampler(nnx.Module):
    """A member of the registry; its attributes say what it can do.

    Heads, tools and the common test suite read them, and ask for no member's type or name. A class
    states what differs from the defaults here, its constructor what depends on options.

    Attributes:
      guide: `"none"`, called as `up(features, output_size=None)`, or `"features"`, called as
        `up(features, guide)`.
      needs_whole_scale: only `scale` times the size is possible; any other is a `ValueError`.
      same_width: guide and features must have as many channels: they are mixed or compared.
      value_groups: groups of channels, blocks of successive ones, that have weights of their own.
      weights_are_convex: the weights of an output pixel are not negative and sum to 1, where
        nothing beyond the image takes a share.
      mixes: the output holds more than a sum of features: the guide mixed in, or features that were
        mapped first.
      without_gradient: ends of the paths of parameters whose gradient is always zero.
    """

    guide: Guide = "none"
    needs_whole_scale: bool = False
    same_width: bool = False
    value_groups: int = 1
    weights_are_convex: bool = False
    mixes: bool = False
    without_gradient: tuple[tuple[str, ...], ...] = ()
