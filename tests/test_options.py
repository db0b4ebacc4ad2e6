"""Every option of every upsampler, head and backbone refuses the values that it cannot have."""

import inspect
import math
import re
import typing

import pytest
from flax import nnx

from resfu_jax.backbones import BACKBONES, create_backbone
from resfu_jax.heads import DEPTH_HEADS, HEADS, create_head
from resfu_jax.upsamplers import create_upsampler, list_upsamplers, upsampler_entry

C = 32  # channels that suit every upsampler


def upsampler(name, **options):
    channels = {key: options.pop(key, C) for key in ("features", "guide_features")}
    return create_upsampler(name, **channels, rngs=nnx.Rngs(0), **options)


def head(name, **options):
    usual = {"upsampler": "bilinear", "in_features": (8, 8, 8, 8)}
    options = usual | {"num_classes": 1 if name in DEPTH_HEADS else 3} | options
    return create_head(name, rngs=nnx.Rngs(0), **options)


def backbone(name, **options):
    return create_backbone(name, rngs=nnx.Rngs(0), **options)


def kinds(annotation):
    """The types that an annotation allows, the values of a Literal among them."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, type(int | None)):
        return [kind for part in parts for kind in kinds(part)]
    if typing.get_origin(annotation) is typing.Literal:
        return list(parts)
    return [typing.get_origin(annotation) or annotation]


# Arguments for which 0 is right; below 1, too; those that have tests of their own.
MAY_BE_ZERO = {"radius", "lr_mult", "range_factor", "padding", "output_padding", "registers"}
MAY_BE_ZERO |= {"dropout", "drop_path", "layers", "window_ratio", "steps", "noise"}
SHARES = {"dropout", "drop_path"}
NOT_HERE = {"dtype", "param_dtype", "rngs", "upsampler", "upsampler_options"}


def options_of(cls):
    parameters = inspect.signature(cls.__init__).parameters.values()
    for parameter in parameters:
        if parameter.name not in {"self", *NOT_HERE} and parameter.annotation is not typing.Any:
            yield parameter.name, kinds(parameter.annotation)


def wrong_values(name, allowed):
    """Values that no option of this name and these types may have."""
    numeric = any(kind in (int, float) for kind in allowed)
    if numeric:
        yield from (math.nan, math.inf, -math.inf, -1, -0.5, True, "1", 1j, [])
        if float not in allowed:
            yield 2.5
        if name not in MAY_BE_ZERO:
            yield 0
        if name in SHARES:
            yield 1.0
    elif bool in allowed:
        yield from (0, 1, "False", "yes", math.nan)
    elif any(isinstance(kind, str) for kind in allowed) or str in allowed:
        yield from ("no such value", 1, True, math.nan, ["a"])
    else:  # sequences of whole numbers
        for item in (math.nan, math.inf, -1, 2.5, True, "1"):
            yield (item,) * 4
        if name not in MAY_BE_ZERO:
            yield (0,) * 4
        yield from (3, "1234", {1: 2})
    if type(None) not in allowed:
        yield None


CASES = [
    *((upsampler, name, upsampler_entry(name).cls) for name in list_upsamplers()),
    *((head, name, cls) for name, (cls, _) in HEADS.items()),
    *((backbone, name, cls) for name, cls in BACKBONES.items()),
]


@pytest.mark.parametrize(
    ("build", "name", "option", "allowed"),
    [
        pytest.param(build, name, option, allowed, id=f"{name}-{option}")
        for build, name, cls in CASES
        for option, allowed in options_of(cls)
        if (option, build) != ("guide_features", upsampler) or cls.guide == "features"
    ],
)
def test_values_that_an_option_cannot_have(as_users_call, build, name, option, allowed):
    for value in wrong_values(option, allowed):
        with pytest.raises(ValueError) as error:
            build(name, **{option: value})
            raise AssertionError(f"{name} takes {option}={value!r}")
        assert option in str(error.value), f"{value!r}: {error.value}"


@pytest.mark.parametrize(("build", "name"), [(build, name) for build, name, _ in CASES])
def test_options_that_do_not_exist(as_users_call, build, name):
    with pytest.raises(ValueError, match="unknown option of .* 'skale'"):
        build(name, skale=1)


@pytest.mark.parametrize("build", [upsampler, head, backbone])
@pytest.mark.parametrize("name", ["no such", 3, None, ["bilinear"]])
def test_names_that_do_not_exist(as_users_call, build, name):
    with pytest.raises(ValueError, match=f"unknown [a-z]+ {re.escape(repr(name))}"):
        build(name)


@pytest.mark.parametrize("option", ["features", "guide_features", "scale", "rngs", "dtype"])
def test_options_of_upsamplers_that_heads_set(as_users_call, option):
    with pytest.raises(ValueError, match=f"upsampler_options cannot hold '{option}'"):
        head("segformer", upsampler_options={option: 2})
    with pytest.raises(ValueError, match="upsampler_options must be a dictionary, got 'eps=1'"):
        head("segformer", upsampler_options="eps=1")
