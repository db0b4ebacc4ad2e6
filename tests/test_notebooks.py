"""The notebooks of colab/: equal to their scripts, ready for Colab, and running, at small size."""

import pathlib
import tomllib

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from test_vit import WEIGHTS

from resfu_jax.data.fabricate import prepare_fabricated

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["project"]["urls"]["Repository"]
COLAB = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")


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


@pytest.mark.parametrize("name", NAMES)
def test_has_no_outputs(name):
    for cell in read(name).cells:
        assert cell.cell_type == "markdown" or not cell.outputs and cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_opens_in_colab_and_says_its_run_time(name):
    title, install = read(name).cells[:2]
    assert f"({COLAB}/blob/main/colab/{name}.ipynb)" in title.source
    assert "**Run time**: " in title.source and "on two CPU cores" in title.source
    assert install.source.startswith("# Install.")
    assert 'if find_spec("resfu_jax") is None:' in install.source
    assert REPOSITORY in install.source and "%pip install" in install.source
    text = (ROOT / "colab" / "README.md").read_text()
    assert f"({COLAB}/blob/main/colab/{name}.ipynb)" in text


@pytest.mark.parametrize("name", NAMES)
def test_links_to_this_repository(name):
    """The repository's place is told once, in pyproject.toml; all links follow it."""
    for cell in read(name).cells:
        for word in cell.source.split():
            if "resfu_jax" in word and "github" in word:
                assert REPOSITORY in word or COLAB in word, word


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RESFU_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("RESFU_DATA_DIR", str(tmp_path / "datasets"))
    if "train" in name:  # test_train.py has all of `shapes` drawn; here a few images will do
        prepare_fabricated("shapes", tmp_path / "datasets", examples=16)
    monkeypatch.setenv("RESFU_VIT_WEIGHTS", str(WEIGHTS) if WEIGHTS.is_file() else "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(name)
    # "python3" is the interpreter that runs this test.
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [o.text for o in outputs if o.get("name") == "stderr" and "Warning" in o.text]
    figures = [o for o in outputs if "image/png" in o.get("data", ())]
    assert len(figures) == sum("plt.show()" in cell.source for cell in notebook.cells) > 0
