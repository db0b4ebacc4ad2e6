"""Writes colab/*.ipynb from the scripts beside them, executed: a reader sees their figures.

    python -m scripts.notebooks                # all of them: 20 minutes on two CPU cores
    python -m scripts.notebooks 1_quickstart

Each runs in an empty folder, with datasets of its own. `RESFU_VIT_WEIGHTS` may name a file for
3_vit_features, in place of a download.
"""

import base64
import io
import os
import pathlib
import sys
import tempfile

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

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


def clean(notebook: nbformat.NotebookNode, folder: str) -> None:
    """Leaves of the outputs what tells a reader something, in few bytes.

    Progress bars go, and what else went to stderr; `folder`, where the notebook ran; the version of
    Python that was at hand. Figures keep 256 colours.
    """
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
    }
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [
            output
            for output in cell.outputs
            if output.get("name") != "stderr"
            and "application/vnd.jupyter.widget-view+json" not in output.get("data", ())
        ]
        for output in cell.outputs:
            if "text" in output:
                output.text = output.text.replace(f"{folder}/", "")
            if "image/png" in output.get("data", ()):
                output.data["image/png"] = with_fewer_colors(output.data["image/png"])


def with_fewer_colors(png: str) -> str:
    """A PNG in base64: half as large, and hardly to be told from the original."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256).save(small := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main() -> None:
    """Executes and stores the notebooks that are named on the command line, or all."""
    for name in sys.argv[1:] or sorted(path.stem for path in COLAB.glob("*.py")):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["RESFU_DATA_DIR"] = f"{folder}/datasets"
            notebook = execute(name, pathlib.Path(folder))
        clean(notebook, folder)
        nbformat.write(notebook, COLAB / f"{name}.ipynb")
        print(name)


if __name__ == "__main__":
    main()
