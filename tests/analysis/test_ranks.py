"""Real ranks that share out an evaluation find what one process finds."""

import json

import pytest

from saekit.runs.layout import EVAL_FILE
from tests.placement.conftest import torchrun

pytestmark = pytest.mark.slow


def numbers(record):
    """All numbers by their path, as a flat mapping."""
    if isinstance(record, dict):
        pairs = record.items()
    elif isinstance(record, list):
        pairs = enumerate(record)
    else:
        return {(): record}
    return {(key, *path): value for key, inner in pairs for path, value in numbers(inner).items()}


def test_two_ranks(demo_run, forked, tmp_path):
    arguments = ["eval", demo_run, "--max-tokens", 3200, "--batch-size", 4, "--json"]
    assert forked.run(arguments, None, tmp_path / "alone", tmp_path, 200) == [0], (tmp_path / "alone").read_text()
    one = numbers(json.loads((demo_run / "latest" / EVAL_FILE).read_text("utf-8")))
    together = torchrun(forked, "-m", "saekit", *arguments, ranks=2)
    assert together.returncode == 0, together.stderr
    two = numbers(json.loads(together.stdout))
    assert two == numbers(json.loads((demo_run / "latest" / EVAL_FILE).read_text("utf-8")))
    assert one.keys() == two.keys()
    assert one[("sequences",)] == 50
    for path, value in one.items():
        if path != ("date",):
            assert two[path] == (pytest.approx(value, rel=1e-5, abs=1e-7) if isinstance(value, float) else value), path
