"""Evaluations between optimizer steps, in this process: what they find, and that nothing else notices them."""

import io
import json
import os
import random
import signal
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from saekit import Sae, SaeConfig, SaeTrainer, TrainConfig, UserError
from saekit.activations import find_blocks
from saekit.analysis.evaluate import evaluate
from saekit.analysis.subject import Subject, next_token
from saekit.data import sequences
from saekit.errors import Interrupted
from saekit.placement import Single
from saekit.report import Reporters
from saekit.runs.metrics import EVALUATION, plain, read_metrics
from tests.training.conftest import CTX_LEN, SETTINGS, Recorder, StopAfter
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of

STEPS = 7


@pytest.fixture(scope="session")
def unread():
    """Ten sequences that are not among those of the training."""
    generator = torch.Generator().manual_seed(9)
    return Dataset.from_dict({"input_ids": torch.randint(0, 20, (10, CTX_LEN), generator=generator).tolist()})


@pytest.fixture
def train(tiny_llama, tokens, unread, tmp_path):
    """Train to the end; `eval_every` among the options evaluates on what is unread."""

    def run(name="run", model=tiny_llama, reporter=None, data=None, **options):
        settings = {**SETTINGS, **options}
        settings.setdefault("sae", SaeConfig(num_latents=64, k=4))
        cfg = TrainConfig(save_dir=tmp_path, run_name=name, **settings)
        eval_data = (unread if data is None else data) if "eval_every" in options else None
        return SaeTrainer(cfg, tokens, model, reporter=reporter or Reporters(), eval_data=eval_data).fit()

    return run


def evaluations_of(run):
    """Steps and what was found, by the file."""
    return [(each["step"], each["evaluation"]) for each in read_metrics(run / "metrics.jsonl", EVALUATION)]


@pytest.mark.parametrize(
    ("every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7])], ids=str
)
def test_when(train, tmp_path, every, steps):
    watcher = Recorder()
    train(eval_every=every, reporter=watcher)
    assert [stats.step for stats in watcher.evaluations] == steps
    assert [step for step, _ in evaluations_of(tmp_path / "run")] == steps
    assert watcher.infos[0].eval_every == every


@pytest.mark.parametrize("optimizer", ["adam", "signum", "muon"])
def test_training_does_not_notice(train, tmp_path, optimizer):
    """Weights, optimizer state, counters, reports and every random generator, bit for bit."""
    options = {"optimizer": optimizer, "grad_acc_steps": 2, "batch_size": 4, "save_every": 2, "keep_last": 9}
    options["sae"] = SaeConfig(num_latents=64, k=4, multi_topk=True)
    generators = []
    for name, more in (("with", {"eval_every": 2}), ("without", {})):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        train(name, **options, **more)
        generators.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()))
    assert generators[0] == generators[1]
    for step in (2, 4, 6, 7):
        found, expected = (tmp_path / name / f"step_{step:08d}" for name in ("with", "without"))
        assert_same_tensors(tensors_of(found), tensors_of(expected))
    assert metrics_of(tmp_path / "with") == metrics_of(tmp_path / "without")
    assert len(evaluations_of(tmp_path / "with")) == 4


KINDS = {
    "SAE": {},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "sae": SaeConfig(num_latents=64, k=4, skip_connection=True)},
    "crosscoder": {"crosscode": ("resid",)},
}


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "signum"}, {"max_norm_multiple": 1.0}, *({**KINDS[k], "max_norm_multiple": 1.2} for k in KINDS)],
    ids=str,
)
def test_it_is_what_the_checkpoint_would_give(train, tiny_llama, unread, tmp_path, options):
    """Also where half of all activations are longer than an SAE is for."""
    checkpoint = train(eval_every=3, save_every=3, keep_last=9, **options)
    for step, found in evaluations_of(tmp_path / "run"):
        folder = checkpoint.with_name(f"step_{step:08d}")
        expected = evaluate(
            Subject(
                model=tiny_llama,
                saes={name: sae.eval() for name, sae in Sae.load_many(folder).items()},
                data=sequences(unread),
                excluded=torch.tensor([0, 1]),
                objective=next_token,
                objective_name="next token",
            )
        )
        found.pop("warnings")
        assert close(found, json.loads(json.dumps(plain(expected.to_json()))))


def close(one, other):
    """Equal but for the order of sums: the trainer visits the sequences in an order of its own."""
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in other)
    if isinstance(other, list):
        return all(close(a, b) for a, b in zip(one, other, strict=True))
    return one == (pytest.approx(other, rel=1e-5, abs=1e-6) if isinstance(other, float) else other)


def test_no_more_than_eval_tokens_are_read(train, tmp_path):
    train(eval_every=7, eval_tokens=3 * CTX_LEN + 1)
    ((_, found),) = evaluations_of(tmp_path / "run")
    assert (found["sequences"], found["scored"]) == (3, 3 * (CTX_LEN - 1))


def test_a_model_without_a_head_is_reconstructed_only(train, tiny_llama, tmp_path):
    watcher = Recorder()
    train("bare", model=tiny_llama.model, eval_every=7, reporter=watcher)
    train("whole", eval_every=7)
    assert any("none: the model's checkpoint has no language modeling head" in said for said in watcher.said)
    ((_, bare),), ((_, whole),) = evaluations_of(tmp_path / "bare"), evaluations_of(tmp_path / "whole")
    assert (bare["together"], bare["ce_clean"]) == (None, None)
    for found, expected in zip(bare["layers"], whole["layers"], strict=True):
        assert found["grafted"] is None
        assert close(found["reconstruction"], expected["reconstruction"])
    assert watcher.evaluations[0].of_layers("ce_recovered") == {}
    assert set(watcher.evaluations[0].of_layers("fvu")) == {"layers.0", "layers.1", "layers.2"}


class StopWhileEvaluating:
    """Presses Ctrl-C amid the evaluation of one step, when a batch is read for it."""

    def __init__(self, data, at):
        self.data, self.at, self.reads, self.ctx_len = sequences(data), at, 0, CTX_LEN

    def __len__(self):
        return len(self.data)

    def read(self, numbers):
        self.reads += 1
        if self.reads == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.data.read(numbers)


def test_a_stop_ends_an_evaluation_and_who_goes_on_makes_it_up(train, unread, tmp_path):
    train("whole", eval_every=2)
    # One read at the start; two batches, which the first evaluation reads twice, for the means as well.
    data = StopWhileEvaluating(unread, at=1 + 4 + 1)
    with pytest.raises(Interrupted) as stopped:
        train("parts", eval_every=2, data=data)
    assert stopped.value.step == 4
    assert data.reads == 1 + 4 + 1
    assert [step for step, _ in evaluations_of(tmp_path / "parts")] == [2]
    watcher = Recorder()
    resumed = train("parts", eval_every=2, resume=True, reporter=watcher)
    assert [stats.step for stats in watcher.evaluations] == [4, 6, 7]
    assert evaluations_of(tmp_path / "parts") == evaluations_of(tmp_path / "whole")
    assert_same_tensors(tensors_of(resumed), tensors_of(tmp_path / "whole" / "latest"))
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize(("stop_at", "left"), [(3, [4, 6, 7]), (4, [4, 6, 7]), (5, [6, 7])])
def test_a_resumed_run_evaluates_at_the_same_steps(train, tmp_path, stop_at, left):
    train("whole", eval_every=2)
    with pytest.raises(Interrupted) as stopped:
        train("parts", eval_every=2, reporter=StopAfter(stop_at))
    assert stopped.value.step == stop_at
    watcher = Recorder()
    train("parts", eval_every=2, resume=True, reporter=watcher)
    assert [stats.step for stats in watcher.evaluations] == left
    assert evaluations_of(tmp_path / "parts") == evaluations_of(tmp_path / "whole")
    again = Recorder()
    train("parts", eval_every=2, resume=True, reporter=again)
    assert again.evaluations == []


def test_a_run_that_is_done_can_be_evaluated_afterwards(train):
    train()
    watcher = Recorder()
    train(resume=True, eval_every=5, eval_tokens=100, reporter=watcher)
    assert [stats.step for stats in watcher.evaluations] == [7]


def test_each_sae_is_whole_for_one_use_only(train, tiny_llama, monkeypatch):
    """Three layers, alone and together, for each of two batches."""
    asked, alive, lent = Counter(), [], []
    lend = Single.whole_sae

    def counting(placement, hookpoint):
        asked[hookpoint] += 1
        sae = lend(placement, hookpoint)
        alive.append(sum(each() is not None for each in lent))
        lent.append(weakref.ref(sae))
        return sae

    monkeypatch.setattr(Single, "whole_sae", counting)
    train(eval_every=7)
    assert asked == {f"{find_blocks(tiny_llama).prefix}.{layer}": 4 for layer in range(3)}
    assert set(alive) == {0}  # of those before


def test_saes_are_computed_exactly(train, monkeypatch):
    """As `saekit eval` does it, whatever --select-dtype the training has."""
    lend, found = Single.whole_sae, []

    def look(placement, hookpoint):
        sae = lend(placement, hookpoint)
        found.append((sae.kernels.select_dtype, placement.sae(hookpoint).kernels.select_dtype, sae.training))
        return sae

    monkeypatch.setattr(Single, "whole_sae", look)
    train(eval_every=7, select_dtype="int8")
    assert set(found) == {(None, torch.int8, False)}


def test_option_and_data_belong_together(make_trainer, tiny_llama, tokens, unread, tmp_path):
    with pytest.raises(UserError, match="eval_every is given without eval_data"):
        make_trainer(eval_every=3)
    with pytest.raises(UserError, match="eval_data is given without eval_every"):
        SaeTrainer(TrainConfig(save_dir=tmp_path), tokens, tiny_llama, reporter=Reporters(), eval_data=unread)


@pytest.mark.parametrize(
    ("token", "message"),
    [(1, "every token of the data to evaluate on is excluded"), (64, "the data to evaluate on has")],
)
def test_data_that_will_not_do_is_refused_at_the_start(train, token, message):
    with pytest.raises(UserError, match=message):
        train(eval_every=3, data=Dataset.from_dict({"input_ids": [[token] * CTX_LEN] * 4}))


def test_plain_lines_tell_of_it(train):
    from saekit.report.plain import PlainReporter

    stream = io.StringIO()
    train(eval_every=7, reporter=PlainReporter(stream))
    (line,) = [line for line in stream.getvalue().splitlines() if line.startswith("evaluated step 7 in ")]
    for words in ("FVU", "CE recovered", "KL", "all at once", "worst FVU"):
        assert words in line
