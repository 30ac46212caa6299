"""Reading what a run left behind."""

import json

from safetensors.torch import load_file

from saekit.runs.metrics import read_metrics


def tensors_of(checkpoint):
    """Every tensor of a checkpoint, by file and name."""
    return {
        f"{file.parent.name}/{file.stem}/{name}": tensor
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def thresholds_of(checkpoint):
    """BatchTopK's threshold of each layer of a checkpoint, by hookpoint."""
    configs = {file.parent.name: json.loads(file.read_text("utf-8")) for file in sorted(checkpoint.glob("*/cfg.json"))}
    assert all(each["activation"] == "batchtopk" for each in configs.values())
    return {name: each["threshold"] for name, each in configs.items()}


def assert_same_tensors(found, expected, **tolerance):
    """Bit for bit, or within a tolerance."""
    import torch

    assert found.keys() == expected.keys()
    for name in expected:
        if tolerance:
            torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
        else:
            assert torch.equal(found[name], expected[name]), name


def metrics_of(run_dir):
    """The records of `metrics.jsonl` without what depends on the clock and the machine."""
    timed = {"time", "tokens_per_second", "memory_bytes"}
    return [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(run_dir / "metrics.jsonl")]
