"""Writes docs/api.md: every public name, its signature and the first line of its docstring.

    python -m scripts.api_reference

It reads the source, so that the page does not depend on versions of Python or of libraries.
"""

import ast
import functools
import importlib
import importlib.util
import pathlib
from typing import Any

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
# Modules, with the heading of each.
MODULES = {
    "resfu_jax": "the package itself",
    "resfu_jax.ops": "pure functions of arrays",
    "resfu_jax.upsamplers": "upsamplers and their registry",
    "resfu_jax.backbones": "images to feature maps",
    "resfu_jax.heads": "feature maps to logits",
    "resfu_jax.model": "backbone and head",
    "resfu_jax.preprocess": "what is done to an image first",
    "resfu_jax.inference": "whole images, windows, views",
    "resfu_jax.predictor": "images of any size to labels",
    "resfu_jax.depth": "images of any size to depths",
    "resfu_jax.matting": "photos and trimaps to mattes",
    "resfu_jax.normals": "depths to surface normals",
    "resfu_jax.export": "models as files",
    "resfu_jax.serving": "loads them, without model code",
    "resfu_jax.visualize": "pictures of features and weights",
    "resfu_jax.probe": "what a classifier reads off features",
    "resfu_jax.explain": "what a classifier looked at, on upsampled activations",
    "resfu_jax.convert": "official weights",
    "resfu_jax.data": "datasets and the input pipeline",
    "resfu_jax.training": "what a training script composes",
}
_INTRO = """\
# API reference

Made by `python -m scripts.api_reference` from the source: public names, signatures, and the first
line of each docstring. `help(name)` has the rest: arguments, shapes, errors.
"""


def reference() -> str:
    """The page."""
    parts = [_INTRO]
    for name, what in MODULES.items():
        parts.append(f"\n## `{name}`: {what}\n")
        module = importlib.import_module(name)
        parts += [_entry(module, public) for public in _public(module)]
    return "\n".join(parts) + "\n"


def _public(module: Any) -> list[str]:
    """A module's `__all__`, or else what it defines itself without an underscore."""
    names = getattr(module, "__all__", None) or [
        name
        for name, node in _definitions(module.__name__).items()
        if not name.startswith("_") and isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    return sorted(names, key=str.lower)


def _entry(module: Any, name: str) -> str:
    """A line of the page for one name."""
    home = _home(module, name)
    node = None if home is None else _definitions(home)[name]
    if isinstance(node, ast.FunctionDef):
        return _line(f"{name}{_signature(node)}", node)
    if isinstance(node, ast.ClassDef):
        return _line(f"class {name}{_constructor(node, home)}", node)
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        value = ast.unparse(node.value)
        return f"- `{name}`" if len(value) > 80 else f"- `{name} = {value}`"
    return f"- `{name}`: a module"


def _line(code: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    doc = ast.get_docstring(node)
    return f"- `{code}`" + (f"<br>{doc.splitlines()[0]}" if doc else "")


def _home(module: Any, name: str) -> str | None:
    """The module of the package in which a module's name is defined."""
    here = module.__name__
    while name not in (found := _definitions(here)):
        home = found.get("import " + name) or getattr(module, "_HOMES", {}).get(name)
        if home is None:
            return None
        here = home
    return here


@functools.cache
def _definitions(module: str) -> dict[str, Any]:
    """What stands at a module's top level, by name; for an import, where it comes from."""
    found: dict[str, Any] = {}
    body = ast.parse(_source(module).read_text()).body
    # Imports of libraries of an extra, and of modules that need them, stand in a `with`.
    for node in (n for top in body for n in (top.body if isinstance(top, ast.With) else [top])):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.Assign):
            found |= {t.id: node for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resfu_jax."):
            found |= {"import " + (a.asname or a.name): node.module for a in node.names}
    return found


def _source(module: str) -> pathlib.Path:
    path = importlib.util.find_spec(module).origin
    return pathlib.Path(path)


def _signature(node: ast.FunctionDef) -> str:
    arguments = node.args
    for group in (arguments.posonlyargs, arguments.args):
        if group and group[0].arg in ("self", "cls"):
            del group[0]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name[0] != "_" else ""
    return f"({ast.unparse(arguments)}){returns}"


def _constructor(node: ast.ClassDef, module: str) -> str:
    """Arguments of a class: of its `__init__` or its base's, or the fields of a dataclass."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _signature(item)
    for base in (b.id for b in node.bases if isinstance(b, ast.Name)):
        home = _home(importlib.import_module(module), base)
        found = None if home is None else _definitions(home)[base]
        if home is not None and isinstance(found, ast.ClassDef):
            return _constructor(found, home)
    fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
    return f"({', '.join(fields)})"


if __name__ == "__main__":
    PAGE.write_text(reference())
