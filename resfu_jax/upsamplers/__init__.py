"""Upsamplers: one file, one paper. Chosen by name through `create_upsampler`."""

from resfu_jax._checks import check_whole
from resfu_jax.ops.checks import check_floating
from resfu_jax.upsamplers._inputs import (
    check_features,
    check_guide,
    check_image,
    check_output_size,
    compute_dtype,
    need_guide,
    reassembled,
    size_of_output,
)
from resfu_jax.upsamplers._registry import (
    create_upsampler,
    list_upsamplers,
    register,
    upsampler_entry,
)
from resfu_jax.upsamplers._upsampler import Guide, Upsampler
from resfu_jax.upsamplers._weights import keeps_space, path_weights, pixel_weights, takes_values
from resfu_jax.upsamplers.anyup import AnyUp
from resfu_jax.upsamplers.carafe import CARAFE
from resfu_jax.upsamplers.classic import Deconvolution, Interpolation, PixelShuffle
from resfu_jax.upsamplers.dysample import DySample
from resfu_jax.upsamplers.fade import FADE
from resfu_jax.upsamplers.featup import FeatUp, FeatUpJBU
from resfu_jax.upsamplers.freqfusion import FreqFusion
from resfu_jax.upsamplers.jafar import JAFAR
from resfu_jax.upsamplers.jbu import JBU
from resfu_jax.upsamplers.lda_aqu import LDAAQU
from resfu_jax.upsamplers.loftup import LoftUp
from resfu_jax.upsamplers.naf import NAF
from resfu_jax.upsamplers.raysup import RaysUp
from resfu_jax.upsamplers.resfu import ReSFU
from resfu_jax.upsamplers.sapa import SAPA, SAPADeform
from resfu_jax.upsamplers.uplift import UPLiFT
from resfu_jax.upsamplers.upsample_anything import UpsampleAnything

__all__ = [
    "CARAFE",
    "FADE",
    "JBU",
    "JAFAR",
    "LDAAQU",
    "NAF",
    "SAPA",
    "AnyUp",
    "Deconvolution",
    "DySample",
    "Guide",
    "FreqFusion",
    "FeatUp",
    "FeatUpJBU",
    "Interpolation",
    "LoftUp",
    "PixelShuffle",
    "RaysUp",
    "ReSFU",
    "SAPADeform",
    "UPLiFT",
    "UpsampleAnything",
    "Upsampler",
    "check_features",
    "check_floating",
    "check_guide",
    "check_image",
    "check_output_size",
    "check_whole",
    "compute_dtype",
    "create_upsampler",
    "keeps_space",
    "list_upsamplers",
    "need_guide",
    "path_weights",
    "pixel_weights",
    "reassembled",
    "register",
    "size_of_output",
    "takes_values",
    "upsampler_entry",
]
