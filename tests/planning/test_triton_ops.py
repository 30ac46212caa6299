"""The planner's copy of what the Triton backend allocates, beside that backend with its launches left out."""

import pytest
import torch

from saekit.planning.bank import _TritonOps
from saekit.planning.meter import Meter

pytest.importorskip("triton", reason="Triton is not installed on this system")
from saekit.sae.kernels import triton_ops  # tests/conftest.py has switched the interpreter on

SIZES = [(8192, 4096, 131072, 96), (2048, 768, 24579, 48), (33, 70, 301, 4), (4096, 4096, 65536, 384), (7, 5, 40, 30)]
"""N, D, M, K."""


class Launch:
    """Stands in for a kernel."""

    def __getitem__(self, _grid):
        return lambda *_, **__: None


@pytest.fixture(autouse=True)
def _without_launches(monkeypatch):
    for name in ("_maxima", "_members", "_gather_dot", "_gather_sum", "_segment_sum"):
        monkeypatch.setattr(triton_ops, name, Launch())


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def taken(ops, name, *work):
    """Bytes at the most, and of the result."""
    with Meter(on_gpu=True) as meter:
        result = getattr(ops, name)(*work)
        assert result is not None
        return meter.peak.total, meter.live.total


@pytest.mark.parametrize("size", SIZES)
class TestTaken:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("in_parts", [False, True])
    def test_topk(self, size, dtype, in_parts):
        N, D, M, K = size
        M, parts = (M // K * K, K) if in_parts else (M, 1)
        work = (empty(N, D), empty(M, D), empty(M), K, dtype, False, parts)
        planned, real = (taken(ops, "topk", *work) for ops in (_TritonOps(), triton_ops))
        assert planned[1] == real[1]
        assert planned[0] == pytest.approx(real[0], rel=0.005)  # what the chunk before found is still there

    def test_gathers_and_sums(self, size):
        N, D, M, K = size
        x, W, weights, indices = empty(N, D), empty(M, D), empty(N, K), empty(N, K, dtype=torch.int64)
        pairs = (empty(N * K), empty(N * K, dtype=torch.int64), empty(M + 1, dtype=torch.int64))
        for name, work in (
            ("gather_dot", (x, W, indices)),
            ("gather_sum", (weights, indices, W)),
            ("segment_sum", (*pairs, x)),
        ):
            planned, real = (taken(ops, name, *work) for ops in (_TritonOps(), triton_ops))
            assert planned == real, name
