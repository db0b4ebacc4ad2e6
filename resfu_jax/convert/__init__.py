"""Official PyTorch modules -> modules of this library, weights included. Needs no PyTorch."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from resfu_jax._names import lookup
from resfu_jax.convert.carafe import carafe_pack
from resfu_jax.convert.classic import conv_pixel_shuffle, conv_transpose
from resfu_jax.convert.dysample import dysample
from resfu_jax.convert.fade import fade, fade_lite, semi_shift_up
from resfu_jax.convert.lda_aqu import lda_aqu
from resfu_jax.convert.pretrained import load_pretrained
from resfu_jax.convert.resfu import pcdc_block, resfu
from resfu_jax.convert.sapa import sapa, sapa_base, sapa_deform, sapa_exp

__all__ = ["from_torch", "load_pretrained"]

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
    "open-mmlab/mmcv:CARAFEPack": carafe_pack,
    "pytorch/pytorch:ConvTranspose2d": conv_transpose,
    "pytorch/pytorch:Sequential(Conv2d, PixelShuffle)": conv_pixel_shuffle,
}


def from_torch(official_class: str, state_dict: Mapping[str, Any], **arguments: Any) -> nnx.Module:
    """Build the module that equals an official one, from its weights.

    Args:
      official_class: `"owner/repo:Class"` as the official repository spells it, or the class name
        alone where only one repository has it.
      state_dict: the official module's `state_dict()`; values may be anything that `np.asarray`
        reads. Strip a wrapper's prefix from the keys first.
      **arguments: the official constructor's keyword arguments.

    Raises:
      ValueError: unknown class (near matches are named); missing, unexpected or misshapen entries
        (all are named).
    """
    matches = [n for n in _CONVERTERS if official_class in (n, n.partition(":")[2])]
    if not matches:
        full = {n.partition(":")[2]: n for n in _CONVERTERS} | {n: n for n in _CONVERTERS}
        lookup("official class", full, official_class)
    if len(matches) > 1:
        raise ValueError(f"{official_class!r} is in several repositories: {', '.join(matches)}")
    return _CONVERTERS[matches[0]](state_dict, **arguments)
