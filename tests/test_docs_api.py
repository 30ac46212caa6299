"""The examples of docs/api.md run as they stand there, on a tiny model."""

import re
from pathlib import Path

import saekit

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


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
