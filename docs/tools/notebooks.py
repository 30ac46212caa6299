"""Runs the notebooks of docs/tutorials and keeps their outputs.

    .venv/bin/python docs/tools/notebooks.py            # all of them, in order; or the names of some

Outputs are kept as plain text, without paths of this machine. The site shows the files as they are (`markdown`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
ORDER = ("first-sae", "features", "steering", "circuits", "ranks")
"""The second and third use the run of the first."""
SECONDS = 300
"""A cell's limit."""
MODEL = "saekit/demo/model"


def execute(
    notebook: Any, folder: Path, python: Sequence[str] = (sys.executable,), environment: Mapping[str, str] | None = None
) -> None:
    """Run a notebook's cells in a kernel of its own, which works in a folder; the outputs are put into the notebook.

    Args:
        notebook: As `nbformat.read` returns it.
        folder: Where its files go.
        python: The command that starts an interpreter.
        environment: Of the kernel; by default this process's.

    Raises:
        CellExecutionError: If a cell fails.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    command = [*python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]

    class OnlyThis(AsyncKernelManager):
        """Starts this kernel, whatever is installed."""

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=command, display_name="Python 3", language="python")

    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, kernel_manager_class=OnlyThis, timeout=SECONDS, resources=place)
    # Neither a bar nor tqdm's advice to install widgets is worth keeping.
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    client.execute(env={**(os.environ if environment is None else environment), **quiet})


def trim(notebook: Any) -> None:
    """Leave of outputs what is worth keeping: plain text, and no path of this machine."""
    from nbformat.v4 import new_output

    for number, cell in enumerate((each for each in notebook.cells if each.cell_type == "code"), start=1):
        cell.execution_count, cell.metadata = number, {}
        outputs = (each.text if each.output_type == "stream" else each.data["text/plain"] for each in cell.outputs)
        text = "\n".join(map(str.rstrip, "".join(outputs).replace(str(ROOT / MODEL), MODEL).splitlines())).strip("\n")
        cell.outputs = [new_output("stream", text=text + "\n")] if text else []


def markdown(notebook: Mapping[str, Any]) -> str:
    """Return a notebook as a page: cells of code with what they print below."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        shell = source.startswith("%%bash\n")
        parts.append(f"```{'bash' if shell else 'python'}\n{source.removeprefix('%%bash').strip()}\n```")
        for output in cell["outputs"]:
            parts.append(f"```{{.text .output}}\n{''.join(output['text']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run notebooks in an empty folder, and write them with their outputs."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=ORDER, help="such as first-sae")
    here = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    with tempfile.TemporaryDirectory() as folder:
        for name in parser.parse_args().names:
            file = FOLDER / f"{name}.ipynb"
            notebook = nbformat.read(file, as_version=4)
            execute(notebook, Path(folder), environment=here)
            trim(notebook)
            nbformat.write(notebook, file)


if __name__ == "__main__":
    main()
