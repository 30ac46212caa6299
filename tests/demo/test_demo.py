"""The demo: what ships, and that it runs."""

import json

import pytest

from saekit.activations import model_shape
from saekit.activations.chosen import chosen
from saekit.demo import MODEL_DIR, standard_library
from saekit.errors import UserError
from saekit.runs.metrics import read_metrics
from tests.cli.conftest import saekit  # noqa: F401  # a fixture


def test_the_package_data_is_small():
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    assert "nats per token" in (MODEL_DIR / "README.md").read_text()


def test_there_is_text_on_every_machine():
    documents = list(standard_library())
    assert len(documents) > 200
    assert sum(map(len, documents)) > 2_000_000


@pytest.mark.parametrize("transcode", [False, True])
def test_what_it_trains(transcode, tmp_path, monkeypatch, saekit):  # noqa: F811
    asked = []

    def train(cfg):
        asked.append(cfg)
        raise UserError("enough")

    monkeypatch.setattr("saekit.training.launch.train_from_config", train)
    done = saekit("demo", *(["--transcode"] if transcode else []))
    assert done.code == 2
    (cfg,) = asked
    assert cfg.train.coder == ("transcoder" if transcode else "SAE")
    sites = chosen(cfg.train, model_shape(cfg.model)).sites
    assert [site.name for site in sites] == [f"layers.{i}{'.mlp' if transcode else ''}" for i in range(6)]
    assert (tmp_path / "saekit-demo" / "stdlib.jsonl").is_file()


SMALL = """
import sys
from itertools import islice

from saekit.cli import first_steps, main
from saekit.config import RunConfig

text, config = first_steps.standard_library, RunConfig.from_flat
first_steps.standard_library = lambda: islice(text(), 40)
RunConfig.from_flat = lambda values: config({**values, "num_latents": 1024})
sys.argv = ["saekit", "demo", "--max-tokens", "12000"]
main()
"""
"""The demo on a twentieth of its text, and with a quarter of its latents, which are what takes long."""


@pytest.mark.slow
def test_the_demo_from_start_to_end(tmp_path, forked):
    done = forked.complete("-c", SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "What to try next" in done.stderr
    assert "layers.5" in done.stdout
    run = tmp_path / "saekit-demo" / "run-1"
    assert (run / "report.html").is_file()
    records = read_metrics(run / "metrics.jsonl")
    assert all(layer["fvu"] < 0.5 for layer in records[-1]["layers"].values())
    assert records[0]["layers"]["layers.3"]["fvu"] > 1.3 * records[-1]["layers"]["layers.3"]["fvu"]

    # What it says of each layer is what `saekit eval` says, too.
    evaluation = json.loads((run / "latest" / "eval.json").read_text())
    assert evaluation["held_out"] is True
    command = ["eval", run, "--max-tokens", 12000 // 7, "--json"]
    again = json.loads(forked.complete("-m", "saekit", *command, cwd=tmp_path).stdout)
    assert {**again, "date": ""} == {**evaluation, "date": ""}
    for layer in evaluation["layers"]:
        assert f"{layer['reconstruction']['fvu']['value']:.4f}" in done.stdout
        assert f"{layer['grafted']['ce_recovered']['value']:.4f}" in done.stdout
