"""`resfu visualize`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from resfu_jax._files import local_path
from resfu_jax.cli._run import Run, start_jax

if TYPE_CHECKING:
    from resfu_jax.visualize import Panel

MEMBERS = ("bilinear", "dysample", "carafe", "sapa", "resfu")

Pixels = tuple[tuple[int, int], ...]


def visualize(
    photo: tyro.conf.Positional[Path],
    *,
    checkpoint: tuple[Path, ...] = (),
    pretrained: str | None = None,
    upsamplers: tuple[str, ...] = MEMBERS,
    pixel: Pixels = (),
    click: bool = False,
    out: Path = Path("figure.png"),
    panels: Path | None = None,
    columns: int = 4,
    which: str = "best",
    data_dir: Path | None = None,
    backbone: Literal["vit", "mit", "resnet"] = "vit",
    variant: str = "tiny",
    normalisation: Literal["half", "imagenet"] = "half",
    scale: int = 4,
    drawn_scale: int | None = None,
    weights: tuple[str, ...] = (),
    side: int = 448,
    steps: int = 200,
    seed: int = 0,
    orientation: bool = True,
) -> None:
    """Draws features of a photo before and after upsamplers, and what single pixels are made of.

    resfu visualize photo.jpg --checkpoint runs/bilinear runs/resfu --out figure.png

    resfu visualize photo.jpg --pretrained timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k

    resfu visualize photo.jpg --pretrained vit.safetensors --upsamplers carafe resfu --pixel 120 200

    Of trained runs, a row each: the photo, the backbone's features, the upsampled ones, the
    prediction. With --pretrained, upsamplers are fitted to the photo itself, without labels, on a
    frozen backbone. What the panels mean: docs/visualize.md.

    resfu visualize photo.jpg --pretrained vit.safetensors --upsamplers jbu anyup jafar \\
        --weights anyup=anyup_multi_backbone.pth --drawn-scale 16

    Args:
      photo: the image.
      checkpoint: workdirs of runs of train.py, or single checkpoints in them.
      pretrained: weights of a backbone: a file, or a repository on Hugging Face.
      upsamplers: their names; with --pretrained.
      pixel: row and column of a pixel of the photo, and more of them.
      click: choose the pixels in a window; the enter key ends the choice.
      out: the figure.
      panels: folder for the single pictures.
      columns: panels in a row of the figure.
      which: checkpoint of the runs: best (by mIoU), latest, or a step.
      data_dir: where the runs' dataset was prepared.
      backbone: kind of the pretrained backbone.
      variant: which of them: tiny, dinov2_small, b0, 50, ...
      normalisation: what it expects: half (mean and deviation 127.5; most plain ViT) or imagenet
        (the DINO family, MiT, ResNet).
      scale: ratio of the upsamplers that are fitted.
      drawn_scale: ratio at which all are drawn, if another: for those that are fitted, their
        weights must not depend on it.
      weights: upsamplers with released weights, which are not fitted: `anyup` fetches them,
        `anyup=FILE` reads them.
      side: pixels of the photo's longer side, once resized.
      steps: of the fit.
      seed: of the initial weights.
      orientation: turn the photo as its EXIF data say, and so as viewers show it.
    """
    from resfu_jax.images import read_image
    from resfu_jax.upsamplers import upsampler_entry
    from resfu_jax.visualize import save_grid, save_png

    if bool(checkpoint) == (pretrained is not None):
        raise ValueError("give either --checkpoint RUN ... or --pretrained FILE")
    if columns < 1:
        raise ValueError(f"--columns must be at least 1, got {columns}")
    out = local_path(out, "--out")
    panels = None if panels is None else local_path(panels, "--panels")
    image = read_image(photo, orientation=orientation)
    if click:
        pixel += _clicked(image)
    for place in pixel:
        if not all(0 <= i < n for i, n in zip(place, image.shape, strict=False)):
            raise ValueError(
                f"--pixel must lie in the photo of {image.shape[0]} rows and {image.shape[1]} "
                f"columns, got {place[0]} {place[1]}"
            )
    start_jax()
    if pretrained is None:
        drawn = [
            panel
            for path in checkpoint
            for panel in _trained(Run(path, which, data_dir=data_dir), image, pixel)
        ]
    else:
        for name in upsamplers:
            upsampler_entry(name)  # a wrong one is told before the work
        released = dict(text.partition("=")[::2] for text in weights)
        for name in released:
            if name not in upsamplers:
                raise ValueError(f"--weights are of {name!r}, which --upsamplers does not name")
        extract, stride = _backbone(pretrained, backbone, variant, normalisation)
        drawn = _fitted(
            extract,
            stride,
            image,
            pixel,
            upsamplers,
            columns=columns,
            scale=scale,
            drawn_scale=scale if drawn_scale is None else drawn_scale,
            released=released,
            side=side,
            steps=steps,
            seed=seed,
        )
    if panels is not None:
        for i, (title, picture) in enumerate(drawn):
            name = "_".join("".join(c if c.isalnum() else " " for c in title).split())
            save_png(panels / f"{i:02d}_{name}.png", picture)
    save_grid(out, drawn, columns=columns)
    print(f"{out}: {len(drawn)} panels")


def _trained(run: Run, image: Any, pixels: Pixels) -> "list[Panel]":
    """The panels of a run of train.py."""
    import jax
    import numpy as np

    from resfu_jax.heads import LinearHead
    from resfu_jax.self_supervised import fitted
    from resfu_jax.upsamplers import keeps_space, path_weights, takes_values, upsampler_entry
    from resfu_jax.visualize import PCA, overlay

    predictor = run.load()
    name = run.checkpoint.resolve().name
    linear = isinstance(predictor.model.head, LinearHead)
    labels = predictor.predict(image)[0].labels
    seen = predictor.preprocess.resize(image)
    multiple = predictor.preprocess.multiple
    seen = fitted(seen, side=max(*seen.shape, multiple), multiple=multiple)

    @jax.jit
    def features(model, images):
        maps = model.features(images)
        low = maps[-1]
        if linear:
            low = model.head.upsampler_inputs(maps, model.normalise(images))[0]
        return low, model.upsampled(images, maps)

    low, high = (np.asarray(x[0]) for x in features(predictor.model, seen[None]))
    pca = PCA.fit(low)
    shared = linear and keeps_space(predictor.model.head.upsample)
    drawn = [
        ("photo", seen),
        ("backbone's features", pca(low)),
        (f"{name}: upsampled", (pca if shared else PCA.fit(high))(high)),
        (f"{name}: prediction", overlay(image, labels, predictor.palette)),
    ]

    @jax.jit
    def weights(model, images, place):
        maps = model.features(images)
        path = model.head.upsampler_path(maps, model.normalise(images))
        return path_weights(path, tuple(place))

    known = takes_values(upsampler_entry(predictor.config.model.head.upsampler).cls)
    find = (lambda at: weights(predictor.model, seen[None], at)) if known else None
    for pixel in pixels:
        context, draw = _window(image, pixel, seen, drawn[1][1], high.shape[:2])
        drawn += [*context, draw(name, find)]
    return drawn


def _fitted(
    extract: Any,
    stride: int,
    image: Any,
    pixels: Pixels,
    upsamplers: tuple[str, ...],
    *,
    columns: int,
    scale: int,
    drawn_scale: int,
    released: dict[str, str],
    side: int,
    steps: int,
    seed: int,
) -> "list[Panel]":
    """The panels of upsamplers that learn from the photo, or have released weights, or none."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from tqdm import tqdm

    from resfu_jax.convert import load_upsampler
    from resfu_jax.model import evaluating
    from resfu_jax.self_supervised import GuidedUpsampler, fit, fitted, training_pairs
    from resfu_jax.upsamplers import takes_values
    from resfu_jax.visualize import PCA

    seen = fitted(image, side=side, multiple=stride)
    low = extract(seen[None])
    networks: dict[str, Any] = dict.fromkeys(upsamplers)
    networks |= {name: load_upsampler(name, file or None) for name, file in released.items()}

    def create(name: str, scale: int) -> GuidedUpsampler:
        up = networks[name] or name
        return GuidedUpsampler(up, low.shape[3], scale=scale, rngs=nnx.Rngs(seed))

    for name in upsamplers:
        # So is a width or a ratio that does not fit.
        one, other = (
            jax.tree.map(jnp.shape, nnx.state(nnx.eval_shape(lambda n=name, r=ratio: create(n, r))))
            for ratio in (scale, drawn_scale)
        )
        if one != other:
            raise ValueError(
                f"--drawn-scale must be --scale, {scale}, with {name}, whose weights depend on it; "
                f"got {drawn_scale}"
            )
    _, dense, _ = training_pairs(extract, [seen], scale)[0]
    pca = PCA.fit(np.asarray(low[0]))
    drawn = [
        ("photo", seen),
        (f"features, stride {stride}", pca(np.asarray(low[0]))),
        (f"teacher: {scale**2} shifted passes", pca(np.asarray(dense[0]))),
    ]
    run = jax.jit(lambda module, *inputs: module(*inputs))
    weights = jax.jit(lambda module, x, images, place: module.weights(x, images, tuple(place)))
    modules = {}
    for name in tqdm(upsamplers, desc="fitting", disable=None):
        module, title = create(name, scale), f"{name}, released weights"
        if name not in released:
            loss = fit(module, extract, [seen], steps=steps, seed=seed)[-1]
            title = f"{name}: error {loss:.2f}"
        if drawn_scale != scale:
            larger = create(name, drawn_scale)
            nnx.update(larger, nnx.state(module))
            module = larger
        modules[name] = module = evaluating(module)
        drawn.append((title, pca(np.asarray(run(module, low, seen[None])[0]))))
    rest = [("", np.full_like(seen, 255))] * (-len(drawn) % columns)
    drawn += rest
    for pixel in pixels:
        size = tuple(drawn_scale * n for n in low.shape[1:3])
        context, draw = _window(image, pixel, seen, drawn[1][1], size)
        drawn += context
        for name, module in modules.items():
            known = takes_values(module.upsample)
            find = (lambda at, m=module: weights(m, low, seen[None], at)) if known else None
            drawn.append(draw(name, find))
        drawn += rest
    return drawn


def _window(
    image: Any, pixel: tuple[int, int], seen: Any, features: Any, size: tuple[int, int]
) -> "tuple[list[Panel], Callable[[str, Any], Panel]]":
    """Three panels of a pixel's surroundings, and what draws an upsampler's weights there.

    Args:
      image: the photo, in which `pixel` counts.
      pixel: row and column.
      seen: the photo as the backbone sees it.
      features: its features in colours.
      size: of the upsamplers' output.

    Returns:
      The panels, and a function from a name, and a function of the output pixel to its weights or
      None, to a panel.
    """
    import jax.numpy as jnp
    import numpy as np

    from resfu_jax.visualize import Window

    def place(size: tuple[int, ...]) -> tuple[int, int]:
        return tuple(i * m // n for i, n, m in zip(pixel, image.shape, size, strict=False))

    window = Window.around(place(seen.shape), seen.shape[:2], features.shape[:2])

    def draw(name: str, find: Any) -> "Panel":
        if find is None:
            return f"{name}: makes new features", window.show(seen, np.zeros(features.shape[:2]))
        weights = np.asarray(find(jnp.asarray(place(size)))[0])
        share = weights.sum()
        return f"{name}: {share:.0%}" if share < 0.995 else name, window.show(seen, weights)

    cells = np.kron(features, np.ones((*window.cell, 1), np.uint8))
    context = [
        ("one pixel", window.frame(seen)),
        ("its surroundings", window.show(seen)),
        ("their features", window.show(cells)),
    ]
    return context, draw


def _backbone(pretrained: str, backbone: str, variant: str, normalisation: str) -> tuple[Any, int]:
    """The compiled backbone and its stride."""
    import numpy as np
    from flax import nnx

    from resfu_jax.backbones import create_backbone
    from resfu_jax.convert import load_pretrained
    from resfu_jax.self_supervised import extractor

    model = create_backbone(backbone, variant=variant, rngs=nnx.Rngs(0))
    load_pretrained(pretrained, model)
    half = (127.5,) * 3
    options = dict(mean=half, std=half) if normalisation == "half" else {}
    extract, known = extractor(model, **options), {}

    def remember(images: Any) -> Any:
        """Every upsampler learns from the same views."""
        key = images.shape, np.asarray(images).tobytes()
        if key not in known:
            known[key] = extract(images)
        return known[key]

    return remember, model.strides[-1]


def _clicked(image: Any) -> Pixels:
    """Pixels chosen in a window."""
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() in ("agg", "pdf", "svg", "ps", "cairo", "template"):
        raise ValueError("--click needs a window; without a display, give --pixel ROW COLUMN")
    plt.imshow(image)
    plt.title("click pixels, then press enter")
    chosen = plt.ginput(n=-1, timeout=0)
    plt.close()
    return tuple((int(y + 0.5), int(x + 0.5)) for x, y in chosen)
