"""Golden tensors: inputs, weights, outputs and gradients measured on the official modules.

They are looked for in `$RESFU_GOLDENS`, then in `../shared/goldens` beside the checkout, then in
`tests/goldens/`, the copy of the small ones that a clone carries. Each array may come from the
first place that has its file, so that a clone alone proves parity too. Finding none is an error.
"""

import dataclasses
import functools
import json
import os
import pathlib

import numpy as np
import pytest

_HERE = pathlib.Path(__file__).resolve().parent
_PLACES = [
    pathlib.Path(p)
    for p in (
        os.environ.get("RESFU_GOLDENS"),
        _HERE.parent.parent / "shared" / "goldens",
        _HERE / "goldens",
    )
    if p and (pathlib.Path(p) / "index.json").is_file()
]


# What is compared with a golden: every form in float32 and in float64. On a CPU, None is the form
# "cpu" wherever that applies: it is compared by one name in each.
FORMS = {False: ("reference", "xla", None), True: ("reference", "xla", "cpu")}
forms = pytest.mark.parametrize(
    ("x64", "implementation"),
    [(x64, form) for x64, names in FORMS.items() for form in names],
    ids=[f"{'x64' if x64 else 'float32'}-{form}" for x64, names in FORMS.items() for form in names],
    indirect=["x64"],
)


@functools.cache
def index() -> dict[str, dict]:
    """Entries of `index.json` by golden name, only those whose file is present."""
    if not _PLACES:
        raise FileNotFoundError("no golden tensors: set RESFU_GOLDENS or restore tests/goldens/")
    entries: dict[str, dict] = {}
    for place in _PLACES:
        for e in json.loads((place / "index.json").read_text())["files"]:
            name = e["file"].removesuffix(".npz")
            if name not in entries and (place / e["file"]).is_file():
                entries[name] = e | {"path": place / e["file"]}
    return entries


def names(*prefixes: str) -> list[str]:
    """Golden names with one of the prefixes; an error if there is none."""
    found = sorted(n for n in index() if n.startswith(prefixes))
    if not found:
        raise FileNotFoundError(f"no golden tensors named {prefixes} in {_PLACES}")
    return found


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden file. `args` are the official arguments, `tol_out`/`tol_grad` the tolerances."""

    name: str
    args: dict
    meta: dict
    arrays: dict[str, np.ndarray]
    tol_out: float
    tol_grad: float

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays under `prefix/`, keyed by the rest of their name."""
        return {
            k[len(prefix) + 1 :]: v for k, v in self.arrays.items() if k.startswith(prefix + "/")
        }

    @property
    def zero_grads(self) -> set[str]:
        """Gradients that are mathematically zero."""
        return {f"grad/{z.removeprefix('grad/')}" for z in self.meta.get("zero_grads", [])}


def load(name: str, x64: bool = False) -> Golden:
    """Read a golden; with `x64` as float64 and with the tolerance of x64 mode."""
    entry = index()[name]
    with np.load(entry["path"]) as z:
        arrays = {k: z[k] for k in z.files if k != "meta"}
        meta = json.loads(str(z["meta"]))
    if x64:
        arrays = {
            k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in arrays.items()
        }
    tol = entry["suggested_rtol_float32"]
    return Golden(
        name=name,
        args=entry["args"],
        meta=meta,
        arrays=arrays,
        tol_out=5e-7 if x64 else tol["out"],
        tol_grad=5e-7 if x64 else tol["grad"],
    )


def nhwc(a: np.ndarray) -> np.ndarray:
    """The goldens are NCHW."""
    return np.moveaxis(a, 1, -1)


def assert_close(actual, expected, tol: float, what: str) -> None:
    """`max|a - b| / max|b| <= tol`, the metric that the goldens' tolerances are stated in."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, f"{what}: shape {a.shape}, expected {b.shape}"
    error = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)
    assert error <= tol, f"{what}: relative error {error:.2e} > {tol:.0e}"
