"""A short run of the demo's language model, made once."""

import json

import pytest

from tests.placement.conftest import DEMO_LM


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory, forked):
    folder = tmp_path_factory.mktemp("eval")
    text = folder / "text.jsonl"
    lines = (json.dumps({"text": f"def f{n}(x):\n    return x + {n * n}\n"}) for n in range(3000))
    text.write_text("\n".join(lines), encoding="utf-8")
    options = ["--layers", "0,3", "--num-latents", 256, "--k", 8, "--ctx-len", 64, "--max-tokens", 8192]
    options += ["--eval-every", 6, "--eval-tokens", 512]
    command = ["train", DEMO_LM, text, *options, "--dtype", "float32", "--save-dir", folder, "--run-name", "run"]
    assert forked.run(command, None, folder / "said", folder, timeout=200) == [0], (folder / "said").read_text()
    return folder / "run"
