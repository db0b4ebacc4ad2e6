"""Draws docs/readme.png: a frozen ViT's features of a photo at every pixel, by several upsamplers.

    python -m scripts.readme_picture vit_tiny_patch16_224.safetensors docs/readme.png \
        --anyup anyup_paper.npz

Weights of the ViT are those of timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k, of AnyUp the
released ones, which are fetched where no file is given. All panels have the colours of one PCA, of
the backbone's map.
"""

import argparse
import pathlib

from resfu_jax.features import FeaturePipeline
from resfu_jax.images import read_image
from resfu_jax.visualize import PCA, save_grid

ROOT = pathlib.Path(__file__).parents[1]
UPSAMPLERS = {"bilinear": "bilinear", "jbu": "joint bilateral", "anyup": "AnyUp, released weights"}


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backbone", help="weights of a plain ViT")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--anyup", help="AnyUp's weights")
    parser.add_argument("--photo", type=pathlib.Path, default=ROOT / "docs/astronaut.jpg")
    parser.add_argument("--scale", type=float, default=1.0, help="the photo's, for the backbone")
    options = parser.parse_args()

    photo = read_image(options.photo)
    panels, pca = [("photo", photo)], None
    for name, title in UPSAMPLERS.items():
        weights = options.anyup if name == "anyup" else None
        pipeline = FeaturePipeline(
            options.backbone, name, weights=weights, normalisation="half", scale=options.scale
        )
        if pca is None:
            low = pipeline(photo, stride=None)
            pca = PCA.fit(low)
            panels.append((f"ViT-Ti/16: {low.shape[0]} x {low.shape[1]} tokens", pca(low)))
        panels.append((title, pca(pipeline(photo))))
    save_grid(options.out, panels, columns=len(panels), width=2.6)


if __name__ == "__main__":
    main()
