"""What an upsampler says about itself."""

from typing import Literal

from flax import nnx

Guide = Literal["none", "features", "image"]


class Upsampler(nnx.Module):
    """A member of the registry; its attributes say what it can do.

    Heads, tools and the common test suite read them, and ask for no member's type or name. A class
    states what differs from the defaults here, its constructor what depends on options.

    Attributes:
      guide: `"none"`, called as `up(features, output_size=None)`; `"features"`, called as
        `up(features, guide)`; or `"image"`, called as `up(features, image, output_size=None)`: the
        image may be of any size, and without `output_size` the output has its size.
      image: what values the image has: `"imagenet"`, RGB with ImageNet's mean and deviation taken
        out, or `"unit"`, RGB in 0 .. 1. (Members that work with any take what they are given.)
      needs_whole_scale: only `scale` times the size is possible; any other is a `ValueError`.
      any_width: features may have any number of channels, whatever it was built for.
      same_width: guide and features must have as many channels: they are mixed or compared.
      value_groups: groups of channels, blocks of successive ones, that have weights of their own.
      weights_are_convex: the weights of an output pixel are not negative and sum to 1, where
        nothing beyond the image takes a share.
      mixes: the output holds more than a sum of features: the guide mixed in, or features that were
        mapped first.
      without_gradient: ends of the paths of parameters whose gradient is always zero.
    """

    guide: Guide = "none"
    image: Literal["imagenet", "unit"] = "imagenet"
    needs_whole_scale: bool = False
    any_width: bool = False
    same_width: bool = False
    value_groups: int = 1
    weights_are_convex: bool = False
    mixes: bool = False
    without_gradient: tuple[tuple[str, ...], ...] = ()
