"""Every notebook is executed, with small numbers in place of its cell of parameters."""

import ast
import base64
import os
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

SMALL = {
    "01_quickstart": """
size, volumes, channels, folder = 16, 4, [4, 8], "runs"
pretrain_steps, probe_steps, finetune_steps, test_volumes = 1, 2, 2, 3
""",
    "02_z_matching": "size, volumes, channels, steps = 16, 4, [4, 8], 20",
    "03_your_own_data": """
folder, scans, labels, new_scans = "runs", "scans", "labels", "new_scans"
class_names = ["background", "heart", "great vessels"]
label_values = {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2}
spacing, patch, channels = 6.0, 16, [4, 8]
generated, labelled, pretrain_steps, finetune_steps = 8, 7, 1, 2
""",
    "04_compare_methods": """
out, size, channels, test_volumes = "runs", 16, [4, 8], 3
pretrain_steps, transfer_steps = 2, 2
seeds, methods, modes = [0], ["Scratch", "GVSL"], ["linear"]
""",
    "05_subclassing": """
folder, size, volumes, width = "runs", 16, 4, 4
match_steps, octant_steps = 1, 2
""",
}
"""Parameters with which a notebook runs in seconds."""

FIGURES = {
    "01_quickstart": ["hearts", "matching", "compare", "sheet"],
    "02_z_matching": [
        *("draw_pair", "draw_affine", "draw_deformable", "draw_jacobian", "draw_colours", "browse")
    ],
    "03_your_own_data": ["prepare", "matching", "sheet", "show_prediction"],
    "04_compare_methods": ["convergence", "tsne", "ncc"],
    "05_subclassing": ["curves", "recognise"],
}
"""Cells that show a figure."""


class Executed:
    """A notebook that has run to its end.

    Args:
        path: the notebook.
        folder: where it runs.
        parameters: code in place of its cell of parameters; None: that cell.
        client: with a kernel that several notebooks share; None: the notebook has its own.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        parameters: str | None = None,
        client: NotebookClient | None = None,
    ) -> None:
        notebook: Any = nbformat.read(path, nbformat.NO_CONVERT)
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
        if parameters is not None:
            assert assigned(parameters) == assigned(cell.source)
            cell.source = parameters
        start = os.times()
        if client is None:
            client = NotebookClient(notebook, timeout=1200)
            with client.setup_kernel():  # unlike `execute`, it registers nothing for the exit
                execute(client, notebook, folder)
        else:
            execute(client, notebook, folder)
        end = os.times()
        self.seconds = end.elapsed - start.elapsed
        before, after = (one.children_user + one.children_system for one in (start, end))
        self.cpu_seconds = after - before
        self.outputs = {cell.id: cell.get("outputs", []) for cell in notebook.cells}

    @property
    def figures(self) -> list[str]:
        """Cells that show a picture which is not an empty page."""
        return [
            cell
            for cell, outputs in self.outputs.items()
            for output in outputs
            if len(base64.b64decode(output.get("data", {}).get("image/png", ""))) > 5000
        ]

    def printed(self, cell: str) -> str:
        """The text that a cell prints."""
        return "".join(one.text for one in self.outputs[cell] if one.get("name") == "stdout")

    def numbers(self, cell: str) -> dict[str, list[float]]:
        """The numbers in each line that a cell prints, by what stands before its colon."""
        lines = (line.partition(":") for line in self.printed(cell).splitlines())
        return {
            name: [float(number) for number in re.findall(r"-?\d+\.\d+", rest)]
            for name, _, rest in lines
        }


def execute(client: NotebookClient, notebook: Any, folder: Path) -> None:
    """Run all cells in a folder, with no names but those of the notebook."""
    # multiprocessing asks for __spec__
    code = f"%reset -f\n__spec__ = None\nimport os\nos.chdir({str(folder)!r})"
    begin = nbformat.v4.new_code_cell(code)
    client.nb = notebook
    client.reset_execution_trackers()
    client.nb.cells.insert(0, begin)
    for index, cell in enumerate(notebook.cells):
        client.execute_cell(cell, index)
    del notebook.cells[0]


@pytest.fixture(scope="module")
def shared() -> Iterator[NotebookClient]:
    """A kernel for several notebooks, in which runs of a benchmark are forks."""
    notebook = nbformat.v4.new_notebook()
    client = NotebookClient(notebook, timeout=1200)
    with client.setup_kernel():
        notebook.cells.append(nbformat.v4.new_code_cell(FORKS))
        client.execute_cell(notebook.cells[0], 0)
        yield client


FORKS = f"""
import multiprocessing, sys
multiprocessing.set_forkserver_preload(["gvsl_lightning.cli.main"])
sys.path.insert(0, {str(Path(__file__).parent)!r})
import forked, gvsl_lightning.runs.processes
gvsl_lightning.runs.processes.run = forked.run
"""


def assigned(source: str) -> set[str]:
    """Names that get a value."""
    return {
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path: Path) -> None:
    notebook: Any = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.metadata.keys() <= {"tags"}
        if cell.cell_type == "code":
            stored = (cell.execution_count, cell.outputs)
            assert stored == (None, []), f"{path.name}, {cell.id}: clear the outputs, and save"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    notebook: Any = nbformat.read(path, nbformat.NO_CONVERT)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https:")]
    assert any(link.startswith("#") for link in links)
    for link in links:
        if link.startswith("#"):  # in the documentation, the page of this object
            found = pkgutil.resolve_name(link[1:])
            assert f"{found.__module__}.{found.__qualname__}" == link[1:]
        else:
            assert (path.parent / link).is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_with_small_numbers(path: Path, tmp_path: Path, shared: NotebookClient) -> None:
    executed = Executed(path, tmp_path, SMALL[path.stem], shared)
    assert executed.figures == FIGURES[path.stem]
    match path.stem:
        case "01_quickstart":
            dice = {**executed.numbers("probe"), **executed.numbers("compare")}
            names = ["probe_untrained", "probe_pretrained", "from_scratch", "finetuned"]
            assert list(dice) == names
            assert all(0 < score < 1 for (score,) in dice.values())
        case "02_z_matching":
            (ncc,) = executed.numbers("measure").values()
            assert ncc[-1] > ncc[0]
        case "03_your_own_data":
            assert executed.printed("show_prediction").splitlines() == [
                *("patient_009.nii.gz (41, 47, 48)", "patient_011.nii.gz (37, 37, 46)")
            ]
        case "04_compare_methods":
            (table,) = (output.data["text/markdown"] for output in executed.outputs["table"])
            assert re.search(r"^\| GVSL \| \d+\.\d", table, flags=re.MULTILINE)
            assert executed.printed("results").startswith("3 runs, ")
        case "05_subclassing":
            assert "weights without gradient: 0" in executed.printed("check_backbone")
            assert len(executed.numbers("curves")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_keeps_its_promises(path: Path, tmp_path: Path) -> None:
    executed = Executed(path, tmp_path)
    print(f"\n{path.stem}: {executed.seconds:.0f} s, {executed.cpu_seconds:.0f} s of CPU time")
    assert executed.figures == FIGURES[path.stem]
    match path.stem:
        case "01_quickstart":
            # a busy machine stretches the one, a second thread the other
            assert min(executed.seconds, executed.cpu_seconds) < 600
            before, after = executed.numbers("matching")["NCC of the validation pairs"]
            assert after > before
            dice = executed.numbers("probe")
            assert dice["probe_pretrained"] > dice["probe_untrained"]
        case "02_z_matching":
            (ncc,) = executed.numbers("measure").values()
            assert ncc == sorted(ncc)
        case "05_subclassing":
            for similarity in ("NCC", "edges"):
                before, after = executed.numbers("curves")[f"trained by {similarity}, NCC"]
                assert after > before
            recognised, chance = executed.numbers("recognise")["octants recognised"]
            assert recognised > 4 * chance
