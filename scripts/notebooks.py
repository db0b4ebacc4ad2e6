"""Writes colab/*.ipynb from the scripts beside them, executed: a reader sees their figures.

    python -m scripts.notebooks                # all of them: 20 minutes on two CPU cores
    python -m scripts.notebooks 1_quickstart

Each runs in an empty folder, so that what it prints names no place of this machine, and again
prints the same. `RESFU_VIT_WEIGHTS` may name a file for 3_vit_features, in place of a download.
"""

import pathlib
import sys
import tempfile

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
COLAB = ROOT / "colab"


def execute(name: str, folder: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook of a script of colab/ with its outputs, run in `folder`.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    notebook = jupytext.read(COLAB / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)  # random ones would differ each time
    client = NotebookClient(
        notebook,
        kernel_name="python3",  # the interpreter that runs this
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def main() -> None:
    """Executes and stores the notebooks that are named on the command line, or all."""
    for name in sys.argv[1:] or sorted(path.stem for path in COLAB.glob("*.py")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(name, pathlib.Path(folder))
        # Not the version of the Python that was at hand.
        notebook.metadata = {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        }
        for cell in notebook.cells:
            if cell.cell_type == "code":  # without progress bars, and what XLA says of its hurry
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        nbformat.write(notebook, COLAB / f"{name}.ipynb")
        print(name)


if __name__ == "__main__":
    main()
