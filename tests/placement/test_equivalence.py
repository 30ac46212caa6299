"""Placement never changes the maths: the same seed, data and global batch give the same SAEs on any ranks."""

import json
import shutil

import pytest

from tests.placement.conftest import CTX_LEN, DEMO_LM, GLOBAL_BATCH, STEPS
from tests.training.runs import metrics_of, tensors_of, thresholds_of

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
"""Relative, in fp32: what is left is the order of summation."""
MIXED = ["--hookpoints", "h.0:in,h.0,h.1.mlp:in,h.1.mlp.c_proj:in", "--mix", 5]
"""The residual stream, inputs of modules, and one that is four times as wide; with tokens of five steps mixed."""
SKIP = ["--reads", "h.0:in,h.0.mlp.c_proj:in", "--writes", "h.0.mlp,h.1.mlp", "--skip-connection"]
"""Transcoders: one in a layer, and one of another width that reads in one layer and writes in the next."""
CROSS = ["--crosscode", "resid,h.0.mlp.c_proj:in"]
"""One unit, so some ranks of a layer map have none."""
TWO_MODELS = ["--hookpoints", "h.0,h.1.mlp.c_proj:in", "--crosscode-models"]
"""Crosscoders of two widths; the second model's name is still to come."""
KINDS = {"mixed": MIXED, "skip": SKIP, "cross": CROSS}
CUTS = {"whole": [], "micro": ["--micro-acc-steps", 3], "accumulated": ["--grad-acc-steps", 2]}
CUTS["both"] = [*CUTS["micro"], *CUTS["accumulated"]]
"""Ways to cut the batch of a step."""
BATCH_TOPK, SIGNUM = ["--activation", "batchtopk"], ["--optimizer", "signum"]


def assert_same_run(found, expected, steps=STEPS):
    """Weights, optimizer state, counters and every logged number."""
    a, b = tensors_of(found / "latest"), tensors_of(expected / "latest")
    assert a.keys() == b.keys()
    for name in b:
        if b[name].is_floating_point():
            difference = (a[name].double() - b[name].double()).norm() / b[name].double().norm().clamp_min(1e-30)
            assert difference <= TOLERANCE, f"{name}: {difference:.1e}"
        else:
            assert a[name].equal(b[name]), name
    ours, theirs = ([each for each in metrics_of(run) if "step" in each] for run in (found, expected))
    assert len(ours) == len(theirs) >= steps
    for one, other in zip(ours, theirs, strict=True):
        compare(one, other, f"step {one['step']}")


def compare(one, other, where):
    if isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for name in other:
            compare(one[name], other[name], f"{where}: {name}")
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=TOLERANCE, abs=1e-9), where
    elif not isinstance(other, str):
        assert one == other, where


@pytest.mark.parametrize(
    ("kind", "placement", "ranks", "cut"),
    [
        ("mixed", "ddp", 2, "accumulated"),
        ("mixed", "ddp", 3, "whole"),
        ("mixed", "layer-map", 2, "both"),
        ("mixed", "layer-map", 3, "whole"),
        ("mixed", "zero3", 2, "accumulated"),
        ("mixed", "zero3", 3, "whole"),  # 3 does not divide the number of latents: rows are cut apart
        ("skip", "ddp", 3, "both"),
        ("skip", "layer-map", 2, "micro"),
        ("skip", "zero3", 1, "whole"),
        ("skip", "zero3", 2, "accumulated"),
        ("skip", "zero3", 3, "whole"),  # W_skip is cut apart, too
        ("cross", "ddp", 2, "accumulated"),
        ("cross", "layer-map", 2, "both"),
        ("cross", "zero3", 2, "both"),
        ("two models", "ddp", 3, "whole"),
        ("two models", "layer-map", 2, "micro"),
        ("two models", "zero3", 2, "whole"),
    ],
)
def test_ranks_placements_and_splits_of_the_same_batch_agree(train, gpt2_dir, other_dir, kind, placement, ranks, cut):
    """With every tensor of the host told from the device's.

    The demo's model on two ranks is trained under each placement in `test_a_launch_file_says_which_placement`.
    """
    split, options = CUTS[cut], KINDS.get(kind, [*TWO_MODELS, other_dir])
    batch_size = GLOBAL_BATCH // ranks // (2 if "--grad-acc-steps" in split else 1)
    place = [
        "--placement",
        placement,
        *split,
        *(["--shard-lm"] if (kind, placement) == ("two models", "zero3") else []),
    ]
    found = train(gpt2_dir, *place, *options, ranks=ranks, batch_size=batch_size, devices=True)
    assert_same_run(found, train(gpt2_dir, *options))


@pytest.mark.parametrize(
    ("placement", "activation"),
    [("ddp", "groupmax"), ("layer-map", "topk"), ("zero3", "topk"), ("zero3", "groupmax")],
)
def test_a_matryoshka_is_the_same_everywhere(train, gpt2_dir, placement, activation):
    nested = ["--matryoshka", "0.2,0.5,1", "--activation", activation]
    found = train(gpt2_dir, "--placement", placement, "--micro-acc-steps", 2, *nested, ranks=2)
    assert_same_run(found, train(gpt2_dir, *nested))


@pytest.mark.parametrize("placement", ["ddp", "layer-map", "zero3"])
def test_long_activations_are_left_out_and_thresholds_are_the_same_everywhere(train, gpt2_dir, placement):
    """A multiple at which half of all tokens are long, and others in each layer."""
    short = ["--max-norm-multiple", "1", *BATCH_TOPK]
    found, alone = (
        train(gpt2_dir, "--placement", placement, "--micro-acc-steps", 2, *short, ranks=2),
        train(gpt2_dir, *short),
    )
    assert_same_run(found, alone)
    assert thresholds_of(found / "latest") == pytest.approx(thresholds_of(alone / "latest"), rel=TOLERANCE)
    l0 = [layer["l0"] for step in metrics_of(found) if "layers" in step for layer in step["layers"].values()]
    assert sum(l0) / len(l0) == pytest.approx(4, rel=0.15), "over the tokens that are not left out"


RECIPE = [
    "--init",
    "uniform",
    "--no-scale-biases",
    "--auxk-relative-to",
    "residual",
    "--decoder-lr-ratio",
    1,
    "--encoder-bias-lr-ratio",
    2,
    "--beta2",
    0.999,
    "--revive-alpha",
    0,
]


def test_a_cache_of_two_ranks_is_read_by_three(train, gpt2_dir, token_dir, forked, tmp_path):
    places = ["--ctx-len", CTX_LEN, "--batch-size", 4, "--hookpoints", "h.0,h.1.mlp:in", "--dtype", "float32"]
    command = ["cache", gpt2_dir, token_dir, "--out", tmp_path / "acts", *places, "--shard-size", "100KiB"]
    assert forked.run(command, 2, tmp_path / "said", tmp_path, timeout=300) == [0, 0], (tmp_path / "said").read_text()
    found = train(gpt2_dir, "--activations", tmp_path / "acts", "--placement", "ddp", "--mix", 5, ranks=3)
    assert_same_run(found, train(gpt2_dir, "--hookpoints", "h.0,h.1.mlp:in", "--mix", 5))


@pytest.mark.parametrize("placement", ["ddp", "layer-map", "zero3"])
def test_what_else_a_recipe_can_say_is_the_same_everywhere(train, gpt2_dir, placement):
    found = train(gpt2_dir, "--placement", placement, *RECIPE, ranks=2)
    assert_same_run(found, train(gpt2_dir, *RECIPE))


def test_a_map_of_ones_own_agrees(train):
    found = train(DEMO_LM, "--placement", "layer-map", "--layer-map", "0:1,1-4:0,5:1", ranks=3)
    assert_same_run(found, train(DEMO_LM))


@pytest.mark.parametrize(
    ("kind", "before", "ranks", "after"),
    [
        ("mixed", "ddp", 2, "ddp"),
        ("mixed", "layer-map", 2, "zero3"),
        ("mixed", "zero3", 2, "layer-map"),
        ("mixed", "zero3", 1, "zero3"),
        ("skip", "ddp", 2, "zero3"),
        ("skip", "layer-map", 2, "layer-map"),
        ("skip", "zero3", 2, "ddp"),
        ("skip", "zero3", 1, None),
        ("cross", "ddp", 2, "layer-map"),
        ("cross", "layer-map", 2, "ddp"),
        ("cross", "layer-map", 1, None),
        ("cross", "zero3", 2, "zero3"),
    ],
)
def test_a_run_goes_on_under_another_placement(train, gpt2_dir, kind, before, ranks, after):
    """Each kind from each placement and to each, with moments and thresholds or with an average of its weights."""
    options = [*KINDS[kind], *{"mixed": [], "skip": BATCH_TOPK, "cross": SIGNUM}[kind]]
    twice = ["--placement", before, "--save-every", STEPS // 2, "--keep-last", 2]
    halves = train(gpt2_dir, *options, *twice, ranks=2)
    run = halves.with_name(f"moved-{kind}-{before}-{ranks}-{after}")
    shutil.copytree(halves, run, symlinks=True)
    shutil.rmtree(run / f"step_{STEPS:08}")
    place = ["--placement", after] if after else []
    again = [*options, *place, "--resume", "auto"]
    found = train(gpt2_dir, *again, ranks=ranks, name=run.name, devices=before == "ddp")
    assert f"Resuming from {run / f'step_{STEPS // 2:08}'}" in (found / "stderr.txt").read_text()
    alone = train(gpt2_dir, *options)
    assert_same_run(found, alone)
    if kind == "skip":
        assert thresholds_of(found / "latest") == pytest.approx(thresholds_of(alone / "latest"), rel=TOLERANCE)


@pytest.mark.parametrize("placement", ["ddp", "layer-map", "zero3"])
def test_a_bad_step_is_skipped_by_all(train, overflowing, placement):
    model, data = overflowing
    found = train(model, "--no-shuffle", "--placement", placement, ranks=2, data=data)
    alone = train(model, "--no-shuffle", data=data)
    assert [each["skipped_steps"] for each in metrics_of(alone)] == [0] * 3 + [1] * 4 + [2] + [3] * 4
    assert_same_run(found, alone)
    said = (found / "stderr.txt").read_text()
    for step in (4, 8, 9):
        assert said.count(f"step {step} was skipped: NaN or Inf in the activations of h.0 and 1 more") == 1


@pytest.mark.parametrize(
    ("options", "when", "saved"),
    [
        (["--max-bad-steps", 2], "in each of the 2 steps up to 9", 6),
        (["--max-tokens", 9 * GLOBAL_BATCH * CTX_LEN], "in each of the last 2 steps", 9),
    ],
)
@pytest.mark.usefixtures("lost_unnoticed")
def test_too_many_bad_steps_or_a_bad_last_one_end_all_ranks(train, overflowing, options, when, saved):
    model, data = overflowing
    options = ["--no-shuffle", "--placement", "layer-map", "--save-every", 3, *options]
    found = train(model, *options, ranks=2, data=data, name=f"bad{saved}", expect=1)
    said = (found / "stderr.txt").read_text()
    assert said.count("Error: ") == said.count(f"Error: h.0: NaN or Inf in the activations {when}") == 1
    assert json.loads((found / "latest" / "checkpoint.json").read_text())["step"] == saved


def test_signum_averages_sharded_weights_as_whole_ones(train, gpt2_dir):
    found = train(gpt2_dir, "--placement", "zero3", *SIGNUM, *SKIP, ranks=3)
    assert_same_run(found, train(gpt2_dir, *SIGNUM, *SKIP))


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ["--placement", "ddp"]),
        (2, ["--placement", "layer-map"]),
        (3, ["--placement", "zero3"]),
        (2, ["--placement", "zero3", "--shard-lm"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_bf16_model_is_read_alike(train, ranks, options):
    bf16 = ["--dtype", "bfloat16"]
    assert_same_run(train(DEMO_LM, *bf16, *options, ranks=ranks), train(DEMO_LM, *bf16))


def test_more_ranks_than_layers(train, gpt2_dir):
    """GPT-2 has two layers here: one rank of layer-map has none."""
    found = train(gpt2_dir, "--placement", "layer-map", ranks=4)
    assert "rank 3: none" in (found / "stderr.txt").read_text()
    assert_same_run(found, train(gpt2_dir))


@pytest.mark.parametrize("placement", ["ddp", "layer-map", "zero3"])
def test_a_launch_file_says_which_placement(train, placement):
    found = train(DEMO_LM, ranks=2, launch_file=f"{placement.replace('-', '_')}_cpu.yaml")
    # Rank 0 says it, the others nothing.
    assert (found / "stderr.txt").read_text().count(f", {placement} on 2 ranks") == 1
    assert_same_run(found, train(DEMO_LM))


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_has_died_and_a_step_was_short(train, gpt2_dir, kind):
    """Else the runs above would agree on less than they claim."""
    run = train(gpt2_dir, *KINDS[kind])
    steps = [each for each in metrics_of(run) if "layers" in each]
    assert any(layer["auxk_loss"] > 0 for layer in steps[-1]["layers"].values())
    index = json.loads((run / "latest" / "checkpoint.json").read_text())
    assert index["step"] == STEPS
