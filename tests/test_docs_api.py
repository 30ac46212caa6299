"""The examples of docs/api.md and README.md run as they stand there, on a tiny model."""

import re
from pathlib import Path

import torch

import saekit

PAGES = Path(__file__).parents[1] / "docs"
PAGE = (PAGES / "api.md").read_text(encoding="utf-8")


def test_the_examples_run(model_dir, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text.jsonl").symlink_to(text_file)
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 5
    names = {}
    for example in examples:
        exec(example.replace("EleutherAI/pythia-70m", str(model_dir)), names)
    said = capsys.readouterr().out
    assert "layers.2: FVU 0." in said
    assert f"{model_dir} 64 16" in said
    assert names["logits"].shape[1] == names["acts"].shape[1] == names["output"].indices.shape[1]
    assert sorted(folder.name for folder in Path("checkpoints").iterdir())[:2] == ["by-trainer", "from-memory"]


def test_the_page_names_the_whole_api():
    table = PAGE[PAGE.index("| name |") : PAGE.index("## Train")]
    named = {name for line in table.split("\n|")[1:] for name in re.findall(r"`(\w+)`", line.split("|")[0])}
    assert named == set(saekit.__all__) - {"__version__"}


def test_the_readmes_example_runs(model_dir, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text.jsonl").symlink_to(text_file)
    (example,) = re.findall(r"```python\n(.*?)```", (PAGES.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    small = {
        "EleutherAI/pythia-70m": str(model_dir),
        "[2, 3], k=32": "[1, 2], k=16, ctx_len=64, batch_size=4, max_tokens=4096",
        "layers.3": "layers.2",
    }
    for shown, run in small.items():
        assert shown in example
        example = example.replace(shown, run)
    acts = torch.randn(2, 3, 16)
    names = {"acts": acts}
    exec(example, names)
    assert names["output"].recon.shape == acts.shape
    assert names["output"].indices.shape == (2, 3, 16)
    assert [layer.hookpoint for layer in names["results"].layers] == ["layers.1", "layers.2"]


def test_the_readme_is_read_in_a_minute():
    text = (PAGES.parent / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 600
    for command in (
        "make demo",
        "make test",
        "saekit train MODEL DATASET",
        "saekit inspect checkpoints/RUN",
        "accelerate launch --config_file accelerate_configs/zero3.yaml -m saekit train",
    ):
        assert command in text
