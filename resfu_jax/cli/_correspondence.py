"""Which pixels have features like that of a given or clicked one, in its photo and another."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resfu_jax._checks import need

if TYPE_CHECKING:
    from resfu_jax.features import ImageFeatures

Place = tuple[int, ...]


class Correspondence:
    """Cosine similarities of one photo's features to all of its own, and of another's if given.

    Args:
      results: of one photo or two.
      stride: pixels from one vector to the next.
      orientation: the photos were turned as their EXIF data say.
    """

    def __init__(self, results: "Sequence[ImageFeatures]", stride: int, *, orientation: bool):
        from resfu_jax.images import read_image

        self._results, self._stride = results, stride
        self._photos = [read_image(result.path, orientation=orientation) for result in results]

    def save(self, out: Path, pixel: Place) -> str:
        """Draws OUT/similarity_ROW_COLUMN.png; a line that says where the best match is."""
        from resfu_jax.visualize import save_grid

        panels, best, cosine = self._panels(pixel)
        path = out / f"similarity_{pixel[0]}_{pixel[1]}.png"
        save_grid(path, panels, columns=len(panels), width=3.2)
        first, *second = (result.path for result in self._results)
        if not second:
            return f"{path}: similarity to pixel {pixel[0]} {pixel[1]}"
        return (
            f"{path}: pixel {pixel[0]} {pixel[1]} of {first} is most like {best[0]} {best[1]} of "
            f"{second[0]}, with cosine {cosine:.3f}"
        )

    def show(self, out: Path) -> None:
        """A window with the photos; each click on the first draws, and saves as `save` does.

        Returns when the window is closed.
        """
        import matplotlib.pyplot as plt

        height, width = self._photos[0].shape[:2]
        panels, *_ = self._panels((height // 2, width // 2))
        figure, row = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), squeeze=False)
        axes = row[0]

        def draw(panels: Any) -> None:
            for ax, (title, picture) in zip(axes, panels, strict=True):
                ax.clear()
                ax.imshow(picture)
                ax.set_title(title, parse_math=False)
                ax.axis("off")
            figure.canvas.draw_idle()

        def clicked(event: Any) -> None:
            if event.inaxes is not axes[0]:
                return
            row, column = round(event.ydata), round(event.xdata)
            pixel = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
            draw(self._panels(pixel)[0])
            print(self.save(out, pixel))

        draw([("click a pixel", self._photos[0]), *panels[1:]])
        figure.tight_layout()
        figure.canvas.mpl_connect("button_press_event", clicked)
        plt.show()
        plt.close(figure)

    def _panels(self, pixel: Place) -> tuple[list[tuple[str, Any]], Place, float]:
        """Photos beside their similarities, the pixel of the best match, and its cosine."""
        import numpy as np
        from matplotlib import colormaps
        from PIL import Image

        from resfu_jax.visualize import mark

        row, column = (i // self._stride for i in pixel)
        query = self._results[0].features[row, column].astype(np.float32)
        similar = [_cosine(result.features, query) for result in self._results]
        best = np.unravel_index(similar[-1].argmax(), similar[-1].shape)
        best = tuple(int(i) * self._stride + self._stride // 2 for i in best)
        # One range for both: the same colour is the same similarity.
        low = min(np.percentile(s, 1) for s in similar)
        panels = []
        places: list[Place] = [pixel, best]
        for result, photo, cosine, place in zip(
            self._results, self._photos, similar, places, strict=False
        ):
            place = tuple(min(i, n - 1) for i, n in zip(place, photo.shape, strict=False))
            shown = np.clip((cosine - low) / max(1 - low, 1e-6), 0, 1)
            shown = colormaps["inferno"](shown)[..., :3]
            heat = Image.fromarray((255 * shown).round().astype(np.uint8))
            heat = np.asarray(heat.resize(photo.shape[1::-1], Image.Resampling.NEAREST))
            panels.append((result.path.name, mark(photo, place)))
            panels.append(("cosine similarity", mark(heat, place)))
        return panels, best, float(similar[-1].max())


def check_display() -> None:
    """Whether Matplotlib can open a window here.

    Raises:
      ValueError: it cannot.
    """
    import matplotlib.pyplot as plt

    figure = plt.figure()
    framework = figure.canvas.required_interactive_framework
    plt.close(figure)
    need(
        framework is not None,
        "--click needs a display and a window toolkit that Matplotlib finds (pip install PySide6, "
        "for instance); without one give --pixel ROW COLUMN",
    )


def _cosine(features: Any, query: Any) -> Any:
    """Of every vector to the query, a few rows at a time: float32 copies stay small."""
    import numpy as np

    rows = []
    for row in features:
        row = row.astype(np.float32)
        norm = np.linalg.norm(row, axis=-1) * np.linalg.norm(query)
        rows.append(row @ query / np.maximum(norm, 1e-12))
    return np.stack(rows)
