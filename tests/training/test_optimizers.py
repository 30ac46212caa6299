import copy

import pytest
import torch

from saekit import Sae, TrainConfig
from saekit.training.optimizers import base_lr, make_optimizer
from saekit.training.signum import ScheduleFreeSignum

OPTIMIZERS = ["adam", "signum", pytest.param("adam8bit", marks=pytest.mark.filterwarnings("default")), "muon"]


def make_sae(size=8):
    return Sae(size, 4 * size, 4, generator=torch.Generator().manual_seed(0))


def step_some(sae, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        for parameter in sae.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(1 / (number + 1))
        optimizer.zero_grad()


@pytest.mark.parametrize(("name", "expected"), [("adam", 2e-4), ("adam8bit", 2e-4), ("signum", 5e-3), ("muon", 2e-3)])
def test_default_rates(name, expected):
    cfg = TrainConfig(optimizer=name)
    assert base_lr(cfg, 2**14) == pytest.approx(expected)
    assert base_lr(cfg, 2**16) == pytest.approx(expected if name == "muon" else expected / 2)
    assert base_lr(TrainConfig(optimizer=name, lr=0.5), 2**16) == 0.5


def test_adam_is_adam():
    sae, twin = make_sae(), make_sae()
    optimizer = make_optimizer(TrainConfig(lr=0.01), sae)
    plain = torch.optim.Adam(twin.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.5, 1.0, 0.25):
        for parameter, other in zip(sae.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            other.grad = parameter.grad.clone()
        optimizer.step(scale)
        plain.param_groups[0]["lr"] = 0.01 * scale
        plain.step()
    for parameter, other in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_round_trip_continues_bit_for_bit(name):
    size = 64  # adam8bit keeps small tensors in 32 bits: this makes both kinds
    cfg = TrainConfig(optimizer=name, lr=0.01)
    sae = make_sae(size)
    optimizer = make_optimizer(cfg, sae)
    step_some(sae, optimizer, 3, seed=1)
    state = {key: value.clone() for key, value in optimizer.state().items()}
    exported = {key: value.clone() for key, value in optimizer.export().items()}

    resumed = make_sae(size)
    resumed.load_state_dict(exported)
    other = make_optimizer(cfg, resumed)
    other.load_state(state)
    assert other.state().keys() == state.keys()
    for key, value in other.state().items():
        assert torch.equal(value, state[key]), key
    step_some(sae, optimizer, 3, seed=2)
    step_some(resumed, other, 3, seed=2)
    for key, value in optimizer.export().items():
        assert torch.equal(value, other.export()[key]), key


@pytest.mark.parametrize("name", ["adam", "signum", "muon"])
def test_no_optimizer_decays_weights(name):
    sae = make_sae()
    before = [parameter.detach().clone() for parameter in sae.parameters()]
    optimizer = make_optimizer(TrainConfig(optimizer=name, lr=0.1), sae)
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    for parameter, old in zip(sae.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_muon_steps_matrices_and_adam_biases():
    sae = make_sae()
    optimizer = make_optimizer(TrainConfig(optimizer="muon"), sae)
    step_some(sae, optimizer, 1, seed=0)
    keys = optimizer.state().keys()
    assert {"W_enc.momentum_buffer", "W_dec.momentum_buffer", "b_enc.exp_avg", "b_dec.exp_avg"} <= keys


def test_signum_follows_its_three_sequences():
    """Against x, y and z kept apart, in float64, with a changing learning rate."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = ScheduleFreeSignum([parameter], lr=0.1, beta=0.9)
    x, z = parameter.detach().clone(), parameter.detach().clone()
    weight_sum = 0.0
    for number in range(20):
        lr = 0.1 * min(1.0, (number + 1) / 5)
        optimizer.param_groups[0]["lr"] = lr
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(parameter.detach(), y)
        parameter.grad = 2 * parameter.detach()
        optimizer.step()
        z = z - lr * torch.sign(2 * y)
        weight_sum += lr**2
        c = lr**2 / weight_sum
        x = (1 - c) * x + c * z
        torch.testing.assert_close(optimizer.average(parameter), x)


def test_signum_exports_the_average_with_unit_rows():
    sae = make_sae()
    optimizer = make_optimizer(TrainConfig(optimizer="signum", lr=0.05), sae)
    step_some(sae, optimizer, 4, seed=0)
    exported = optimizer.export()
    torch.testing.assert_close(exported["W_dec"].norm(dim=1), torch.ones(32))
    trained = copy.deepcopy(sae.W_enc.detach())
    assert not torch.equal(exported["W_enc"], trained)
    assert torch.equal(optimizer.state()["W_enc.trained"], trained)
