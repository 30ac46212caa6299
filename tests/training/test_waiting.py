"""How often the host asks the device for numbers, and what it does meanwhile. On a GPU each question stops the work."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from saekit import Sae, TrainConfig
from saekit.activations.live import LiveModel, Micro, to_device
from saekit.activations.source import Steps
from saekit.errors import Interrupted
from saekit.placement.ddp import Ddp
from saekit.placement.world import World
from saekit.training.message import read_later
from saekit.training.optimizers import make_optimizer
from saekit.training.saving import Saver
from saekit.training.trainer import train_step
from tests.training.conftest import Recorder, StopAfter
from tests.training.runs import assert_same_tensors, tensors_of

ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}


class Questions(TorchDispatchMode):
    """Counts the operations whose result, or its size, the host must know."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        self.asked += name in ASKING or by_mask
        return func(*args, **(kwargs or {}))


def questions_of_a_step(make_trainer, monkeypatch, name, **options):
    """Between the messages of two steps without a report or a checkpoint."""
    from saekit.training import bank as module

    so_far, real = [], read_later
    with Questions() as questions:
        monkeypatch.setattr(module, "read_later", lambda value: so_far.append(questions.asked) or real(value))
        make_trainer(name, log_every=99, save_every=99, **options).fit()
    return so_far[3] - so_far[2]


@pytest.mark.parametrize("auxk", [{"auxk_alpha": 0.0}, {"auxk_alpha": 1 / 32, "dead_feature_threshold": 1}])
@pytest.mark.parametrize("multiple", [0, 10])
def test_no_layer_is_asked_for_anything_in_a_step(make_trainer, monkeypatch, auxk, multiple):
    options = {**auxk, "max_norm_multiple": multiple}
    one = questions_of_a_step(make_trainer, monkeypatch, "one", layers=[1], **options)
    three = questions_of_a_step(make_trainer, monkeypatch, "three", **options)
    adams_own = 4  # of each layer: the number of steps of each parameter, which lies on the CPU
    too_long = 1 if multiple else 0  # whether an activation is, which is read on a CPU only (`without_excluded`)
    assert three - one == 2 * (adams_own + too_long)


@pytest.mark.parametrize("log_every", [1, 3])
def test_the_host_is_told_once_a_step(make_trainer, monkeypatch, log_every):
    """The report is part of the step's message: nothing else is brought to the host."""
    from saekit.training import bank as module

    messages, real = [], module.read_later
    monkeypatch.setattr(module, "read_later", lambda value: messages.append(value.numel()) or real(value))
    monkeypatch.setattr(module.Bank, "report", None)
    recorder = Recorder()
    make_trainer(reporter=recorder, log_every=log_every).fit()
    units, steps = 3, 7
    plain = units + units * 8  # dead latents; and of each unit faults, dead ones now and before, error, firings, tokens
    with_report = plain + 2 * (units * 7 + units * 16)
    reported = [step % log_every == 0 or step == steps for step in range(1, steps + 1)]
    assert messages == [with_report if report else plain for report in reported]
    assert len(recorder.steps) == sum(reported)


@pytest.mark.parametrize("grad_acc_steps", [1, 2])
def test_to_begin_the_next_forward_early_changes_nothing(make_trainer, monkeypatch, grad_acc_steps):
    options = {"grad_acc_steps": grad_acc_steps, "save_every": 3}
    expected = tensors_of(make_trainer("in_turn", **options).fit())
    begun, real = [], LiveModel.prefetch
    monkeypatch.setattr(LiveModel, "runs_behind", True)
    monkeypatch.setattr(LiveModel, "prefetch", lambda self, batch: begun.append(1) or real(self, batch))
    recorder = Recorder()
    assert_same_tensors(tensors_of(make_trainer("early", reporter=recorder, **options).fit()), expected)
    steps = len(recorder.steps)
    assert len(begun) == sum(step % 3 != 0 for step in range(1, steps))  # not before what is saved, nor after the end


def test_a_save_on_a_signal_has_the_memory_of_what_was_begun(make_trainer, monkeypatch):
    begun, held, save = [], [], Saver.save_last
    monkeypatch.setattr(LiveModel, "runs_behind", True)
    trainer = make_trainer(reporter=StopAfter(3), save_every=99)
    prefetch = trainer.source.prefetch
    monkeypatch.setattr(trainer.source, "prefetch", lambda batch: begun.append(1) or prefetch(batch))
    monkeypatch.setattr(Saver, "save_last", lambda self: held.append(trainer.source._begun) or save(self))
    with pytest.raises(Interrupted):
        trainer.fit()
    assert len(begun) == 3, "the step after the last one, too"
    assert held == [None]


@pytest.mark.parametrize("travelling", [False, True])
def test_the_next_forward_is_begun_before_gradients_that_travel_are_waited_for(travelling):
    order = []
    placement = SimpleNamespace(
        exchange=lambda numbers: [numbers],
        travelling=lambda: travelling,
        collect=lambda: order.append("collect"),
        apply=lambda lr_scale: order.append("apply"),
    )
    message = SimpleNamespace(faults={})
    bank = SimpleNamespace(
        placement=placement,
        begin_=lambda tokens: None,
        finish=lambda gradients, report: lambda: order.append("read") or message,
        advance_=lambda message: None,
    )
    train_step(bank, None, [], 1.0, meanwhile=lambda: order.append("begin next"))
    first = ["begin next", "collect"] if travelling else ["collect", "begin next"]
    assert order == [*first, "read", "apply"]


def test_gradients_travel_under_ddp_until_they_are_collected():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        placement = Ddp(World(0, 2, torch.device("cpu"), None, None, None))
        placement.place(["h.0"], lambda _, *, blank: Sae(4, 8, 2), lambda sae: make_optimizer(TrainConfig(), sae))
        for last in (False, True):
            assert not placement.travelling()
            assert [name for name, _ in placement.route({"h.0": torch.zeros(1, 4)}, last)] == ["h.0"]
        assert placement.travelling()
        placement.collect()
        assert not placement.travelling()
    finally:
        dist.destroy_process_group()


def test_a_step_that_was_begun_comes_once():
    begun = []
    source = SimpleNamespace(read=lambda step: [10 * step], prefetch=begun.append)
    with Steps(source, 0, 3).open() as steps:
        assert next(steps) == (0, [0])
        steps.begin_next()
        assert begun == [10]
        assert [next(steps), next(steps)] == [(1, [10]), (2, [20])]
        steps.begin_next()
        assert next(steps, None) is None
    assert begun == [10]


def test_what_was_begun_is_handed_out_once(monkeypatch):
    """And only for the batch that it was begun for."""
    computed = []
    monkeypatch.setattr(LiveModel, "_run", lambda self, batch: computed.append(batch) or (batch,))
    source = LiveModel.__new__(LiveModel)
    source._begun = None
    first, second = Micro(range(1), torch.zeros(1, 2), True), Micro(range(1), torch.ones(1, 2), True)
    source.prefetch(first)
    assert [id(each) for each in computed] == [id(first)]
    assert source(second)[0] is second
    assert source(first)[0] is first
    assert len(computed) == 2
    source(first)
    assert len(computed) == 3


def test_numbers_arrive_on_the_host():
    assert read_later(torch.tensor([1, 2]))().tolist() == [1, 2]
    assert to_device(torch.tensor([3]), torch.device("cpu")).tolist() == [3]
