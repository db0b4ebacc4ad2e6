"""What `pip install resfu_jax` alone can do, and what it says of the rest."""

import os
import pathlib
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from resfu_jax._extras import MissingExtra, extra

ROOT = pathlib.Path(__file__).parents[1]
FIVE = ("flax", "jax", "jaxtyping", "numpy", "safetensors")

# As if modules were not installed.
WITHOUT = """
import importlib.machinery, os, sys

ABSENT = os.environ["ABSENT"].split()

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in ABSENT
        return None if absent else super().find_spec(name, path, target)

sys.meta_path = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""

# After the README's first example.
PROMISED = """
import importlib, pkgutil, runpy
import jax.numpy as jnp
from safetensors.numpy import save_file

low = jnp.ones((1, 6, 5, 16))
up = resfu_jax.create_upsampler("resfu", features=16, guide_features=8, scale=4)
assert up(low, jnp.ones((1, 24, 20, 8))).shape == (1, 24, 20, 16)
assert resfu_jax.ops.resize(low, (10, 9), method="bicubic").shape == (1, 10, 9, 16)
for name in ("ops", "upsamplers", "backbones", "heads", "convert"):
    package = importlib.import_module(f"resfu_jax.{name}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
for name in ("features", "inference", "model", "preprocess", "serving"):
    importlib.import_module(f"resfu_jax.{name}")

state = {"weight": np.ones((3, 3, 4, 4), np.float32), "bias": np.ones(3, np.float32)}
save_file(state, "deconv.safetensors")
arguments = dict(in_channels=3, out_channels=3, kernel_size=4, stride=2, padding=1)
resfu_jax.from_torch("ConvTranspose2d", "deconv.safetensors", **arguments)
try:
    resfu_jax.load_upsampler("naf", state)
except ValueError as error:
    print(error)
"""

NEED_TRAIN = (
    *("data", "training", "tasks", "images", "predictor", "export", "visualize"),
    "self_supervised",
)
REST = f"""
for name in {NEED_TRAIN}:
    try:
        importlib.import_module("resfu_jax." + name)
    except ModuleNotFoundError as error:
        print(name, error, sep=": ")
try:
    resfu_jax.Predictor
except ModuleNotFoundError as error:
    print("Predictor", error, sep=": ")
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as stop:
    print("train.py", stop, sep=": ")
runpy.run_module("resfu_jax", run_name="__main__")
"""


def installed_with(*names):
    """The distributions that pip installs for these."""
    found, queue = set(), [(name, "") for name in names]
    while queue:
        name, own = queue.pop()
        if (key := (normal(name), own)) in found:
            continue
        found.add(key)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": own}):
                queue += [(requirement.name, extra) for extra in ("", *requirement.extras)]
    return {name for name, _ in found}


def normal(name):
    """A distribution's name as pip compares it."""
    return re.sub("[-_.]+", "-", name).lower()


def test_five_libraries_suffice(tmp_path):
    own = {*installed_with(*FIVE), "resfu-jax"}
    absent = [
        module
        for module, owners in metadata.packages_distributions().items()
        if own.isdisjoint(map(normal, owners))
    ]
    assert {"PIL", "grain", "tqdm", "tyro"} <= set(absent)
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)[:1]
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + example + PROMISED + REST],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ABSENT": " ".join(absent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr  # the command's, which is the last
    shape, misfit, *told = done.stdout.splitlines()
    assert shape == "(240, 320, 384)" and "does not fit NAF" in misfit
    assert [line.partition(":")[0] for line in told] == [*NEED_TRAIN, "Predictor", "train.py"]
    told += done.stderr.splitlines()
    assert len(told) == len(NEED_TRAIN) + 3
    for line in told:
        assert re.search(r": \w+ is not installed: pip install 'resfu_jax\[train\]'$", line), line


def test_other_modules_that_are_missing():
    with pytest.raises(ModuleNotFoundError, match="resfu_jax.nothing") as error, extra("train"):
        import resfu_jax.nothing  # noqa: F401
    assert not isinstance(error.value, MissingExtra)
    with pytest.raises(MissingExtra, match=r"resfu_jax\[hub\]"), extra("train"), extra("hub"):
        import nothing_like_it  # noqa: F401
