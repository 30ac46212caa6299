"""Every number of an evaluation, against what was worked out on paper for a model of two tokens."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest
import torch

from saekit import Sae, UserError
from saekit.analysis.evaluate import Evaluator, evaluate
from saekit.analysis.results import FEW_SEQUENCES
from saekit.analysis.subject import IGNORED, ScoredInput
from saekit.sae.trained_on import TrainedOn
from tests.analysis.toy import Block, Scaling, subject, surprise
from tests.together import Together

# Of the three predictions of a sequence such as 0 0 1 1, two are as the model expects and one is not.
CLEAN = (2 * surprise(2) + surprise(-2)) / 3
HALVED = (2 * surprise(1) + surprise(-1)) / 3
EVEN = math.log(2)
"""What it costs to know nothing of two tokens; also with the mean, (1, 1), in every token's place."""


def only(found):
    (layer,) = found.layers
    return layer


def values(grafted):
    return {field.name: getattr(grafted, field.name).value for field in fields(grafted)}


def test_an_exact_reconstruction_costs_nothing():
    found = evaluate(subject(1.0))
    for grafted in (only(found).grafted, found.together):
        assert values(grafted) == pytest.approx(
            {
                "ce": CLEAN,
                "ce_mean_ablated": EVEN,
                "ce_zero_ablated": EVEN,
                "ce_recovered": 1,
                "ce_recovered_from_mean": 1,
                "kl": 0,
                "top1": 1,
            }
        )
        assert grafted.kl.value == 0
        assert grafted.ce_recovered.value == 1
    assert only(found).reconstruction.fvu.value == 0
    assert only(found).reconstruction.explained_variance.value == 1
    assert found.ce_clean.value == pytest.approx(CLEAN)
    assert (found.sequences, found.ctx_len, found.tokens, found.scored) == (2, 4, 8, 6)


def test_nothing_in_the_place_of_everything_recovers_nothing():
    found = evaluate(subject(0.0))
    grafted = only(found).grafted
    assert grafted.ce.value == pytest.approx(EVEN)
    assert grafted.ce_recovered.value == 0
    assert grafted.ce_recovered_from_mean.value == pytest.approx(0)
    assert only(found).reconstruction.cosine.value == 0


def test_half_of_everything():
    found = evaluate(subject(0.5))
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    recovered = (EVEN - HALVED) / (EVEN - CLEAN)
    assert values(only(found).grafted) == pytest.approx(
        {
            "ce": HALVED,
            "ce_mean_ablated": EVEN,
            "ce_zero_ablated": EVEN,
            "ce_recovered": recovered,
            "ce_recovered_from_mean": recovered,
            "kl": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
            "top1": 1,
        },
        rel=1e-5,
    )
    reconstruction = only(found).reconstruction
    # The error is (1, 0) or (0, 1), of length 1; from the mean (1, 1) an activation is √2 away. The mean error,
    # (1/2, 1/2), taken out, half of each error remains.
    assert reconstruction.fvu.value == pytest.approx(0.5)
    assert reconstruction.explained_variance.value == pytest.approx(0.75)
    assert reconstruction.cosine.value == pytest.approx(1)
    assert reconstruction.l0.value == 1  # the other latent was chosen, at zero
    assert (reconstruction.dead, reconstruction.num_latents) == (1, 2)
    histogram = reconstruction.density.histogram
    assert sum(histogram) == histogram[-1] == 1  # on every token


def test_the_mean_knows_which_token_is_frequent_and_zeros_do_not():
    grafted = only(evaluate(subject(0.5, rows=((0, 0, 0, 1),)))).grafted  # the mean is (1.5, 0.5)
    mean = (2 * surprise(1) + surprise(-1)) / 3
    assert grafted.ce_mean_ablated.value == pytest.approx(mean)
    assert grafted.ce_zero_ablated.value == pytest.approx(EVEN)
    clean = (2 * surprise(2) + surprise(-2)) / 3
    assert grafted.ce_recovered.value == pytest.approx((EVEN - mean) / (EVEN - clean))
    assert grafted.ce_recovered_from_mean.value == 0  # halved, its log-odds are the mean's


def test_a_wrong_sign_turns_predictions_round():
    grafted = only(evaluate(subject(-1.0))).grafted
    assert grafted.ce.value == pytest.approx((2 * surprise(-2) + surprise(2)) / 3)
    assert grafted.top1.value == 0


@pytest.mark.parametrize("head", [True, False])
def test_what_is_too_long_for_an_sae_is_left_as_it_is(head):
    """The first tokens are; so every number is what it is with them excluded by their id."""

    def found(**options):
        objective = {} if head else {"objective": None}
        max_norm = options.pop("max_norm", None)
        saes = {f"layers.{layer}": Scaling(0.5, max_norm) for layer in range(3)}
        rows = ((2, 0, 0, 1), (2, 1, 0, 0))
        return evaluate(subject(0.5, rows, depth=3, saes=saes, **objective, **options))

    by_length, by_id = found(max_norm=3.0), found(excluded=(2,))
    assert by_length.tokens == 8
    assert by_length.layers[0].reconstruction.tokens == by_id.tokens == 6
    assert by_length.layers == by_id.layers
    assert by_length.together == by_id.together
    assert by_length.ce_clean == by_id.ce_clean
    assert by_length.layers != found().layers
    with pytest.raises(UserError, match=r"layers\.0: every token is excluded.* --max-norm-multiple"):
        found(max_norm=1.0)


def test_layers_alone_and_together():
    found = evaluate(subject(0.5, depth=3))
    for layer in found.layers:
        assert layer.grafted.ce.value == pytest.approx(HALVED)
        assert layer.reconstruction.fvu.value == pytest.approx(0.5)  # of the true activation
    assert found.together.ce.value == pytest.approx((2 * surprise(0.25) + surprise(-0.25)) / 3)


class Remembering(Block):
    """Adds what an earlier block was given: more goes from block to block than the residual stream."""

    def __init__(self, earlier=None):
        super().__init__()
        self.earlier, self.given = earlier, None

    def forward(self, x):
        self.given = x
        return x if self.earlier is None else x + self.earlier.given.flip(1)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_model_that_cannot_start_in_the_middle_runs_as_a_whole(forgets):
    def whole():
        built = subject(0.5, rows=((0, 0, 0, 1), (1, 0, 0, 1)), depth=3)
        first = Remembering()
        built.model.layers[0], built.model.layers[2] = first, Remembering(first)
        if forgets:  # what is missing is no number but nothing at all
            built.model.register_forward_pre_hook(lambda *_: setattr(first, "given", None))
        return built

    found = evaluate(whole())
    slow = evaluate(whole(), start_anywhere=False)
    assert found == slow
    assert found.layers[1].grafted != found.layers[2].grafted


def test_excluded_tokens_keep_their_true_activations():
    found = evaluate(subject(0.0, rows=((0, 0, 1, 1),), excluded=(1,)))
    grafted = only(found).grafted
    # After a 0 nothing is known any more; after the excluded 1 a 1 is expected as before.
    assert grafted.ce.value == pytest.approx((EVEN + EVEN + surprise(2)) / 3)
    assert only(found).reconstruction.l0.value == 1
    assert (found.tokens, found.scored) == (2, 3)
    # The mean over the two that are left is (2, 0): putting it in their place changes nothing.
    assert grafted.ce_mean_ablated.value == pytest.approx(found.ce_clean.value)


def test_intervals_are_over_sequences():
    alike = evaluate(subject(0.5))  # each sequence has two predictions as expected and one not
    assert only(alike).grafted.ce.low == pytest.approx(HALVED)
    assert only(alike).grafted.ce.high == pytest.approx(HALVED)
    different = evaluate(subject(0.5, rows=((0, 0, 0, 0), (0, 1, 0, 1))))
    ce = only(different).grafted.ce
    sums = torch.tensor([3 * surprise(1), 3 * surprise(-1)], dtype=torch.float64)
    assert ce.value == pytest.approx(float(sums.sum()) / 6)
    assert ce.high - ce.value == pytest.approx(12.706205 * float(sums.std()) / math.sqrt(2) / 3, rel=1e-5)
    assert only(evaluate(subject(0.5, rows=((0, 0, 1, 1),)))).grafted.ce.low is None


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_do_not_matter(batch_size):
    rows = ((0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 0, 1), (1, 1, 1, 1), (0, 0, 0, 1))
    assert evaluate(subject(0.5, rows, batch_size=batch_size)) == evaluate(subject(0.5, rows))


def test_masks_are_reconstructed_for_predictions_but_not_counted():
    """Token 1 as a mask, which is (0, 2): half of the zeros are masked and predicted, by log-odds of -2."""

    class EverySecond:
        def __call__(self, input_ids, numbers):
            masked = torch.arange(4).expand_as(input_ids) % 2 == 1
            return ScoredInput(input_ids.masked_fill(masked, 1), input_ids.masked_fill(~masked, IGNORED))

    rows = ((0, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1))
    found = evaluate(subject(0.5, rows, objective=EverySecond(), objective_name="masked token"))
    assert only(found).reconstruction == only(evaluate(subject(0.5, rows, objective=None))).reconstruction
    assert found.scored == 6
    assert found.ce_clean.value == pytest.approx((4 * surprise(-2) + 2 * surprise(2)) / 6)
    assert only(found).grafted.ce.value == pytest.approx((4 * surprise(-1) + 2 * surprise(1)) / 6)


def test_without_a_head_there_is_the_reconstruction():
    found = evaluate(subject(0.5, objective=None, objective_name="none: it has no head"))
    assert only(found).reconstruction.fvu.value == pytest.approx(0.5)
    assert only(found).grafted is None
    assert found.together is None
    assert found.ce_clean is None


@pytest.mark.parametrize("with_head", [True, False])
def test_progress_comes_to_its_end(with_head):
    told = []
    own = subject(0.5, depth=2, batch_size=1, **({} if with_head else {"objective": None}))
    evaluate(own, lambda done, of: told.append((done, of)))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {of for _, of in told} == {len(told)}


MANY = tuple((0, 0, 1, 1) if number % 2 else (1, 1, 0, 0) for number in range(FEW_SEQUENCES))
"""As many sequences as there must be."""


def test_a_warning_where_an_sae_is_worse_than_the_mean():
    assert evaluate(subject(0.5, MANY)).warnings() == []
    (warning,) = evaluate(subject(-1.0, MANY)).warnings()
    assert "layers.0" in warning
    assert "FVU" in warning


def test_a_warning_where_few_sequences_were_evaluated():
    (warning,) = evaluate(subject(0.5, MANY[1:])).warnings()
    assert warning.startswith("only 49 sequences evaluated: with fewer than 50 the intervals are rough. ")
    assert "Evaluate 200 tokens or more (--max-tokens)" in warning
    assert "only 1 sequence evaluated" in evaluate(subject(0.5, MANY[:1])).warnings()[0]


@pytest.mark.parametrize(
    ("trained_on", "warnings"),
    [
        ([None, None], []),
        ([("toy", "layers.0"), ("some/toy", "layers.1/seed1")], []),
        ([("toy", "layers.0"), ("Toy", None)], []),
        ([(None, "layers.1"), (None, "layers.1")], ["the SAE that is evaluated at layers.0 was trained at layers.1"]),
        ([("gpt2", None), ("gpt2", None)], ["the SAEs were trained on gpt2, but this model is toy"]),
        (
            [("gpt2", "layers.0"), ("toy", "layers.1.mlp")],
            [
                "the SAE that is evaluated at layers.1 was trained at layers.1.mlp",
                "the SAEs were trained on gpt2, but this model is toy",
            ],
        ),
    ],
)
def test_a_warning_where_saes_were_trained_on_something_else(trained_on, warnings):
    own = subject(0.5, MANY, depth=2)
    for sae, known in zip(own.saes.values(), trained_on, strict=True):
        sae.trained_on = None if known is None else TrainedOn(*known)
    found = evaluate(own)
    assert found.warnings() == warnings
    assert "misplaced" not in found.to_json()


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        (
            {"layers.7": Scaling(1.0)},
            r"layers\.7 does not belong to this model, whose layers are layers\.0 to",
        ),
        ({"layers.0": Sae(3, 8, 2)}, "for a width of 3, but this model's is 2"),
    ],
)
def test_saes_of_another_model(saes, message):
    with pytest.raises(UserError, match=message):
        evaluate(subject(1.0, saes=saes))


def test_nothing_but_excluded_tokens():
    with pytest.raises(UserError, match="every token is excluded"):
        evaluate(subject(1.0, excluded=(0, 1)))


@pytest.mark.parametrize("objective", ["next token", None])
def test_what_does_not_depend_on_the_saes_is_computed_once(objective):
    more = {} if objective else {"objective": None}
    own = subject(0.5, depth=3, **more)
    again = Evaluator(own)
    assert again() == evaluate(subject(0.5, depth=3, **more))
    before = own.model.passes
    for sae in own.saes.values():
        sae.factor = 0.25
    assert again() == evaluate(subject(0.25, depth=3, **more))
    assert own.model.passes - before == (1 + 3 + 1 if objective else 1)  # clean, each layer, all of them


def test_an_evaluation_that_was_broken_off_leaves_no_trace():
    own = subject(0.5, depth=2, batch_size=1)
    again, of = Evaluator(own), []

    def give_up(at):
        def progress(done, total):
            of.append(total)
            if done == at:
                raise KeyboardInterrupt

        return progress

    for at in range(1, 21):  # in the first call everywhere
        with pytest.raises(KeyboardInterrupt):
            again(give_up(at if at < 3 else at - 2))
    assert again() == evaluate(own)
    for at in range(1, 9):
        with pytest.raises(KeyboardInterrupt):
            again(give_up(at))
    assert again() == evaluate(own)


@pytest.mark.parametrize("objective", ["next token", None])
@pytest.mark.parametrize(("count", "batch_size"), [(2, 1), (2, 2), (3, 1), (3, 4), (4, 1), (7, 2)])
def test_ranks_share_out_the_sequences_and_stay_in_step(count, batch_size, objective):
    rows = ((0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 0, 1), (1, 1, 1, 1), (0, 0, 0, 1))
    more = {} if objective else {"objective": None}
    alone = subject(0.5, rows, depth=2, **more)
    ranks, asked, passes = Together(count), [[] for _ in range(count)], [0] * count

    def work(rank):
        def whole(name):
            asked[rank].append(name)
            return alone.saes[name]

        def progress(done, of):
            passes[rank] = done

        own = {
            "rank": rank,
            "world_size": count,
            "batch_size": batch_size,
            "total": ranks.gather(rank, sum),
            "whole": whole,
        }
        return evaluate(subject(0.5, rows, depth=2, **more, **own), progress)

    with ThreadPoolExecutor(count) as pool:
        for found in pool.map(work, range(count)):
            assert found == evaluate(alone)
    assert all(each == asked[0] for each in asked)
    assert len(set(passes)) == 1
