"""The notebooks of colab/: their scripts' cells, with outputs; what they install; that they run."""

import importlib.util
import pathlib
import re
import types

import jupytext
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from test_vit import WEIGHTS

from resfu_jax.data.fabricate import prepare_fabricated
from scripts.notebooks import execute

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def read(name):
    return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


def test_all_are_there():
    assert NAMES == ["1_quickstart", "2_train", "3_vit_features", "4_official_checkpoints"]
    assert NAMES == sorted(path.stem for path in (ROOT / "colab").glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_is_the_script(name):
    """`make notebooks` writes the notebook from the script."""
    script = jupytext.read(ROOT / "colab" / f"{name}.py")
    assert [(cell.cell_type, cell.source) for cell in read(name).cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]


def figures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.get("name") == "stderr" and "Warning" in o.text]
    found = [o for o in outputs if "image/png" in o.get("data", ())]
    assert len(found) == sum("plt.show()" in cell.source for cell in notebook.cells) > 0
    return found


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_with_what_it_shows(name):
    """At full size, by `make notebooks`; nothing of the machine on which that was."""
    notebook = read(name)
    figures(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    places = "home|root|tmp|work|usr|opt|var|mnt|Users"
    for output in (output for cell in code for output in cell.outputs):
        assert output.get("name") != "stderr"
        text = output.get("text") or output.data["text/plain"]
        assert not re.search(rf"(?<![\w.])/({places})/|it/s|s/it|\r|%\|", text), text
    assert (ROOT / "colab" / f"{name}.ipynb").stat().st_size < 400_000


@pytest.mark.parametrize("name", NAMES)
def test_says_its_run_time(name):
    assert "**Run time**: " in (title := read(name).cells[0].source) and "on two CPU cores" in title


def install(monkeypatch, origin, source=""):
    """Runs the first cell, where resfu_jax is a package of this origin: the arguments of pip."""
    cell = jupytext.read(ROOT / "colab" / "1_quickstart.py").cells[1].source
    assert cell.count('SOURCE = ""') == 1
    cell = cell.replace('SOURCE = ""', f"SOURCE = {source!r}")
    spec = origin and types.SimpleNamespace(origin=None if origin == "folder" else origin)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "resfu_jax" else find_spec(name)
    )
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
    commands, names = [], {}

    def magic(name, line):
        assert name == "pip"
        commands.append(line.format(**names))

    names["get_ipython"] = lambda: types.SimpleNamespace(run_line_magic=magic)
    exec(TransformerManager().transform_cell(cell), names)
    return commands


@pytest.mark.parametrize(
    "place, origin, source, found",
    [
        (".", "/site/resfu_jax/__init__.py", "", "installed"),
        (".", None, "", "resfu_jax-2-py3-none-any.whl"),
        ("beside", "folder", "", "resfu_jax"),  # the clone's own folder is a package, of nothing
        ("beside/resfu_jax/colab", None, "", ".."),
        (".", "/site/resfu_jax/__init__.py", "beside/resfu_jax", "beside/resfu_jax"),
        ("empty", None, "git+https://example.org/x", "git+https://example.org/x"),
    ],
)
def test_first_cell_takes_what_is_there(
    tmp_path, monkeypatch, capsys, place, origin, source, found
):
    for version in (1, 2):
        (tmp_path / f"resfu_jax-{version}-py3-none-any.whl").touch()
    package = tmp_path / "beside" / "resfu_jax" / "resfu_jax" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.touch()
    for folder in ("empty", "beside/resfu_jax/colab"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / place)
    commands = install(monkeypatch, origin, source)
    assert capsys.readouterr().out == f"resfu_jax 1.2.3: {found}\n"
    if found == "installed":
        assert commands == []
        return
    where = found if "://" in found else (tmp_path / place / found).resolve().as_uri()
    (command,) = commands
    assert command.startswith('install --quiet "jax[')
    assert command.endswith(f']>=0.10" "resfu_jax[notebooks] @ {where}"')


def test_first_cell_says_that_there_is_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="put a clone or a wheel of it beside this notebook"
    ):
        install(monkeypatch, None)


@pytest.mark.parametrize("name", NAMES)
def test_first_cell_is_that_of_all(name):
    assert read(name).cells[1].source == read(NAMES[0]).cells[1].source


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RESFU_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("RESFU_DATA_DIR", str(tmp_path / "datasets"))
    if "train" in name:  # test_train.py has all of `shapes` drawn; here a few images will do
        prepare_fabricated("shapes", tmp_path / "datasets", examples=16)
    monkeypatch.setenv("RESFU_VIT_WEIGHTS", str(WEIGHTS) if WEIGHTS.is_file() else "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    figures(execute(name, tmp_path))
