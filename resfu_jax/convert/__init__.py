"""Official PyTorch modules -> modules of this library, weights included. Needs no PyTorch."""

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from resfu_jax._names import lookup
from resfu_jax.convert._files import read_weights
from resfu_jax.convert._places import load_from
from resfu_jax.convert._state import Misfit, entries_of, has_entries
from resfu_jax.convert.anyup import anyup, natten_block
from resfu_jax.convert.carafe import carafe_pack
from resfu_jax.convert.classic import conv_pixel_shuffle, conv_transpose
from resfu_jax.convert.dysample import dysample
from resfu_jax.convert.fade import fade, fade_lite, semi_shift_up
from resfu_jax.convert.featup import jbu_learned_range, jbu_stack
from resfu_jax.convert.freqfusion import freqfusion
from resfu_jax.convert.jafar import jafar
from resfu_jax.convert.lda_aqu import lda_aqu
from resfu_jax.convert.loftup import loftup
from resfu_jax.convert.naf import naf
from resfu_jax.convert.pretrained import (
    load_backbone,
    load_classifier,
    load_pretrained,
    read_entries,
)
from resfu_jax.convert.raysup import raysup
from resfu_jax.convert.released import load_upsampler
from resfu_jax.convert.resfu import pcdc_block, resfu
from resfu_jax.convert.sapa import sapa, sapa_base, sapa_deform, sapa_exp
from resfu_jax.convert.uplift import uplift

__all__ = [
    "from_torch",
    "load_backbone",
    "load_classifier",
    "load_pretrained",
    "load_upsampler",
    "read_entries",
]

_CONVERTERS: dict[str, Callable[..., nnx.Module]] = {
    "zmhhmz/ReSFU:ReSFU": resfu,
    "zmhhmz/ReSFU:PCDC_Block": pcdc_block,
    "poppinace/sapa:SAPA": sapa,
    "poppinace/sapa:SAPAExp": sapa_exp,
    "tiny-smart/sapa:SAPA": sapa_base,
    "tiny-smart/sapa:SAPADeform": sapa_deform,
    "poppinace/fade:FADE": fade,
    "poppinace/fade:FADELite": fade_lite,
    "poppinace/fade:SemiShiftUp": semi_shift_up,
    "tiny-smart/dysample:DySample": dysample,
    "duzw9311/LDA-AQU:LDA_AQU": lda_aqu,
    "Linwei-Chen/FreqFusion:FreqFusion": freqfusion,
    "valeoai/NAF:NAF": naf,
    "MAP-RaysUp/RaysUp:RaysUp": raysup,
    "mhamilton723/FeatUp:JBULearnedRange": jbu_learned_range,
    "mhamilton723/FeatUp:JBUStack": jbu_stack,
    "andrehuang/loftup:LoftUp": loftup,
    "andrehuang/loftup:UpsamplerwithChannelNorm": loftup,
    "open-mmlab/mmcv:CARAFEPack": carafe_pack,
    "mwalmer-umd/UPLiFT:UPLiFT": uplift,
    "PaulCouairon/JAFAR:JAFAR": jafar,
    "wimmerth/anyup:AnyUp": anyup,
    "wimmerth/anyup:NATTENCrossAttentionBlock": natten_block,
    "pytorch/pytorch:ConvTranspose2d": conv_transpose,
    "pytorch/pytorch:Sequential(Conv2d, PixelShuffle)": conv_pixel_shuffle,
}


# Arguments of ours that a converter passes on: its `**ours`.
_OURS = ("implementation", "dtype", "param_dtype")


def from_torch(
    official_class: str, state_dict: Any, *, prefix: str | None = None, **arguments: Any
) -> nnx.Module:
    """Build the module that equals an official one, from its weights.

    Args:
      official_class: `"owner/repo:Class"` as the official repository spells it, or the class name
        alone where only one repository has it.
      state_dict: the official module's `state_dict()`, as

        - a mapping of names to arrays: NumPy's, JAX's, or PyTorch's tensors of any floating-point
          type (bfloat16 is read exactly), on any device, also parameters that require gradients;
        - a checkpoint with such a mapping in it, `{"state_dict": ..., "epoch": ...}`;
        - the module itself, of which `state_dict()` is taken;
        - a path, a repository of Hugging Face or an address (`https://...`), as `load_pretrained`
          takes: `.safetensors`, an index of shards, `.npz`, or `.pth`, `.pt`, `.bin` and `.ckpt`,
          of which nothing is executed.

      prefix: what the names begin with, such as `"decode_head.up1."`; needed where the module is a
        part of a larger one. A prefix that all names have (`module.`, `_orig_mod.`), or all of one
        dictionary of a checkpoint, is found, also in front of `prefix`. `""` takes the names as
        they are.
      **arguments: the official constructor's arguments, with the official defaults for those left
        out; and `implementation`, `dtype` and `param_dtype` of our module (ReSFU: `dilation` and
        `tile`, too; FADE: `scrambled_phases`).

    Raises:
      ValueError: unknown class or argument (near matches are named); a `state_dict` of another type
        or a file that is not read; missing, unexpected or misshapen entries. The likely cause comes
        first, then counts and names: all of them up to a screen, else the first of each kind.
      FileNotFoundError: no such file.
    """
    names = [n for n in _CONVERTERS if official_class in (n, n.partition(":")[2])]
    if not names:
        full = {n.partition(":")[2]: n for n in _CONVERTERS} | {n: n for n in _CONVERTERS}
        lookup("official class", full, official_class)
    if len(names) > 1:
        raise ValueError(f"{official_class!r} is in several repositories: {', '.join(names)}")
    converter = _CONVERTERS[names[0]]
    _check_arguments(names[0], converter, arguments)
    source = "state_dict"
    if isinstance(state_dict, str | os.PathLike):
        source, state_dict = os.fspath(state_dict), read_weights(state_dict)
    entries = entries_of(state_dict)
    items = state_dict.items() if isinstance(state_dict, Mapping) else ()
    sections = [f"{name}." for name, value in items if has_entries(value)]

    def convert(own: Mapping[str, Any]) -> nnx.Module:
        try:
            return converter(own, **arguments)
        except Misfit as error:
            error.source = source
            raise

    module, _ = load_from(entries, convert, prefix=prefix, sections=sections)
    return module


def _check_arguments(name: str, converter: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Refuses arguments that the official constructor has not, and asks for those it needs."""
    parameters = list(inspect.signature(converter).parameters.values())[1:]
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    known = [p.name for p in named] + [*(_OURS if len(named) < len(parameters) else ())]
    for argument in arguments:
        lookup(f"argument of {name}", dict.fromkeys(known), argument)
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ValueError(
            f"{name} needs {' and '.join(missing)}, as its constructor does; its arguments are "
            f"{', '.join(known)}"
        )
