"""Run notebooks from a clean kernel and keep their outputs.

    python notebooks/run.py [NOTEBOOK ...]

Without arguments, all of them.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def run(path: Path) -> nbformat.NotebookNode:
    """Execute a notebook in its own folder; an error in a cell is an error here."""
    notebook = nbformat.read(path, as_version=4)
    # Pyro imports tqdm.auto, which warns in a notebook where ipywidgets are not installed; nothing here needs them.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress")
    # The networks are small: threads would wait for each other, and on a busy machine for a long time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # One output for all that a cell prints, whenever it prints it: the committed files do not depend on timing.
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", coalesce_streams=True)
    client.resources = {"metadata": {"path": str(HERE)}}
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which would differ at every run
    return notebook


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(run(path), path)
        print(f"{path.name}: done")
