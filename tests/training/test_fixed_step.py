"""A unit's step is a fixed graph: no host read, no shape that depends on data, no Python number that changes."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from saekit import Sae, SaeConfig, TrainConfig
from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import autoencoder
from saekit.placement import Single
from saekit.planning.bank import on_meta
from saekit.sae.kernels import choose_kernels
from saekit.training.bank import Bank
from saekit.training.message import StepMessage
from saekit.training.optimizers import make_optimizer
from saekit.training.plan import UnitPlan
from saekit.training.unit import Calibration

D, M, K, N = 16, 64, 4, 24
CPU = torch.device("cpu")
KINDS = {
    "topk": ({}, {}),
    "batchtopk": ({"activation": "batchtopk"}, {}),
    "groupmax": ({"activation": "groupmax"}, {}),
    "matryoshka": ({"matryoshka": (0.25, 1.0)}, {}),
    "matryoshka batchtopk": ({"matryoshka": (0.25, 1.0), "activation": "batchtopk"}, {}),
    "multi-topk": ({"multi_topk": True}, {}),
    "signum": ({}, {"optimizer": "signum"}),
    "bfloat16 moments": ({}, {"moments_dtype": "bf16"}),
    "no revival, any norm": ({}, {"revive_alpha": 0.0, "max_norm_multiple": 0.0}),
}


def make_bank(units=1, kernels=None, sae=None, **options):
    """Units with random weights in one process, of which no host may be asked anything, as if on a GPU."""
    cfg = TrainConfig(sae=SaeConfig(num_latents=M, k=K, **(sae or {})), **{"lr": 1e-3, **options})
    widths = {f"layers.{number}": D for number in range(units)}
    limit = 1e3 if cfg.max_norm_multiple > 0 else None

    def make_sae(name):
        made = Sae(**cfg.sae.sizes(D, M), max_norm=limit).train()
        made.chosen_kernels = kernels or choose_kernels("eager", "fp32", CPU)
        made.prefixes = cfg.sae.resolve_prefixes(M)
        return made

    placement = Single(CPU)
    placement.place(list(widths), make_sae, lambda made: make_optimizer(cfg, made))
    known = {name: Calibration(torch.zeros(D), 1.0, limit) for name in widths}
    plans = [UnitPlan(autoencoder(Hookpoint(name, D)), M, 0.0, (1.0, 1.0), dead_threshold=40) for name in widths]
    bank = Bank(cfg, placement, plans, known)
    for unit in bank.units.values():
        unit.may_sync = False
    return bank


class Step:
    """One step of a bank in its three parts: what the host prepares, the units' own work, and the bank's."""

    def __init__(self, bank, tokens, chunks, mask=None):
        self.bank, self.tokens, self.chunks, self.mask = bank, tokens, chunks, mask

    def begin(self):
        self.bank.begin_(self.tokens)
        for optimizer in self.bank.placement._optimizers.values():
            optimizer.prepare(0.5)

    def units(self):
        for unit, chunk_ND in zip(self.bank.units.values(), self.chunks, strict=True):
            unit.run_(chunk_ND, self.mask)
        self.gradients = self.bank.placement.collect()
        for optimizer in self.bank.placement._optimizers.values():
            optimizer.step()
        self.bank.placement.skip()

    def finish(self):
        self.bank.finish(self.gradients)
        self.bank.advance_(StepMessage(self.tokens, {}, dict.fromkeys(self.bank.names, 0)))

    def run(self):
        self.begin()
        self.units()
        self.finish()


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_asks_for_no_number_and_no_shape(kind, kernels):
    """With tensors that have no numbers, any host read and any shape that depends on data is an error."""
    sae, options = KINDS[kind]
    bank = make_bank(sae=sae, kernels=None if kernels == "eager" else on_meta(kernels, torch.bfloat16), **options)
    step = Step(bank, 20, [torch.randn(N, D)], torch.ones(N, 1, dtype=torch.bool))
    step.begin()
    with FakeTensorMode(allow_non_fake_inputs=True):
        step.units()
        step.finish()


def test_fake_tensors_notice_a_host_read():
    bank = make_bank()
    bank.units["layers.0"].may_sync = True  # whether a norm is too long, as on a CPU
    step = Step(bank, 20, [torch.randn(N, D)])
    step.begin()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        step.units()


class Operations(TorchDispatchMode):
    """Notes every operation with its arguments that are not tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves, _ = tree_flatten((args, kwargs or {}))
        plain = tuple(
            tuple(each.shape) if isinstance(each, torch.Tensor) else str(each) for each in leaves if each is not None
        )
        self.seen.append((str(func), plain))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_the_same_operations_with_the_same_numbers(kind):
    sae, options = KINDS[kind]
    torch.manual_seed(0)
    bank = make_bank(sae=sae, **options)
    seen = []
    for number in range(4):
        step = Step(bank, 20 - number, [torch.randn(N, D)], (torch.rand(N, 1) < 0.8))
        step.begin()
        with Operations() as operations:
            step.units()
            step.finish()
        seen.append(operations.seen)
    assert seen[1] == seen[2] == seen[3], "the first one makes the optimizer's state"


@pytest.mark.parametrize("sae", [{}, {"activation": "batchtopk"}], ids=["topk", "batchtopk"])
def test_the_banks_own_operations_do_not_grow_with_the_units(sae):
    torch.manual_seed(0)
    counts = []
    for units in (2, 24):
        bank = make_bank(units, sae=sae)
        step = Step(bank, N, [torch.randn(N, D) for _ in range(units)])
        step.run()
        step.begin_ = bank.begin_
        with Operations() as operations:
            bank.begin_(N)
        own = operations.seen
        step.units()
        with Operations() as operations:
            step.finish()
        counts.append(Counter(name for name, _ in own + operations.seen))
    assert counts[0] == counts[1]
    assert counts[0].total() < 120, "views included"


def test_masked_tokens_train_as_dropped_ones_do():
    """The same numbers to rounding, whichever way excluded tokens are kept out."""
    torch.manual_seed(0)
    x_ND, counted_N = torch.randn(3, N, D), torch.rand(N) < 0.7
    found = []
    for masked in (True, False):
        torch.manual_seed(1)
        bank = make_bank(sae={"activation": "batchtopk"}, max_norm_multiple=10, scale_biases=False)
        for chunk_ND in x_ND:
            chunk_ND = chunk_ND.clone()
            chunk_ND[~counted_N] = 50.0
            rows, mask = (chunk_ND, counted_N[:, None]) if masked else (chunk_ND[counted_N], None)
            Step(bank, int(counted_N.sum()), [rows], mask).run()
        unit = bank.units["layers.0"]
        found.append([*unit.sae.parameters(), unit.sae.selection.threshold, bank.report()["layers.0"].fvu])
        found[-1] += [bank.since_fired_F, bank.fire_count_F]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
