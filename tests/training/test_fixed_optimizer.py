"""The step of Adam and Signum is a fixed graph: the same operations on the same memory, whatever the step."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saekit import Sae, TrainConfig
from saekit.sae import sae_losses
from saekit.sae.kernels import choose_kernels
from saekit.training.optimizers import make_optimizer

CPU = torch.device("cpu")
N, D, M, K = 20, 32, 64, 4
KINDS = [
    *(
        pytest.param("adam", backend, moments, id=f"adam-{backend}-{moments}")
        for backend in ("eager", "cpu")
        for moments in ("fp32", "bf16")
    ),
    pytest.param("signum", "cpu", "fp32", id="signum"),
]


class Operations(TorchDispatchMode):
    """Records what a GPU would replay: operations, their arguments, and where their inputs lie in memory.

    Numbers from Python are arguments. Tensors made of such numbers count by their values, and tensors that were there
    before by their places, since a replayed operation would see the same again.
    """

    def __init__(self):
        super().__init__()
        self.found, self._made = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note an operation, and run it."""
        if func.namespace == "profiler":
            return func(*args, **(kwargs or {}))
        given = [self._place(each) if isinstance(each, torch.Tensor) else each for each in tree_leaves((args, kwargs))]
        if func is torch.ops.aten.lift_fresh.default:  # `torch.tensor(number)`
            given = args[0].tolist()
        self.found.append((str(func), given))
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and not self._existed(each, args, kwargs):
                self._made[each.untyped_storage()._cdata] = (len(self._made), each)  # alive, so that no other is there
        return out

    def _place(self, tensor):
        made = self._made.get(tensor.untyped_storage()._cdata)
        return (tensor.shape, tensor.dtype, made[0] if made else tensor.data_ptr())

    @staticmethod
    def _existed(tensor, args, kwargs):
        storages = [each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)]
        return tensor.untyped_storage()._cdata in storages


def make(name, backend, moments, unit_rows):
    sae = Sae(D, M, K, normalize_decoder=unit_rows, generator=torch.Generator().manual_seed(0)).train()
    sae.chosen_kernels = choose_kernels(backend, "fp32", CPU)
    return sae, make_optimizer(TrainConfig(optimizer=name, moments_dtype=moments, lr=0.01), sae)


def backward(sae, seed):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed))
    sae_losses(x, sae(x), scale=1 / N, auxk_alpha=0.0, num_dead=0).total.backward()


@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize(("name", "backend", "moments"), KINDS)
def test_a_step_neither_reads_numbers_nor_depends_on_them(name, backend, moments, unit_rows):
    sae, optimizer = make(name, backend, moments, unit_rows)
    backward(sae, 0)
    optimizer.prepare(0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer.step()


def test_nor_does_a_step_that_sums_its_gradients():
    sae, optimizer = make("adam", "cpu", "fp32", True)
    optimizer.defer_gradients()
    backward(sae, 0)
    assert len(optimizer.deferred()) == 2
    optimizer.prepare(0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer.step()


@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize(("name", "backend", "moments"), KINDS)
def test_all_steps_are_the_same_operations_on_the_same_memory(name, backend, moments, unit_rows):
    sae, optimizer = make(name, backend, moments, unit_rows)
    gradients = {parameter: torch.zeros_like(parameter) for parameter in sae.parameters()}
    recorded = {}
    for step in range(1, 6):
        sae.zero_grad()
        backward(sae, step)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient.copy_(parameter.grad)
        optimizer.prepare(1 / step)
        with Operations() as operations:
            optimizer.step()
        recorded[step] = operations.found
    assert len(recorded[1]) > 10
    assert recorded[1] == recorded[2] == recorded[5]


@pytest.mark.parametrize(("name", "backend", "moments"), KINDS)
def test_what_is_prepared_moves_on(name, backend, moments):
    """Without it, the numbers of the last step would be used again."""
    once, twice = make(name, backend, moments, True), make(name, backend, moments, True)
    for (sae, optimizer), scales in ((once, (1.0, 1.0)), (twice, (1.0, 0.5))):
        for seed, scale in enumerate(scales):
            sae.zero_grad()
            backward(sae, seed)
            optimizer.prepare(scale)
            optimizer.step()
    for one, other in zip(once[0].parameters(), twice[0].parameters(), strict=True):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["adam", "signum"])
def test_a_step_that_was_not_prepared_is_refused(name):
    sae, optimizer = make(name, "cpu", "fp32", True)
    backward(sae, 0)
    with pytest.raises(AssertionError, match="`prepare` comes before `step`"):
        optimizer.step()
