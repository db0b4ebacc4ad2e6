"""What a classifier looked at: Grad-CAM on upsampled activations, and how it is scored.

Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1 and 2) of a class with the logit y, from activations A
of h x w cells; here they are upsampled by U before the sum, which gives a map for every pixel:

    w_c = mean over cells of dy / dA_c
    cam = max(0, sum_c w_c U(A, I)_c)                                   (H, W)

The scores compare the probability Y of the class on an image I with O, that on the image *masked*
by its map. Three conventions are in use, and change every number:

* the mask is 1 where cam > 0 ("hard": JAFAR, Couairon et al., 2025), or the map scaled to 0 .. 1
  ("soft": Grad-CAM++, Chattopadhyay et al., WACV 2018; ADCC, Poppi et al., CVPR Workshops 2021);
* it multiplies the pixels before the colours are normalised, which leaves black, or after it,
  which leaves the mean colour;
* a map's complexity is the fraction of its pixels that are not 0 ("nonzero": JAFAR), or its L1
  norm over the number of pixels, when scaled to 0 .. 1 ("l1": ADCC).

A `Convention` holds the first two; results are given for both kinds of complexity.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from resfu_jax._checks import check_choice, need
from resfu_jax._feature_sources import Normalisation, backbone_colours
from resfu_jax.convert import load_classifier
from resfu_jax.features import FeaturePipeline
from resfu_jax.model import evaluating, normalise

MaskKind = Literal["hard", "soft"]
ComplexityKind = Literal["nonzero", "l1"]


# ----------------------------------------------------------------------------------------- the map
def grad_cam(
    activations: Float[Array, "b H W c"], gradients: Float[Array, "b h w c"]
) -> Float[Array, "b H W"]:
    """max(0, sum_c w_c A_c), with w the mean of the gradients over their cells.

    Args:
      activations: at any size, such as upsampled ones.
      gradients: of the class's logit, by the activations at the size of the network.
    """
    weights = jnp.mean(gradients, axis=(1, 2))
    return jnp.maximum(jnp.einsum("bhwc,bc->bhw", activations, weights), 0)


def scaled(cam: Float[Array, "b h w"]) -> Float[Array, "b h w"]:
    """Each map scaled from its least and largest value to 0 .. 1; 0 where it is constant."""
    low = jnp.min(cam, axis=(1, 2), keepdims=True)
    span = jnp.max(cam, axis=(1, 2), keepdims=True) - low
    return jnp.where(span > 0, (cam - low) / jnp.where(span > 0, span, 1), 0)


# --------------------------------------------------------------------- metrics, one for each image
def drop(score: Float[Array, " b"], masked: Float[Array, " b"]) -> Float[Array, " b"]:
    """max(0, Y - O) / Y, of which the mean is the Average Drop: lower is better.

    Args:
      score: Y, the probability of the class on the image.
      masked: O, its probability on the masked image.
    """
    return jnp.maximum(score - masked, 0) / score


def increase(score: Float[Array, " b"], masked: Float[Array, " b"]) -> Bool[Array, " b"]:
    """O > Y, of which the mean is the Average Increase: higher is better. Arguments as `drop`."""
    return masked > score


def gain(score: Float[Array, " b"], masked: Float[Array, " b"]) -> Float[Array, " b"]:
    """max(0, O - Y) / (1 - Y), of which the mean is the Average Gain: higher is better.

    Arguments are those of `drop`. Of an image with Y = 1, which nothing can gain, it is 0.
    """
    room = 1 - score
    return jnp.where(room > 0, jnp.maximum(masked - score, 0) / jnp.where(room > 0, room, 1), 0)


def coherency(cam: Float[Array, "b h w"], masked: Float[Array, "b h w"]) -> Float[Array, " b"]:
    """(r + 1) / 2, with Pearson's r between the maps of image and masked image: higher is better.

    Of a constant map, which correlates with nothing, r is 0.
    """
    x, y = (m - jnp.mean(m, axis=(1, 2), keepdims=True) for m in (cam, masked))
    product = jnp.sum(x * y, axis=(1, 2))
    norm = jnp.sqrt(jnp.sum(x * x, axis=(1, 2)) * jnp.sum(y * y, axis=(1, 2)))
    return (jnp.where(norm > 0, product / jnp.where(norm > 0, norm, 1), 0) + 1) / 2


def complexity(cam: Float[Array, "b h w"], kind: ComplexityKind) -> Float[Array, " b"]:
    """How much of the image the map takes: lower is better.

    Args:
      cam: as `grad_cam` gives it.
      kind: `"nonzero"`, the fraction of pixels above 0, or `"l1"`, the mean of the scaled map.
    """
    check_choice(("nonzero", "l1"), kind=kind)
    share = (cam > 0).astype(cam.dtype) if kind == "nonzero" else scaled(cam)
    return jnp.mean(share, axis=(1, 2))


def adcc(coherency: Any, complexity: Any, drop: Any) -> Float[Array, "..."]:
    """3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop)), each in 0 .. 1.

    Tables usually have it of the three averages, the authors' code the average over images.
    """
    a, b, c = (1 / jnp.asarray(x) for x in (coherency, 1 - complexity, 1 - drop))
    return 3 / (a + b + c)


# ------------------------------------------------------------------------------------------ masking
@dataclasses.dataclass(frozen=True)
class Convention:
    """How an image is masked by its map.

    Attributes:
      mask: `"hard"`, 1 where the map is above 0, or `"soft"`, the map scaled to 0 .. 1.
      masked: `"after"` the colours are normalised, so that 0 is their mean, or `"before"`, so that
        it is black.

    Raises:
      ValueError: another value.
    """

    mask: MaskKind = "hard"
    masked: Literal["before", "after"] = "after"

    def __post_init__(self):
        check_choice(("hard", "soft"), mask=self.mask)
        check_choice(("before", "after"), masked=self.masked)

    def __str__(self) -> str:
        weight = "1 where the map is above 0" if self.mask == "hard" else "the map in 0 .. 1"
        return f"{self.mask} mask ({weight}), {self.masked} normalisation of the image"

    def apply(
        self,
        images: Num[Array, "b h w 3"],
        cam: Float[Array, "b h w"],
        mean: Sequence[float],
    ) -> Float[Array, "b h w 3"]:
        """The masked images, in the images' own colours.

        Args:
          images: RGB in 0 .. 255.
          cam: of as many pixels.
          mean: that is subtracted when colours are normalised, in 0 .. 255.
        """
        m = (cam > 0).astype(cam.dtype) if self.mask == "hard" else scaled(cam)
        zero = jnp.asarray(mean if self.masked == "after" else (0.0,) * 3, cam.dtype)
        zero = zero.reshape(1, 1, 1, 3)
        return zero + m[..., None] * (images.astype(cam.dtype) - zero)


# --------------------------------------------------------------------------------------- on images
class Classifier:
    """A frozen ViT and its classifier.

    Args:
      source: weights, as `load_classifier` takes them, or a `ViT` with `num_classes`.
      normalisation: of its images, as `FeaturePipeline` takes it.

    Attributes:
      vit: the network, such as for the `FeaturePipeline` of an upsampler.
      mean: of its images' colours, in 0 .. 255.
      std: their deviation.

    Raises:
      FileNotFoundError, ValueError: as `load_classifier`; a ValueError also if the normalisation is
        not known.
    """

    def __init__(self, source: Any, *, normalisation: Normalisation | None = None):
        given = isinstance(source, nnx.Module)
        self.vit: Any = source if given else load_classifier(source)
        need(
            getattr(self.vit, "head", None) is not None,
            "source must be weights of a ViT with its classifier, or a ViT with num_classes",
        )
        self.mean, self.std = backbone_colours(self.vit, None if given else source, normalisation)
        graphdef, self._weights = nnx.split(evaluating(self.vit))

        def run(weights: Any, images: Array, classes: Array | None) -> tuple[Array, ...]:
            vit: Any = nnx.merge(graphdef, weights)
            activations, logits_of = vit.last_activations(normalise(images, self.mean, self.std))
            logits, pull_back = jax.vjp(logits_of, activations)
            if classes is None:
                classes = jnp.argmax(logits, axis=-1)
            chosen = jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype)
            probability = jnp.sum(jax.nn.softmax(logits) * chosen, axis=-1)
            return activations, *pull_back(chosen), classes, probability

        self._run = jax.jit(run)

    def __call__(
        self, images: Num[Array | np.ndarray, "b H W 3"], classes: Any = None
    ) -> tuple[
        Float[Array, "b h w c"], Float[Array, "b h w c"], Int[Array, " b"], Float[Array, " b"]
    ]:
        """What a class's map is made of.

        Args:
          images: RGB in 0 .. 255, uint8 or floating point; sides are multiples of the patch.
          classes: one for each image, counted from 0; None: those of the highest logits.

        Returns:
          The activations of `ViT.last_activations`, the gradients of the classes' logits by them,
          the classes, and their probabilities.

        Raises:
          ValueError: images or classes that do not fit.
        """
        if classes is not None:
            classes, count = np.asarray(classes), self.vit.head.kernel.shape[-1]
            need(
                classes.shape == images.shape[:1]
                and np.issubdtype(classes.dtype, np.integer)
                and bool(np.all((classes >= 0) & (classes < count))),
                f"classes must be {images.shape[0]} whole numbers in 0 .. {count - 1}, got "
                f"{classes.tolist()}",
            )
            classes = jnp.asarray(classes, jnp.int32)
        return self._run(self._weights, jnp.asarray(images), classes)


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Maps of images and of the images masked by them.

    Attributes:
      cam: as `grad_cam` gives it, for every pixel.
      cam_of_masked: of the masked images, for the same classes.
      classes: that are explained.
      score: their probabilities.
      score_of_masked: on the masked images.
    """

    cam: Float[Array, "b H W"]
    cam_of_masked: Float[Array, "b H W"]
    classes: Int[Array, " b"]
    score: Float[Array, " b"]
    score_of_masked: Float[Array, " b"]

    def metrics(self) -> dict[str, Array]:
        """All but ADCC, each (B,) and in 0 .. 1."""
        scores = self.score, self.score_of_masked
        return {
            "average_drop": drop(*scores),
            "average_increase": increase(*scores).astype(self.score.dtype),
            "average_gain": gain(*scores),
            "coherency": coherency(self.cam, self.cam_of_masked),
            "complexity_nonzero": complexity(self.cam, "nonzero"),
            "complexity_l1": complexity(self.cam, "l1"),
        }


def explain(
    classifier: Classifier,
    pipeline: FeaturePipeline,
    images: Num[Array | np.ndarray, "b H W 3"],
    classes: Any = None,
    convention: Convention = Convention(),  # noqa: B008
) -> Explanation:
    """Grad-CAM of images on activations upsampled to their size, and of the masked images.

        classifier = Classifier("vit.safetensors", normalisation="half")
        pipeline = FeaturePipeline(classifier.vit, "anyup", normalisation="half")
        averages(explain(classifier, pipeline, images).metrics())

    Args:
      classifier: the network that is explained.
      pipeline: a `FeaturePipeline`, whose upsampler is used; its backbone is not.
      images: RGB in 0 .. 255; sides are multiples of the patch.
      classes: what is explained of each; None: the class that is predicted for the image.
      convention: how images are masked.

    Raises:
      ValueError: images or classes that do not fit.
    """

    def maps(images: Any, classes: Any) -> tuple[Array, Array, Array]:
        low, gradients, classes, score = classifier(images, classes)
        return grad_cam(pipeline.upsample(low, images), gradients), classes, score

    cam, classes, score = maps(images, classes)
    masked = convention.apply(jnp.asarray(images), cam, classifier.mean)
    cam_of_masked, _, score_of_masked = maps(masked, classes)
    return Explanation(cam, cam_of_masked, classes, score, score_of_masked)


def averages(metrics: Mapping[str, Float[Array | np.ndarray, " n"]]) -> dict[str, float]:
    """Averages over images in percent, and ADCC of these for both kinds of complexity.

    Args:
      metrics: of `Explanation.metrics`, those of several explanations one after the other.
    """
    mean = {name: float(np.mean(values)) for name, values in metrics.items()}
    for kind in ("nonzero", "l1"):
        mean[f"adcc_{kind}"] = float(
            adcc(mean["coherency"], mean[f"complexity_{kind}"], mean["average_drop"])
        )
    return {name: 100 * value for name, value in mean.items()}


_COLUMNS = {
    "average_drop": "A.D. ↓",
    "average_increase": "A.I. ↑",
    "average_gain": "A.G. ↑",
    "coherency": "coherency ↑",
    "complexity_nonzero": "complexity (nonzero) ↓",
    "complexity_l1": "complexity (l1) ↓",
    "adcc_nonzero": "ADCC (nonzero) ↑",
    "adcc_l1": "ADCC (l1) ↑",
}
METRICS = tuple(name for name in _COLUMNS if not name.startswith("adcc"))


def markdown(results: Mapping[str, Mapping[str, float]]) -> str:
    """A table of `averages`, a row for each upsampler, in percent."""
    lines = [f"| upsampler | {' | '.join(_COLUMNS.values())} |", "|---" * (len(_COLUMNS) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(f'{result[column]:.1f}' for column in _COLUMNS)} |"
        for name, result in results.items()
    ]
    return "\n".join(lines) + "\n"
