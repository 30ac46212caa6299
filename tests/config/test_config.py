from pathlib import Path

import pytest

from saekit import RunConfig, Sae, SaeConfig, TrainConfig, UserError
from saekit.config.flat import read_yaml
from saekit.registry import SELECTIONS

BASE = {"model": "m", "dataset": "d"}


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        *(
            ("3", (3,)),
            ("16,24", (16, 24)),
            ("0-6:2", (0, 2, 4, 6)),
            ("1, 3-5", (1, 3, 4, 5)),
            (7, (7,)),
            ([1, 2], (1, 2)),
        ),
        *(("1 2", (1, 2)), (" 1  3 - 5 ", (1, 3, 4, 5))),
    ],
)
def test_layers(text, layers):
    assert TrainConfig(layers=text).layers == layers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "0-4:0", [], "1-", "0-99999999999", True, [True]])
def test_layers_that_mean_nothing(text):
    with pytest.raises(ValueError, match="layers"):
        TrainConfig(layers=text)


@pytest.mark.parametrize(
    ("given", "patterns"),
    [
        ("layers.{0,3-5}.mlp, resid", ("layers.{0,3-5}.mlp", "resid")),
        (["mlp", "layers.{0,1}:in,attn"], ("mlp", "layers.{0,1}:in", "attn")),
        ("h.*.{a,b}_proj:in", ("h.*.{a,b}_proj:in",)),
        ("mlp layers.{0, 1}:in", ("mlp", "layers.{0, 1}:in")),
    ],
)
def test_hookpoints_are_separated_by_commas_and_spaces_outside_braces(given, patterns):
    assert TrainConfig(hookpoints=given).hookpoints == patterns


@pytest.mark.parametrize("given", ["", ",", [], [3], 3, True])
def test_hookpoints_that_mean_nothing(given):
    with pytest.raises(UserError, match="--hookpoints"):
        TrainConfig(hookpoints=given)


@pytest.mark.parametrize("ids", ["-1", "5,-1", [-1], [True], "a"])
def test_ids_that_are_none(ids):
    with pytest.raises(ValueError, match="--exclude-tokens"):
        TrainConfig(exclude_tokens=ids)


@pytest.mark.parametrize("name", ["k", "batch_size", "lr", "max_norm_multiple"])
def test_yes_is_no_number(name):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} true: expected a number"):
        RunConfig.from_flat({**BASE, name: True})


def test_a_key_given_twice():
    with pytest.raises(UserError, match="--data-args 'a=1,a=2': 'a' is given twice"):
        RunConfig.from_flat({**BASE, "data_args": "a=1,a=2"})


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("2023-11-01", "2023-11-01"), ("true", True), ("3", 3), ("20231101.en", "20231101.en"), ("", None)],
)
def test_arguments_of_a_data_set(text, value):
    assert RunConfig.from_flat({**BASE, "data_args": f"name={text}"}).data.data_args == {"name": value}


def test_a_day_that_does_not_exist_is_no_fault_of_ours():
    with pytest.raises(UserError, match="'2023-13-01' cannot be read as YAML"):
        RunConfig.from_flat({**BASE, "data_args": "name=2023-13-01"})


def test_the_field_knows_its_recipe():
    cfg = TrainConfig(SaeConfig(768), batch_size=16)
    assert cfg.sae.resolve_num_latents(768) == 32 * 768
    assert (cfg.sae.k, cfg.optimizer, cfg.sae.normalize_decoder) == (32, "adam", True)


def test_sizes():
    assert SaeConfig(num_latents=100).resolve_num_latents(7) == 100
    assert SaeConfig(expansion_factor=4).resolve_num_latents(16) == 64
    with pytest.raises(ValueError, match="both set the size"):
        SaeConfig(num_latents=100, expansion_factor=2)
    with pytest.raises(ValueError, match="--k 101 is larger"):
        SaeConfig(num_latents=100, k=101)
    with pytest.raises(ValueError, match="d_in = 8"):
        SaeConfig(8).resolve_num_latents(16)


def test_nested_dictionaries():
    cfg = SaeConfig(num_latents=1000, matryoshka="0.125,0.25,1")
    assert cfg.resolve_prefixes(1000) == (125, 250, 1000)
    assert SaeConfig().resolve_prefixes(1000) == ()
    for wrong in ("0.5", "1", "0.5,0.25,1", "0.5,0.9", "0,1", "0.5,2", "a,1", ""):
        with pytest.raises(ValueError, match="shares"):
            SaeConfig(matryoshka=wrong)
    with pytest.raises(ValueError, match=r"makes dictionaries of 50, 50, 100 latents"):
        SaeConfig(num_latents=100, matryoshka=(0.5, 0.501, 1))
    with pytest.raises(ValueError, match="makes dictionaries of 0, 32"):
        SaeConfig(expansion_factor=32, k=1, matryoshka=(0.01, 1)).resolve_num_latents(1)
    with pytest.raises(ValueError, match="--multi-topk"):
        SaeConfig(matryoshka=(0.5, 1), multi_topk=True)


def test_activations():
    assert {"topk", "batchtopk", "groupmax"} <= set(SELECTIONS.names())
    for name in ("topk", "batchtopk", "groupmax"):
        assert Sae(**SaeConfig(activation=name, k=4).sizes(8, 32)).activation == name
    assert SaeConfig().activation == "topk"
    assert SaeConfig(activation="batchtopk", matryoshka="0.5,1").activation == "batchtopk"
    with pytest.raises(ValueError, match="--multi-topk is for --activation topk"):
        SaeConfig(activation="batchtopk", multi_topk=True)
    with pytest.raises(ValueError, match="activation"):
        SaeConfig(activation="relu")


def test_flat_and_back():
    values = {
        **BASE,
        "layers": "0-2",
        "data_args": "name=en,streaming=true",
        "k": 5,
        "matryoshka": "0.25,1",
        "activation": "batchtopk",
        "exclude_tokens": "1,2",
        "lr": 0.1,
    }
    cfg = RunConfig.from_flat(values)
    flat = cfg.to_flat()
    assert flat["layers"] == [0, 1, 2]
    assert flat["matryoshka"] == [0.25, 1]
    assert flat["data_args"] == {"name": "en", "streaming": True}
    assert flat["exclude_tokens"] == [1, 2]
    assert RunConfig.from_flat(flat) == cfg


def test_secrets_are_not_shown():
    cfg = RunConfig.from_flat({**BASE, "hf_token": "hf_secret"})
    assert cfg.model.hf_token.get_secret_value() == "hf_secret"
    assert "hf_secret" not in repr(cfg) + str(cfg.to_flat())


def test_everything_that_is_wrong_is_said():
    with pytest.raises(UserError) as refused:
        RunConfig.from_flat({**BASE, "k": 0, "lr": "fast", "nosuch": 1, "layers": "x"})
    for part in ("--k 0", "--lr 'fast'", "no option 'nosuch'", "--layers 'x'"):
        assert part in str(refused.value)


def test_configs_cannot_be_changed():
    with pytest.raises(AttributeError):
        TrainConfig().batch_size = 3


def test_the_example_file_is_a_configuration():
    values = read_yaml(Path(__file__).parents[2] / "examples" / "run.yaml")
    assert RunConfig.from_flat(values).train.layers == (0, 2, 4, 6, 8, 10)
