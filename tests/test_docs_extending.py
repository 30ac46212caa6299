"""The code and the commands of docs/extending.md and extending-sources.md run as they stand there, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch

from saekit import Sae
from tests.cli.conftest import saekit  # noqa: F401  # a fixture
from tests.plugins import ABS_TOPK, forget_plugins

PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("extending.md", "extending-sources.md")]
PAGE = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
SECTIONS = dict(re.findall(r"^## A (\w+):[^\n]*\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
SMALL = ["--max-tokens", "1024", "--num-latents", "64", "--k", "4", "--batch-size", "4", "--run-name", "run"]


@pytest.fixture(autouse=True)
def _apart():
    forget_plugins()
    yield
    forget_plugins()


@pytest.fixture
def page(saekit, model_dir, text_file, tmp_path):  # noqa: F811
    """`page("source")` writes the plug-in of a section, runs its other code and its commands, and returns both."""

    def filled(text):
        run = tmp_path / "checkpoints" / "run"
        return re.sub(
            r"\b(MODEL|DATASET|RUN)\b",
            lambda word: str({"MODEL": model_dir, "DATASET": text_file}.get(word[0], run)),
            text,
        )

    def call(section, *more):
        plugin, *others = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
        (file,) = set(re.findall(r"`(\w+\.py)`", SECTIONS[section])) - {"ddp.py"}
        (tmp_path / file).write_text(plugin, encoding="utf-8")
        names = {}
        for code in others:
            exec(filled(code), names)
        commands = re.findall(r"^    saekit (.*)$", SECTIONS[section], re.MULTILINE)
        done = []
        for command in commands:
            arguments = filled(command).split()
            small = {"train": [*SMALL, *more], "eval": ["--max-tokens", "256"], "plan": [*SMALL[2:6]]}
            done.append(saekit(*arguments, *small.get(arguments[0], [])))
            assert done[-1].code == 0, f"{command}: {done[-1].err}"
        return done, names

    return call


def test_a_selection(page, tmp_path):
    trained, evaluated, inspected = page("selection", "--layers", 1, "--ctx-len", 32)[0]
    assert "Resuming from" not in trained.err
    assert "layers.1" in evaluated.out
    assert "abs_topk" in inspected.out
    code = [line for line in ABS_TOPK.read_text().splitlines() if '"""' not in line]
    start = code.index("import torch")
    shown = [line for line in (tmp_path / "abs_topk.py").read_text().splitlines() if '"""' not in line]
    assert [line for line in shown if line] == [line for line in code[start:] if line], "it is the example"


def test_a_source(page, tmp_path):
    ((trained,), _) = page("source")
    assert "Reading activations from acts.safetensors" in trained.err
    (sae,) = Sae.load_many(tmp_path / "checkpoints" / "run").values()
    assert (sae.d_in, sae.num_latents) == (16, 64)


def test_a_placement(page):
    trained, planned = page("placement", "--layers", 1, "--ctx-len", 32)[0]
    assert re.search(r"Optimizers took \d+\.\d\d s", trained.err)
    assert "timed" in planned.out


def test_a_format(page, saekit, model_dir, text_file, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(tmp_path)
    done = saekit("train", model_dir, text_file, *SMALL, "--layers", 1, "--ctx-len", 32)
    assert done.code == 0, done.err
    sae, same = (page("format")[1][name] for name in ("sae", "same"))
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["sae.npz"]
    assert sae.sizes().keys() == same.sizes().keys()
    assert (same.k, same.max_norm) == (sae.k, sae.max_norm)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)
