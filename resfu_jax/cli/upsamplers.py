"""`resfu upsamplers` and `resfu benchmark`: what upsamplers cost."""

import dataclasses
import statistics
import time
from typing import Any, Literal

import tyro

from resfu_jax._output import counted
from resfu_jax.cli._run import start_jax


def upsamplers(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    features: int = 64,
    guide_features: int | None = None,
    size: tuple[int, int] = (32, 32),
    scale: int = 4,
    weights: bool = False,
) -> None:
    """Lists the upsamplers with their guide, parameters and operations, or their released weights.

    resfu upsamplers

    resfu upsamplers resfu fade carafe --features 256 --size 64 64 --scale 2

    resfu upsamplers --weights

    Operations are of one forward pass of one image, as XLA counts them before it optimises.

    Args:
      names: some of them; by default all.
      features: channels of the low-resolution features.
      guide_features: channels of the guide; by default as many as the features. (Of an image, 3.)
      size: height and width of the features.
      scale: ratio of the output to them.
      weights: list the weights that `load_upsampler` knows by name, with their licences.
    """
    if weights:
        _print_weights(names)
        return
    start_jax()
    from rich.console import Console
    from rich.table import Table

    from resfu_jax import list_upsamplers

    table = Table(
        title=f"{counted(features, 'channel')}, {size[0]}x{size[1]} to "
        f"{size[0] * scale}x{size[1] * scale}, "
        f"guide of {counted(guide_features or features, 'channel')}",
        title_justify="left",
    )
    table.add_column("name")
    table.add_column("guide")
    for title in ("parameters", "GFLOP"):
        table.add_column(title, justify="right")
    for name in names or list_upsamplers():
        call = _Call.of(name, features, guide_features, size, scale, "float32")
        table.add_row(name, call.guide, f"{call.parameters:,}", f"{call.gflop():.3f}")
    Console().print(table)


def _print_weights(names: tuple[str, ...]) -> None:
    """Prints the catalogue as a table, or all that it says about these names and members."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from resfu_jax.convert.catalogue import RELEASES, find_releases

    if names:
        for name, release in [item for n in names for item in find_releases(n).items()]:
            facts = release.facts() | {
                "file": release.url,
                "SHA-256": release.sha256 or "",
                "note": release.note,
            }
            print(name, *(f"  {key:9}{text}" for key, text in facts.items() if text), sep="\n")
        return
    table = Table(
        title="resfu_jax.load_upsampler(name); more about one: resfu upsamplers --weights NAME",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for title in ("name", "member", "backbone", "channels", "licence"):
        table.add_column(title)
    table.add_column("MB", justify="right")
    table.add_column("where", overflow="fold")
    for name, release in RELEASES.items():
        facts = release.facts()
        site = "/".join(release.url.split("/")[2:4])
        table.add_row(name, *(facts.get(c.header, site) for c in table.columns[1:]))
    console = Console()
    console.width = max(console.width, 130)  # a narrower table cannot be read
    console.print(table)


def benchmark(
    name: tyro.conf.Positional[str],
    *,
    features: int = 64,
    guide_features: int | None = None,
    size: tuple[int, int] = (32, 32),
    scale: int = 4,
    dtype: Literal["float32", "bfloat16"] = "float32",
    gradient: bool = False,
    runs: int = 10,
) -> None:
    """Times one upsampler on this machine.

    resfu benchmark resfu --features 384 --guide-features 32

    resfu benchmark carafe --features 256 --size 64 64 --scale 2 --gradient

    Comparisons with the official modules: `python -m benchmarks` in a checkout of the repository.

    Args:
      name: of the upsampler.
      features: channels of the low-resolution features.
      guide_features: channels of the guide; by default as many as the features.
      size: height and width of the features.
      scale: ratio of the output to them.
      dtype: of inputs and computation.
      gradient: with the gradients to inputs and parameters.
      runs: timed calls.
    """
    start_jax()
    import jax
    from flax import nnx

    if runs < 1:
        raise ValueError(f"--runs must be at least 1, got {runs}")
    call = _Call.of(name, features, guide_features, size, scale, dtype)
    state = nnx.split(call.create())[1]
    keys = jax.random.split(jax.random.key(0), len(call.inputs))
    inputs = [
        jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, call.inputs, strict=True)
    ]

    def forward_backward(state, *inputs):
        y, vjp = jax.vjp(call.forward, state, *inputs)
        return y, vjp(y)

    start = time.perf_counter()
    f = jax.jit(forward_backward if gradient else call.forward).lower(state, *inputs).compile()
    compiling = time.perf_counter() - start
    jax.block_until_ready(f(state, *inputs))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(f(state, *inputs))
        times.append(1e3 * (time.perf_counter() - start))
    memory = f.memory_analysis()
    print(
        f"{name}, {'forward and backward' if gradient else 'forward'}, {dtype}, "
        f"{jax.devices()[0].device_kind}: median {statistics.median(times):.2f} ms, least "
        f"{min(times):.2f} ms of {counted(runs, 'call')}; temporary memory "
        f"{memory.temp_size_in_bytes / 1e6:.1f} MB; {call.gflop():.3f} GFLOP forward; compiled in "
        f"{compiling:.1f} s"
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """One upsampler at one size."""

    create: Any  # () -> module
    guide: str
    inputs: tuple  # shapes of features and guide

    @classmethod
    def of(cls, name, features, guide_features, size, scale, dtype) -> "_Call":
        """Raises a `ValueError` for sizes that make no sense, or that the upsampler cannot take."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from resfu_jax import create_upsampler
        from resfu_jax.upsamplers import upsampler_entry

        guide_features = features if guide_features is None else guide_features
        if min(features, guide_features, *size, scale) < 1:
            raise ValueError(
                "--features, --guide-features, --size and --scale must be positive, got "
                f"{features}, {guide_features}, {size} and {scale}"
            )
        guide = upsampler_entry(name).cls.guide

        def create() -> nnx.Module:
            return create_upsampler(
                name,
                features=features,
                guide_features=guide_features,
                scale=scale,
                dtype=jnp.dtype(dtype),
            )

        shapes = [(1, *size, features)]
        if guide != "none":
            channels = 3 if guide == "image" else guide_features
            shapes.append((1, *(n * scale for n in size), channels))
        inputs = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        return cls(create, guide, inputs)

    def _abstract(self) -> tuple[Any, Any]:
        import jax
        from flax import nnx

        return jax.eval_shape(lambda: nnx.split(self.create()))

    @property
    def parameters(self) -> int:
        """Number of learned values."""
        import jax

        return sum(p.size for p in jax.tree.leaves(self._abstract()[1]))

    def forward(self, state: Any, *inputs: Any) -> Any:
        """The upsampler's output."""
        from flax import nnx

        return nnx.merge(self._abstract()[0], state)(*inputs)

    def gflop(self) -> float:
        """Operations of one call, without compiling it."""
        from resfu_jax.training import count_flops

        return count_flops(self.forward, self._abstract()[1], *self.inputs) / 1e9
