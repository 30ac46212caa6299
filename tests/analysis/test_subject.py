"""Questions to language models, and intervals of what they answer."""

import math

import pytest
import torch
import torch.nn.functional as F

from saekit.analysis import subject
from saekit.analysis.results import Estimate, ratio
from saekit.analysis.subject import IGNORED, MaskedToken, compare_answers, next_token


def test_the_next_token():
    ids = torch.tensor([[5, 6, 7], [1, 2, 3]])
    question = next_token(ids, torch.tensor([0, 1]))
    assert question.input_ids is ids
    assert question.targets.tolist() == [[6, 7, IGNORED], [2, 3, IGNORED]]


def test_masked_tokens_depend_on_the_sequence_number_alone():
    ids = torch.randint(10, 99, (4, 200), generator=torch.Generator().manual_seed(0))
    ids[:, :20] = 3
    ask = MaskedToken(mask_id=4, excluded=torch.tensor([3]))
    question = ask(ids, torch.arange(4))
    masked = question.input_ids == 4
    assert torch.equal(masked, question.targets != IGNORED)
    assert torch.equal(question.targets[masked], ids[masked])
    assert torch.equal(question.input_ids[~masked], ids[~masked])
    assert not masked[:, :20].any()
    assert masked[:, 20:].double().mean() == pytest.approx(0.15, abs=0.03)
    assert not torch.equal(masked[0], masked[1])
    again = ask(ids[2:3], torch.tensor([2]))
    assert torch.equal(again.input_ids, question.input_ids[2:3])


@pytest.mark.parametrize("block", [1, 50, 2**24])
def test_answers_are_those_of_the_definitions(monkeypatch, block):
    monkeypatch.setitem(subject.BLOCK, "cpu", block)
    torch.manual_seed(0)
    clean, changed = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    targets = torch.randint(0, 11, (3, 5))
    targets[0, 2] = targets[2, :] = IGNORED
    answer = compare_answers(clean, changed, targets)
    for row in range(3):
        kept = targets[row] != IGNORED
        p, q = clean[row, kept].double().softmax(-1), changed[row, kept].double().softmax(-1)
        ce = F.cross_entropy(changed[row, kept].double(), targets[row, kept], reduction="sum")
        torch.testing.assert_close(answer.ce[row], ce, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(answer.kl[row], (p * (p / q).log()).sum(), rtol=1e-5, atol=1e-6)
        assert answer.agree[row] == (p.argmax(-1) == q.argmax(-1)).sum()


def test_a_mean_has_the_usual_interval():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    found = ratio(values, torch.ones(4))
    half = 3.182446 * float(values.std()) / 2  # Student's t with 3 degrees of freedom
    assert found.value == 4
    assert found.low == pytest.approx(4 - half)
    assert found.high == pytest.approx(4 + half)


def test_a_ratio_of_sums_is_not_the_mean_of_ratios():
    found = ratio(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0]))
    assert found.value == 2.5
    # By hand: deviations 1 - 2.5 and 9 - 7.5; variance (2.25 + 2.25) * 2 / 4².
    assert found.high - found.value == pytest.approx(12.706205 * math.sqrt(4.5 * 2 / 16))


@pytest.mark.parametrize("sequences", [3, 60])
def test_intervals_hold_the_truth_as_often_as_they_say(sequences):
    """With the normal distribution's quantile, those over 3 sequences would hold it in 82% of all cases."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        tokens = torch.randint(50, 150, (sequences,), generator=generator).double()
        errors = tokens * (0.3 + 0.1 * torch.randn(sequences, generator=generator, dtype=torch.float64))
        found = ratio(errors, tokens)
        held += found.low <= 0.3 <= found.high
    assert 0.92 <= held / 400 <= 0.975


def test_what_cannot_be_known():
    assert ratio(torch.tensor([1.0]), torch.tensor([2.0])) == Estimate(0.5, None, None)
    assert math.isnan(ratio(torch.zeros(2), torch.zeros(2)).value)
    assert Estimate(0.25, 0.125, 0.5).complement() == Estimate(0.75, 0.5, 0.875)
