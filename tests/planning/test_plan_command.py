"""`saekit plan` and `saekit train --dry-run`, from a model's config alone."""

import json

import pytest
import yaml
from transformers import LlamaConfig

from saekit.units import parse_size
from tests.cli.conftest import saekit  # noqa: F401  # a fixture

GIB = 2**30


@pytest.fixture(scope="module")
def llama_3_8b(tmp_path_factory):
    """A folder with the numbers of Llama-3-8B's config and nothing else."""
    folder = tmp_path_factory.mktemp("llama-3-8b")
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ).save_pretrained(folder)
    return folder


RECIPE = ("--load-in-8bit", "--layer-stride", "2", "--expansion-factor", "32", "--batch-size", "1")
"""Llama-3-8B, all even layers, 32 latents per dimension, the model in 8 bits."""


@pytest.fixture(scope="module")
def answers():
    """By options, so that no plan is made twice."""
    return {}


@pytest.fixture
def planned(saekit, llama_3_8b, answers):  # noqa: F811
    def call(*options):
        key = tuple(map(str, options))
        if key not in answers:
            done = saekit("plan", llama_3_8b, "--gpus", 8, "--gpu-memory", "48GiB", "--json", *RECIPE, *options)
            assert done.code == 0, done.err
            answers[key] = done.out
        return json.loads(answers[key])

    return call


def test_llama_3_8b_on_eight_gpus_of_48_gib(planned):
    found = planned()
    assert (found["num_latents"], len(found["layers"]), found["dtype"]) == (131072, 16, "bfloat16")
    parameters = 2 * 131072 * 4096 + 131072 + 4096  # of one SAE
    placements = found["placements"]
    for name, layers_held in (("ddp", 16), ("zero3", 16 / 8), ("layer-map", 2)):
        parts = placements[name]["parts"]
        assert parts["parameters"] == pytest.approx(4 * parameters * layers_held)
        if name == "layer-map":  # of all ranks' tokens a row for each matrix, and their pairs; the biases' gradients
            rows, pairs = 8 * 2048, 8 * 2048 * 32
            sums = 2 * 4 * rows * 4096 + pairs * (2 * 4 + 8) + 8 * (131072 + 1)
            assert parts["gradients"] == pytest.approx(layers_held * (sums + 4 * (131072 + 4096)))
        else:
            assert parts["gradients"] == parts["parameters"]
        assert parts["optimizer_state"] == pytest.approx(8 * parameters * layers_held)
        # Blocks 0 to 30: attention 4096² twice and 4096 · 1024 twice, MLP 3 · 4096 · 14336, in one byte each and four
        # per output; two norms per block, the last norm, and the embeddings in two bytes.
        blocks = 31 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
        scales = 31 * 4 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
        rest = 2 * (128256 * 4096 + 63 * 4096)
        assert parts["language_model"] == pytest.approx(blocks + scales + rest, rel=1e-4)
    totals = {name: round(each["total"] / GIB, 1) for name, each in placements.items()}
    assert totals == {"ddp": 266.7, "layer-map": 35.6, "zero3": 50.7}
    assert {name for name, each in placements.items() if each["fits"]} == {"layer-map"}
    assert found["recommended"] == "layer-map"
    # One sequence of 2048 tokens: 14 foreign layers' activations leave a rank; 7 ranks' arrive for its 2 layers.
    assert placements["layer-map"]["sent_per_step"] == 14 * 2048 * 4096 * 2


def test_evaluations_take_the_rest_of_the_language_model(planned):
    """The last block, in 8 bits as the others, and the head, which is not tied and stays in two bytes."""
    parts = [planned(*more)["placements"]["layer-map"]["parts"] for more in ((), ("--eval-every", 100))]
    block = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 4 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    added = parts[1]["language_model"] - parts[0]["language_model"]
    assert added == pytest.approx(block + 2 * (2 * 4096 + 128256 * 4096), rel=1e-4)
    assert {**parts[1], "language_model": 0} == {**parts[0], "language_model": 0}


def test_what_makes_room_does(planned):
    totals = [planned()["placements"]["layer-map"]["total"]]
    for options in (["--moments-dtype", "bf16"], ["--optimizer", "adam8bit"], ["--layers", "0-31:4"]):
        options = [*options, "--layer-stride", 1] if "--layers" in options else options
        totals.append(planned(*options)["placements"]["layer-map"]["total"])
    assert totals[0] - totals[1] == pytest.approx(2 * 4 * 2 * 131072 * 4096, rel=0.01)  # 4 bytes less per parameter
    assert totals[2] < totals[0]
    assert totals[3] < totals[1]
    chunked, whole = (
        planned("--batch-size", 8, *more)["placements"]["layer-map"]["parts"]["working"]
        for more in (["--micro-acc-steps", 8], [])
    )
    assert chunked < whole


def test_codes_of_batchtopk_take_more_room(planned):
    """Four times the pairs of a value and a latent, and nothing else."""
    topk, batch_topk = (
        planned("--batch-size", 8, "--k", 128, *more)["placements"]["layer-map"]["parts"]
        for more in ([], ["--activation", "batchtopk"])
    )
    pairs = 8 * 2048 * 8 * 128  # of the ranks' tokens, which all arrive at the layer's owner
    assert batch_topk["working"] - topk["working"] >= 3 * pairs * (4 + 8)
    assert {**batch_topk, "working": 0} == {**topk, "working": 0}


def test_an_optimizer_that_needs_whole_tensors_leaves_out_zero3(planned):
    assert set(planned("--optimizer", "muon")["placements"]) == {"ddp", "layer-map"}


def test_the_table(saekit, llama_3_8b):  # noqa: F811
    done = saekit("plan", llama_3_8b, "some/data", "--gpus", 8, "--gpu-memory", "48GiB", *RECIPE)
    assert "16 SAEs of 131,072 latents on width 4,096, 16,384 tokens per step" in done.out
    assert "layer-map █" in done.out
    assert "74% of 48.0 GiB, fits" in done.out
    assert "106% of 48.0 GiB, does not fit" in done.out
    assert "Use layer-map" in done.out


@pytest.mark.parametrize(
    ("options", "says", "site"),
    [
        (
            ["--transcode", "--skip-connection", "--layers", "0-2"],
            [
                "3 transcoders of 64 latents from width 16 to 16,",
                "read layers.{0-2}.mlp:in\n",
                "write layers.{0-2}.mlp\n",
            ],
            ("layers.0.mlp", {"layers.0.mlp:in": 16}, {"layers.0.mlp": 16}),
        ),
        (
            ["--reads", "layers.0", "--writes", "layers.1.mlp.down_proj:in"],
            ["1 transcoder of 64 latents from width 16 to 32,", "transcoder parameters"],
            ("layers.1.mlp.down_proj:in", {"layers.0": 16}, {"layers.1.mlp.down_proj:in": 32}),
        ),
        (
            ["--crosscode", "resid"],
            ["1 crosscoder of 64 latents on width 48,", "reads and writes layers.{0-2}\n", "crosscoder parameters"],
            ("crosscoder", {f"layers.{i}": 16 for i in range(3)}, {f"layers.{i}": 16 for i in range(3)}),
        ),
    ],
)
def test_what_other_coders_read_and_write(saekit, model_dir, options, says, site):  # noqa: F811
    done = saekit("plan", model_dir, *options, "--num-latents", 64, "--k", 4)
    assert done.code == 0, done.err
    for part in says:
        assert part in done.out
    found = json.loads(saekit("plan", model_dir, *options, "--num-latents", 64, "--k", 4, "--json").out)
    assert found["sites"][0] == dict(zip(("name", "reads", "writes"), site, strict=True))
    assert (found["d_in"], found["d_out"]) == (sum(site[1].values()), sum(site[2].values()))


def test_where_nothing_fits(saekit, llama_3_8b):  # noqa: F811
    done = saekit("plan", llama_3_8b, "--gpus", 2, "--gpu-memory", "24GiB", "--layers", "0,15,30,31", "--batch-size", 1)
    assert done.code == 0
    assert "None fits: layer-map needs the least memory and lacks" in done.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", 8], "give both, or neither"),
        (["--gpus", 8, "--gpu-memory", "much"], "--gpu-memory 'much': expected a size such as 80GiB"),
        (["--gpus", 8, "--gpu-memory", "8G", "--num-processes", 2], "leave it out with --gpus"),
        (["--layers", "40"], "out of range"),
        (["--ctx-len", "10000"], "8192 tokens that this model can read"),
        (["--gpus", 1, "--gpu-memory", "80GiB", "--select-dtype", "int8"], "only CPUs can select in int8"),
    ],
)
def test_what_cannot_be_planned(saekit, llama_3_8b, options, message):  # noqa: F811
    done = saekit("plan", llama_3_8b, *options)
    assert done.code == 2
    assert message in done.err


def test_sizes():
    assert [parse_size("--x", text) for text in ("80GiB", "80", "80 GB", "1.5T", "80g", "100000000")] == [
        80 * GIB, 80 * GIB, 80 * 10**9, 1.5 * 10**12, 80 * 10**9, 10**8,
    ]  # fmt: skip


def test_a_dry_run_shows_and_leaves_nothing(saekit, model_dir, text_file, tmp_path):  # noqa: F811
    options = ["--num-latents", 64, "--k", 4, "--ctx-len", 32]
    done = saekit("train", model_dir, text_file, *options, "--dry-run")
    assert done.code == 0, done.err
    config, _, table = done.out.partition("\n\n")
    assert yaml.safe_load(config)["k"] == 4
    assert yaml.safe_load(config)["batch_size"] == 8
    assert "single" in table
    assert not (tmp_path / "checkpoints").exists()
    done = saekit("train", model_dir, text_file, *options, "--dry-run", "--launch", "ddp-cpu")
    assert all(placement in done.out for placement in ("ddp", "layer-map", "zero3"))
    assert "2 ranks share its memory" in done.out
