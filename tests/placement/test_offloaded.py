"""Masters, moments and gradients on the CPU while SAEs compute on a GPU: zero3 with an offloaded optimizer."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saekit import Sae, TrainConfig
from saekit.placement.deepspeed import settings
from saekit.placement.shards import share_masters
from saekit.sae.kernels.sparse import Sparse
from saekit.training.optimizers import make_optimizer
from tests.placement.conftest import STEPS
from tests.placement.test_equivalence import assert_same_run
from tests.training.runs import metrics_of

DRILL = Path(__file__).with_name("offloaded.py")


def test_kernels_for_a_gpu_leave_offloaded_parameters_to_the_cpu(monkeypatch):
    """Under zero3 with an offloaded optimizer. What Triton says of a CPU's tensors is said here without a GPU."""
    triton_ops = pytest.importorskip("saekit.sae.kernels.triton_ops")
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)

    def refuse(*args, **settings):
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    for name in ("adam_", "segment_sum"):
        monkeypatch.setattr(triton_ops, name, refuse)
    sae, twin = (Sae(8, 32, 4, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    sae.chosen_kernels = Sparse("triton", triton_ops)
    for each in (sae, twin):
        optimizer = make_optimizer(TrainConfig(lr=0.01), each)
        for step in range(3):
            for parameter in each.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * step)
            optimizer.prepare(1)
            optimizer.step()
    for parameter, other in zip(sae.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("gpu", [False, True])
def test_what_is_offloaded_from_a_gpu_is_pinned(monkeypatch, gpu):
    """Gradients on their way out and weights that stay there, by DeepSpeed; master weights on their way back, by us."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    zero = settings({"offload_optimizer": "cpu", "offload_param": "none"})["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": gpu}
    assert "offload_param" not in zero

    pinned = SimpleNamespace()
    memory = SimpleNamespace(pin_memory=lambda: pinned)
    masters = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, data=memory)
    here = torch.device("cuda" if gpu else "cpu")
    shards = SimpleNamespace(device=here, dtype=torch.float32, data=SimpleNamespace())
    share_masters(SimpleNamespace(fp16_partitioned_groups_flat=[shards], fp32_partitioned_groups_flat=[masters]))
    assert masters.data is (pinned if gpu else shards.data)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "offload"), [(1, "optimizer"), (3, "optimizer,param")])  # 3 cuts rows apart
def test_offloading_changes_no_number(train, gpt2_dir, ranks, offload):
    found = train(gpt2_dir, "--placement", "zero3", "--offload", offload, ranks=ranks, script=DRILL)
    assert_same_run(found, train(gpt2_dir))


@pytest.mark.slow
def test_a_gradient_with_nan_and_a_finite_loss_costs_one_step(train, gpt2_dir):
    """Of a layer that is not the first to run, on one rank only."""
    bad = ["--bad-gradient", "6:h.1"]
    options = ["--placement", "zero3", "--offload", "optimizer", "--grad-acc-steps", 2]
    found = train(gpt2_dir, *options, *bad, batch_size=3, ranks=2, script=DRILL)
    assert [each["skipped_steps"] for each in metrics_of(found)] == [0] * 5 + [1] * (STEPS - 5)
    assert "step 6 was skipped: NaN or Inf in the gradient of h.1\n" in (found / "stderr.txt").read_text()
    assert_same_run(found, train(gpt2_dir, *bad, script=DRILL))
