"""Imports point one way: read from the source, without importing anything."""

import ast
import pathlib
import re
import sys
import tomllib
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "resfu_jax"
OPS = PACKAGE / "ops"
FILES = sorted(PACKAGE.rglob("*.py"))
# What `pip install resfu_jax` promises; the rest of the package needs an extra.
BARE = ("ops", "upsamplers", "backbones", "heads", "convert")
BARE_FILES = (
    "features",
    "inference",
    "model",
    "preprocess",
    "serving",
)  # and those that begin with _
# What users copy from, and so has to do with public names.
USERS = [
    ROOT / "train.py",
    *sorted(f for d in ("scripts", "benchmarks") for f in (ROOT / d).rglob("*.py")),
]


def imports(path):
    """Absolute names of all that a file imports, wherever in it: modules, and names of modules."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, *modules):
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def of(*folders):
    return [f for f in FILES if any(PACKAGE / folder in f.parents for folder in folders)]


def refuse(files, wrong):
    found = [f"{f.relative_to(ROOT)}: {name}" for f in files for name in imports(f) if wrong(name)]
    assert not found, "\n".join(found)


def test_ops_know_no_modules():
    """Linen, Equinox and plain JAX users stop there."""
    others = {f"resfu_jax.{p.stem}" for p in PACKAGE.iterdir() if p.stem != "ops"}
    refuse(of("ops"), lambda name: within(name, "flax", *others))


def test_nothing_reaches_into_ops():
    outside = [f for f in FILES if OPS not in f.parents]
    refuse([*outside, *USERS], lambda name: name.startswith("resfu_jax.ops._"))


def test_forms_do_not_know_their_ops():
    """Only the public file of an op chooses among its forms."""
    forms = of("ops/_cpu", "ops/_xla", "ops/_pallas")
    assert forms
    refuse(forms, lambda name: within(name, "resfu_jax.ops._forms.Forms"))


@pytest.mark.parametrize(
    ("folder", "unknown"),
    [
        ("upsamplers", ("backbones", "heads", "model", "data", "training", "cli", "convert")),
        ("backbones", ("upsamplers", "heads", "model", "data", "training", "cli", "convert")),
        ("heads", ("model", "data", "training", "cli", "convert")),
        ("data", ("upsamplers", "backbones", "heads", "model", "training", "cli", "convert")),
        ("training", ("tasks", "cli")),
        ("tasks", ("cli",)),
    ],
)
def test_imports_point_down(folder, unknown):
    refuse(of(folder), lambda name: within(name, *(f"resfu_jax.{module}" for module in unknown)))


def test_what_the_package_does_not_import():
    """Configs are a user's; PyTorch and TensorFlow are not needed."""
    refuse(FILES, lambda name: within(name, "configs", "torch", "tensorflow", "train"))


def test_the_backend_is_never_asked():
    """Forms are chosen for the platform that a program is lowered for, not for this machine's."""
    for path in FILES:
        names = (
            getattr(n, "attr", getattr(n, "id", None))
            for n in ast.walk(ast.parse(path.read_text()))
        )
        assert "default_backend" not in names, path


def test_the_package_imports_what_it_declares():
    """`pip install resfu_jax` brings five libraries, and upsampling imports no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return {re.match(r"[\w-]+", text)[0].replace("_", "-").lower() for text in requirements}

    bare = names(project["dependencies"])
    assert bare == {"flax", "jax", "jaxtyping", "numpy", "safetensors"}
    extras = project["optional-dependencies"]
    users = extras.keys() - {"bench", "dev", "notebooks", "targets"}
    everything = bare.union(*(names(extras[name]) for name in users))
    # Imported where they are used, and done without, or named in an error.
    late = {"_download": {"tqdm"}, "_files": {"huggingface-hub"}, "serving": {"pillow"}}
    owners = metadata.packages_distributions()
    for path in FILES:
        top = path.parent == PACKAGE and (path.stem.startswith("_") or path.stem in BARE_FILES)
        promised = top or path in of(*BARE)
        for module in {name.partition(".")[0] for name in imports(path)}:
            if module == "resfu_jax" or module in sys.stdlib_module_names:
                continue
            allowed = bare | late.get(path.stem, set()) if promised else everything
            wrong = f"{path.relative_to(ROOT)} imports {module}"
            assert names(owners.get(module, [module])) & allowed, wrong
