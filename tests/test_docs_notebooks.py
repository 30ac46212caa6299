"""The notebooks of docs/tutorials run, print what they print in the repository, and what their texts say is true."""

import importlib.util
import json
import os
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "tools" / "notebooks.py")
notebooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(notebooks)

CLAIMS = {
    "first-sae": """
fvus = [report["layers"]["layers.4"]["fvu"] for report in reports]
assert fvus[0] > fvus[len(fvus) // 2] > fvus[-1]
assert layer.reconstruction.fvu.value < 0.35
assert layer.grafted.ce_recovered.value > 0.8, "most of the CE"
assert code.indices.shape == (1, input_ids.shape[1], 16), "each token has 16 active latents"
""",
    "features": """
assert "]" in tokenizer.decode(lens_MV[latent].argmax())
assert inside["all tokens"] < 0.1 < inside["it fires"] < inside["it fires strongly"]
assert inside["it fires strongly"] > 0.8, "the guess holds where it fires strongly"
""",
    "steering": """
steps = [chance_of_bracket(prompt, times * activation) for times in (-1, 0, 1, 2)]
assert 5 * steps[0] < steps[1], "without it the model all but forgets"
assert steps[1] < steps[2], "with more of it, the bracket comes sooner"
assert chances == sorted(chances) and chances[0] < 0.05 < 0.3 < chances[-1], "rises with every step"
assert tokenizer.decode(written[0]).endswith("]]")
""",
    "circuits": """
assert [*early.reads, *early.writes, *late.reads, *late.writes] == [
    "layers.2.mlp:in", "layers.2.mlp", "layers.4.mlp:in", "layers.4.mlp"
]
predicted = part_M[strongest]
assert torch.corrcoef(torch.stack([predicted, torch.tensor(measured)]))[0, 1] > 0.3
assert part_M.sum() > 0 and torch.isclose(part_M.sum(), fed_TM[token, latent], atol=1e-3)
""",
    "ranks": """
assert difference("ddp") < 1e-5 and difference("layer-map") < 1e-5, "agree up to rounding"
for name in runs:
    assert list(runs[name]) == ["layers.2", "layers.3"]
""",
}
"""By notebook, code that runs at its end."""
MACHINE = re.compile(r"/(?:tmp|home|root|Users|var|usr|opt|work)/|[A-Z]:\\")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all of them work: some use runs of others."""
    return tmp_path_factory.mktemp("notebooks")


def committed(name):
    return json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def test_all_of_them_are_here():
    assert sorted(notebooks.ORDER) == sorted(CLAIMS) == sorted(file.stem for file in notebooks.FOLDER.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("name", notebooks.ORDER)
def test_a_notebook_runs_and_its_text_is_true(name, folder, forked):
    notebook = nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)
    kept = [bool(said(cell)) for cell in notebook.cells]
    notebook.cells.append(nbformat.v4.new_code_cell(CLAIMS[name]))
    environment = forked.environment(PATH=f"{forked.commands}{os.pathsep}{os.environ['PATH']}")
    notebooks.execute(notebook, folder, [str(forked.python)], environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    errors = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert re.sub(r"\rLoading weights:[^\r\n]*|\n", "", errors) == "", "no warning"
    notebooks.trim(notebook)
    assert all(said(cell) for cell, printed in zip(notebook.cells, kept, strict=False) if printed)


def said(cell):
    return [line for output in cell.get("outputs", []) for line in "".join(output.get("text", "")).splitlines()]


@pytest.mark.parametrize("name", notebooks.ORDER)
def test_what_is_kept_is_plain_and_short(name):
    cells = [cell for cell in committed(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert [output["output_type"] for output in cell["outputs"]] in ([], ["stream"])
        assert len(said(cell)) <= 30
        assert [line for line in said(cell) if MACHINE.search(line) or "\x1b" in line] == []
    assert any(said(cell) for cell in cells)


def test_a_page_has_code_and_what_it_prints():
    page = notebooks.markdown(committed("ranks"))
    assert page.startswith("# Several ranks\n")
    assert "```bash\nsaekit train --config run.yaml" in page
    assert re.search(r"```\{\.text \.output\}\n[^`]*ddp +\d\.\de-\d\d\n", page)
