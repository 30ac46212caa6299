import copy
from dataclasses import replace

import pytest
import torch

from saekit import Sae, SaeConfig, TrainConfig
from saekit.sae import normalize_decoder_, project_decoder_gradient_, sae_losses
from saekit.sae.kernels import choose_kernels, eager, torch_ops
from saekit.sae.kernels.eager import row_norms
from saekit.training.optimizers import base_lr, make_optimizer, rate_ratios
from saekit.training.signum import ScheduleFreeSignum
from tests.sae.adam import adam_settings
from tests.sae.native import needs_native

OPTIMIZERS = ["adam", "signum", pytest.param("adam8bit", marks=pytest.mark.filterwarnings("default")), "muon"]


def odds(step):
    return torch.tensor(eager.odds_of_step(step), dtype=torch.int32)


def make_sae(size=8):
    return Sae(size, 4 * size, 4, generator=torch.Generator().manual_seed(0))


def step_some(sae, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        for parameter in sae.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.prepare(1 / (number + 1))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "expected"), [("adam", 1.75e-3), ("adam8bit", 1.75e-3), ("signum", 5e-3), ("muon", 2e-3)]
)
def test_default_rates(name, expected):
    cfg = TrainConfig(optimizer=name)
    assert base_lr(cfg, 2**14, 128) == pytest.approx(expected)
    assert base_lr(cfg, 2**16, 128) == pytest.approx(expected if name == "muon" else expected / 2)
    assert base_lr(cfg, 2**14, 512) == pytest.approx(expected / 2 if name.startswith("adam") else expected)
    batchtopk = replace(cfg, sae=SaeConfig(activation="batchtopk"))
    assert base_lr(batchtopk, 2**14, 128) == pytest.approx(2 * expected if name.startswith("adam") else expected)
    assert base_lr(TrainConfig(optimizer=name, lr=0.5), 2**16, 512) == 0.5


@pytest.mark.parametrize("d_in", [32, 2048])
def test_by_default_rows_turn_and_biases_move_as_far_whatever_the_width(d_in):
    optimizer = make_optimizer(TrainConfig(), Sae(d_in, 64, 2)).optimizers[0]
    W_enc, W_dec, b_enc, _ = (group["lr"] for group in optimizer.param_groups)
    assert [W_enc * d_in**0.5, W_dec * d_in**0.5, b_enc] == pytest.approx([28e-3 * 2**3.5, 112e-3 * 2**3.5, 0.168])


def test_adam_is_adam():
    sae, twin = make_sae(), make_sae()
    optimizer = make_optimizer(TrainConfig(lr=0.01, decoder_lr_ratio=1, encoder_bias_lr_ratio=1, beta2=0.999), sae)
    plain = torch.optim.Adam(twin.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.5, 1.0, 0.25):
        for parameter, other in zip(sae.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            other.grad = parameter.grad.clone()
        optimizer.prepare(scale)
        optimizer.step()
        plain.param_groups[0]["lr"] = 0.01 * scale
        project_decoder_gradient_(twin)
        plain.step()
        normalize_decoder_(twin)
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
    optimizer.prepare(1.0)
    optimizer.step()
    for parameter, old in zip(sae.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old, rtol=1e-6, atol=0)  # renormalizing rounds


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("normalize", [True, False])
def test_decoder_rows_keep_norm_one_where_they_should(name, normalize):
    sae = Sae(8, 32, 4, normalize_decoder=normalize)
    optimizer = make_optimizer(TrainConfig(optimizer=name, lr=0.1), sae)
    step_some(sae, optimizer, 2, seed=3)
    ones = torch.ones(32)
    assert torch.allclose(sae.W_dec.norm(dim=1), ones, rtol=1e-5) == normalize
    assert not torch.allclose(sae.W_enc.norm(dim=1), ones, rtol=1e-5)


class TestAdamKernels:
    """Every backend's Adam against the formulas, and those against torch's."""

    def step_all(self, adam_, dtype, shape=(37, 5), unit_rows=True, steps=4):
        generator = torch.Generator().manual_seed(0)
        param = torch.randn(shape, generator=generator)
        if unit_rows:
            param[3] = 0  # such a row stays
            param /= row_norms(param)
        moments = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
        for step in range(1, steps + 1):
            grad = torch.randn(shape, generator=generator)
            if unit_rows:
                grad[3] = 0
            adam_(param, grad, *moments, **adam_settings(step, betas=(0.9, 0.999), unit_rows=unit_rows))
        return param, *moments

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("shape", "unit_rows"), [((37, 5), True), ((37, 5), False), ((41,), False), ((1, 1), False)]
    )
    def test_cpu_is_eager(self, dtype, shape, unit_rows, monkeypatch):
        expected = self.step_all(eager.adam_, dtype, shape, unit_rows)
        for block in (10**6, 7 * 5 * 4, 1):  # one block; some, the last one short; one for each row
            monkeypatch.setattr(torch_ops, "ADAM_BYTES", block)
            found = self.step_all(torch_ops.adam_, dtype, shape, unit_rows)
            # A bfloat16 moment that lies between two numbers may fall on either side.
            near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-3}
            torch.testing.assert_close(found, expected, **near)

    def test_moments_in_bfloat16_follow_those_in_float32(self):
        _, first, second = self.step_all(eager.adam_, torch.float32, (64, 64), False, steps=300)
        _, first16, second16 = self.step_all(torch_ops.adam_, torch.bfloat16, (64, 64), False, steps=300)
        assert (first16.float() - first).abs().mean() < 0.02 * first.abs().mean()
        ratio = second16.float() / second
        assert ratio.mean() == pytest.approx(1, abs=0.01)  # to nearest it would stand still far below
        assert ratio.std() < 0.05

    def test_rounding_has_no_mean_error_and_stays_between_the_neighbours(self):
        generator = torch.Generator().manual_seed(0)
        values = torch.rand(100_000, generator=generator) + 0.5
        noise = torch.randn(100_000, generator=generator)
        rounded = eager.round_stochastically(values, noise, odds(7)).float()
        assert ((rounded - values).abs() < 2**-7).all()
        assert (rounded - values).mean().abs() < 2e-5  # truncation: 2e-3
        constant = torch.full((100,), 0.7)
        over_steps = [
            eager.round_stochastically(constant, torch.zeros(100), odds(step)).float()[0] for step in range(2000)
        ]
        assert torch.stack(over_steps).mean() == pytest.approx(0.7, abs=3e-4)

    def test_moments_in_bfloat16_go_on_bit_for_bit(self):
        cfg = TrainConfig(moments_dtype="bf16", lr=0.01)
        sae = make_sae()
        optimizer = make_optimizer(cfg, sae)
        step_some(sae, optimizer, 3, seed=1)
        assert optimizer.state()["W_enc.exp_avg_sq"].dtype == torch.bfloat16
        resumed = make_sae()
        resumed.load_state_dict(sae.state_dict())
        other = make_optimizer(cfg, resumed)
        other.load_state({key: value.clone() for key, value in optimizer.state().items()})
        step_some(sae, optimizer, 3, seed=2)
        step_some(resumed, other, 3, seed=2)
        for one, two in zip(sae.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, two)


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
        optimizer.prepare()
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


@pytest.mark.parametrize("name", ["adam", "signum", "adam8bit", "muon"])
def test_rates_of_the_decoder_and_the_biases(name):
    """Their first step is theirs in size, whatever the gradient's."""
    sae = Sae(8, 32, 4, normalize_decoder=False, generator=torch.Generator().manual_seed(0))
    before = {key: value.detach().clone() for key, value in sae.named_parameters()}
    optimizer = make_optimizer(
        TrainConfig(optimizer=name, lr=1e-3, decoder_lr_ratio=3, encoder_bias_lr_ratio=6, beta2=0.9), sae, 50.0
    )
    step_some(sae, optimizer, 1, seed=3)
    moved = {key: float((value.detach() - before[key]).abs().mean()) for key, value in sae.named_parameters()}
    assert moved["W_dec"] == pytest.approx(3 * moved["W_enc"], rel=0.1)
    assert moved["b_enc"] == pytest.approx(0.3, rel=0.1 if name != "signum" else 0.2)
    assert moved["b_dec"] == pytest.approx(moved["b_enc"] / 6, rel=0.01)


def test_default_ratios_are_adams_alone():
    for name in ("adam", "adam8bit"):
        assert rate_ratios(TrainConfig(optimizer=name), 512) == (4, 12)
        assert rate_ratios(TrainConfig(optimizer=name, decoder_lr_ratio=1, encoder_bias_lr_ratio=2), 512) == (1, 2)
    for name in ("signum", "muon"):
        assert rate_ratios(TrainConfig(optimizer=name), 512) == (1, 1)


BACKENDS = [pytest.param("native", marks=needs_native), "cpu", "eager"]


class TestDeferredGradients:
    """Those that are left to the step, against those that are made."""

    N, D, M, K = 20, 32, 64, 4

    def sae(self, backend, prefixes=()):
        sae = Sae(self.D, self.M, self.K, generator=torch.Generator().manual_seed(0)).train()
        sae.chosen_kernels = choose_kernels(backend, "fp32", torch.device("cpu"))
        sae.prefixes = prefixes
        return sae

    def backward(self, sae, seed, tokens=N):
        x = torch.randn(tokens, self.D, generator=torch.Generator().manual_seed(seed))
        sae_losses(x, sae(x), scale=1 / tokens, auxk_alpha=0.0, num_dead=0).total.backward()

    def trained(self, backend, defers, passes=1, tokens=N, prefixes=(), **options):
        sae = self.sae(backend, prefixes)
        optimizer = make_optimizer(TrainConfig(**options), sae)
        if defers:
            optimizer.defer_gradients()
        for step in range(3):
            for number in range(passes):
                self.backward(sae, 10 * step + number, tokens)
            optimizer.prepare(1.0)
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.export() | optimizer.state()

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("options", [{}, {"prefixes": (16, 64)}, {"moments_dtype": "bf16"}, {"tokens": 65}])
    def test_train_the_same_bit_for_bit(self, backend, options):
        expected, found = (self.trained(backend, defers, **options) for defers in (False, True))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_several_passes_add_up(self, backend):
        expected, found = (self.trained(backend, defers, passes=3) for defers in (False, True))
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_are_in_no_tensor_of_the_matrix_size(self, backend):
        defers = backend != "eager"
        sae = self.sae(backend)
        optimizer = make_optimizer(TrainConfig(), sae)
        optimizer.defer_gradients()
        self.backward(sae, 0)
        assert len(optimizer.deferred()) == (2 if defers else 0)
        assert (sae.W_enc.grad is None) == (sae.W_dec.grad is None) == defers
        assert sae.b_enc.grad is not None
        optimizer.zero_grad()
        assert optimizer.deferred() == []

    @pytest.mark.parametrize(
        "options",
        [{"optimizer": "signum"}, {"grad_acc_steps": 2}, {"micro_acc_steps": 2}, {"auxk_alpha": 1 / 32}, "multi_topk"],
    )
    def test_are_made_where_they_are_sums_of_several(self, options):
        sae = self.sae("cpu")
        options = {"sae": SaeConfig(multi_topk=True)} if options == "multi_topk" else options
        optimizer = make_optimizer(TrainConfig(**options), sae)
        optimizer.defer_gradients()
        self.backward(sae, 0)
        assert optimizer.deferred() == []
        assert sae.W_enc.grad is not None


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_an_optimizer_that_has_not_stepped_has_a_state_to_go_on_from(optimizer):
    """As in a run whose steps have all been skipped so far."""
    fresh, other = (make_optimizer(TrainConfig(optimizer=optimizer), Sae(8, 16, 2)) for _ in range(2))
    other.load_state(fresh.state())
    other.prepare(1.0)
