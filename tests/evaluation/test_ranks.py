"""Real ranks that share out an evaluation find what one process finds."""

import json
import subprocess
import sys

import pytest

from saekit.layout import EVAL_FILE
from tests.placement.conftest import DEMO_LM
from tests.placement.test_zero3 import torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    text = folder / "text.jsonl"
    lines = (json.dumps({"text": f"def f{n}(x):\n    return x + {n * n}\n"}) for n in range(3000))
    text.write_text("\n".join(lines), encoding="utf-8")
    options = ["--layers", "0,3", "--num-latents", 256, "--k", 8, "--ctx-len", 64, "--max-tokens", 8192]
    command = [sys.executable, "-m", "saekit", "train", DEMO_LM, text, *options, "--dtype", "float32"]
    command += ["--save-dir", folder, "--run-name", "run"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, cwd=folder)
    return folder / "run"


def numbers(record):
    """All numbers by their path, as a flat mapping."""
    if isinstance(record, dict):
        pairs = record.items()
    elif isinstance(record, list):
        pairs = enumerate(record)
    else:
        return {(): record}
    return {(key, *path): value for key, inner in pairs for path, value in numbers(inner).items()}


def test_two_ranks(run):
    arguments = ["-m", "saekit", "eval", run, "--max-tokens", 3200, "--batch-size", 4, "--json"]
    alone = torchrun(*arguments, ranks=1)
    assert alone.returncode == 0, alone.stderr
    one = numbers(json.loads(alone.stdout))
    together = torchrun(*arguments, ranks=2)
    assert together.returncode == 0, together.stderr
    two = numbers(json.loads(together.stdout))
    assert two == numbers(json.loads((run / "latest" / EVAL_FILE).read_text("utf-8")))
    assert one.keys() == two.keys()
    assert one[("sequences",)] == 50
    for path, value in one.items():
        if path != ("date",):
            assert two[path] == (pytest.approx(value, rel=1e-5, abs=1e-7) if isinstance(value, float) else value), path
