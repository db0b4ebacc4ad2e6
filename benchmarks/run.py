"""Times ReSFU's two forms against each other, in turn, in one process.

    python -m benchmarks.run [--workloads segmenter dino] [--runs 7]

Prints for each workload and direction the median milliseconds of both forms and their ratio, and
XLA's temporary memory, which is exact. Times are of compiled and warmed-up calls.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from resfu_jax import create_upsampler

# name: features, their size, ratio, channels of the guide
WORKLOADS = {
    "shapes": (64, (8, 8), 4, 64),
    "segformer": (256, (32, 32), 4, 256),
    "segmenter": (384, (32, 32), 4, 32),
    "dino": (384, (28, 28), 16, 32),
}
FORMS = ("polyphase", "reference")


def compiled(workload: str, form: str, backward: bool):
    """The compiled call of one form and its arguments."""
    channels, (h, w), scale, guide_channels = WORKLOADS[workload]
    up = create_upsampler(
        "resfu", features=channels, guide_features=guide_channels, scale=scale, implementation=form
    )
    graphdef, params = nnx.split(up)

    def forward(params, x, guide):
        return nnx.merge(graphdef, params)(x, guide)

    def forward_backward(params, x, guide, cotangent):
        return jax.vjp(forward, params, x, guide)[1](cotangent)

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, h, w, channels), (1, h * scale, w * scale, guide_channels)]
    shapes += [(1, h * scale, w * scale, channels)] if backward else []
    arrays = [jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=False)]
    f = jax.jit(forward_backward if backward else forward)
    return f.lower(params, *arrays).compile(), (params, *arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=["shapes", "segmenter"]
    )
    parser.add_argument("--runs", type=int, default=7, help="timed calls of each form")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, float32, batch 1")
    print(
        f"{'workload':10} {'direction':17} {'form':10} {'ms':>8} {'temporary MB':>13} {'ratio':>6}"
    )
    for workload in args.workloads:
        for backward in (False, True):
            calls = [compiled(workload, form, backward) for form in FORMS]
            times: list[list[float]] = [[] for _ in FORMS]
            for run in range(args.runs + 1):
                for (f, arrays), t in zip(calls, times, strict=True):
                    start = time.perf_counter()
                    jax.block_until_ready(f(*arrays))
                    if run:  # the first call warms up
                        t.append(1e3 * (time.perf_counter() - start))
            best = statistics.median(times[0])
            for form, (f, _), t in zip(FORMS, calls, times, strict=True):
                megabytes = f.memory_analysis().temp_size_in_bytes / 1e6
                median = statistics.median(t)
                direction = "forward+backward" if backward else "forward"
                print(
                    f"{workload:10} {direction:17} {form:10} {median:8.1f} {megabytes:13.1f} "
                    f"{median / best:6.2f}"
                )


if __name__ == "__main__":
    main()
