"""What patterns and short names mean in language models of many kinds, from their configs alone."""

import fnmatch

import pytest
import torch
from transformers import AutoModel

from saekit import TrainConfig, UserError
from saekit.activations import tap
from saekit.activations.chosen import chosen, chosen_in
from saekit.activations.lm import shape_of
from saekit.activations.matching import choose, matched
from saekit.activations.patterns import alternatives, fold, matches
from saekit.activations.structure import measure
from tests.activations.odd_models import CONFIGS

MLP, ATTENTION = {}, {}
for name, prefix, mlp, attention in (
    ("gpt2", "h", "mlp", "attn"),
    ("gpt-neox", "layers", "mlp", "attention"),
    ("llama", "layers", "mlp", "self_attn"),
    ("gemma-3", "language_model.layers", "mlp", "self_attn"),
    ("qwen3", "layers", "mlp", "self_attn"),
    ("qwen3-moe", "layers", "mlp", "self_attn"),
    ("modernbert", "layers", "mlp", "attn"),
    ("falcon", "h", "mlp", "self_attention"),
    ("qwen3-next", "layers", "mlp", "no single module that is its attention.*layers.{0-2}.linear_attn"),
    (
        "mamba-2",
        "layers",
        "no single module that is its MLP.*layers.{0-2}.mixer",
        "no single module.*layers.{0-2}.mixer",
    ),
    (
        "bert",
        "encoder.layer",
        "no single module that is its MLP.*encoder.layer.{0-2}.output",
        "no single module that is its att",
    ),
):
    MLP[name], ATTENTION[name] = (prefix, mlp), (prefix, attention)


def structure(name):
    return measure(None, CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_short_names_are_found_by_structure(name):
    found = structure(name)
    depth = found.depth
    assert matched(found, "resid") == [f"{found.prefix}.{layer}" for layer in range(depth)]
    assert choose(found, ["resid"]).hookpoints == chosen(TrainConfig(), shape_of(CONFIGS[name])).hookpoints
    for short, (prefix, path) in (("mlp", MLP[name]), ("attn", ATTENTION[name])):
        assert found.prefix == prefix
        if "single module" in path:
            with pytest.raises(UserError, match=path.replace("{", r"\{")):
                matched(found, short)
        else:
            assert matched(found, short) == [f"{prefix}.{layer}.{path}" for layer in range(depth)]
            assert matched(found, f"{short}:in") == [f"{prefix}.{layer}.{path}:in" for layer in range(depth)]


@pytest.mark.parametrize("name", CONFIGS)
def test_widths_and_order_are_those_of_a_run(name):
    """All hookpoints of a real model at once."""
    found = structure(name)
    names = [each for each, reading in found.readings.items() if reading.reason is None]
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name]).eval()
    hookpoints = chosen_in(TrainConfig(hookpoints=tuple(names)), model)
    order = [each.name for each in hookpoints]
    assert sorted(order) == sorted(names)
    assert order.index(f"{found.prefix}.0") < order.index(f"{found.prefix}.1")
    with tap(model, order) as read:
        acts = read(torch.randint(5, 99, (2, 9)))
    assert {each.name: each.width for each in hookpoints} == {name: x.shape[2] for name, x in acts.items()}
    assert {x.shape[:2] for x in acts.values()} == {(2, 9)}


@pytest.mark.parametrize(
    ("model", "pattern", "says"),
    [
        (
            "qwen3-moe",
            "layers.*.mlp.experts",
            r"layers.\{0-2\}.mlp.experts cannot be read: .* outputs \[batch·tokens, 32\]",
        ),
        (
            "qwen3",
            "layers.*.self_attn.q_norm",
            r"q_norm outputs \[batch, tokens, 4, 16\], not \[batch, tokens, width\]",
        ),
        ("gemma-3", "vision_tower.*", "does not run for text"),
        ("llama", "layers", "layers cannot be read: layers is a list of modules"),
        ("llama", "embed_tokens:in", "embed_tokens:in reads integers"),
        (
            "llama",
            "layers.*.mpl",
            r"there is no such module, but there are layers.\{0-2\}.self_attn, layers.\{0-2\}.mlp",
        ),
        ("llama", "layers.{0-5}.mlp", r"layers.\{0-5\}.mlp \(layers.3.mlp\): there is no such module"),
        ("llama", "resid_pre:in", "resid_pre already is the blocks' input"),
        ("llama", "layers.0.mlp:out", "':out' is not valid: write :in for a module's input"),
        ("llama", "layers.{0-2.mlp", "braces are unbalanced or nested"),
        ("llama", "layers..mlp", "a part of the path is empty"),
        ("llama", "layers.{3-1}.mlp", "the range '3-1' is empty"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(model, pattern, says):
    with pytest.raises(UserError, match=says):
        choose(structure(model), [pattern])


def test_modules_that_run_several_times_are_refused():
    config = CONFIGS["llama"]

    class Shared(type(AutoModel.from_config(config))):
        def __init__(self, config):
            super().__init__(config)
            self.layers[2].mlp = self.layers[0].mlp

    found = measure(Shared, config)
    with pytest.raises(UserError, match=r"layers.\{0,2\}.mlp cannot be read: layers.0.mlp runs 2 times in a forward"):
        choose(found, ["layers.*.mlp"])
    assert [each.name for each in choose(found, ["layers.1.mlp"]).hookpoints] == ["layers.1.mlp"]


@pytest.mark.parametrize(
    ("patterns", "options", "names", "depth"),
    [
        (["mlp"], {"layers": (1,)}, ["layers.1.mlp"], 2),
        (["mlp", "resid"], {"stride": 2}, ["layers.0.mlp", "layers.0", "layers.2.mlp", "layers.2"], 3),
        (["layers.1.**.{q,o}_proj:in"], {}, ["layers.1.self_attn.q_proj:in", "layers.1.self_attn.o_proj:in"], 2),
        (["resid", "layers.0"], {"layers": (0,)}, ["layers.0"], 1),
        (["norm", "layers.0"], {}, ["layers.0", "norm"], 3),
        (["embed_tokens"], {}, ["embed_tokens"], 1),
        (["layers.1:in"], {}, ["layers.1:in"], 2),
        (
            ["layers.{0-2:2}.mlp.*_proj"],
            {"layers": (2,)},
            [f"layers.2.mlp.{x}_proj" for x in ("gate", "up", "down")],
            3,
        ),
    ],
)
def test_patterns_are_narrowed_and_in_the_order_of_a_forward_pass(patterns, options, names, depth):
    found = choose(structure("llama"), patterns, **options)
    assert [each.name for each in found.hookpoints] == names
    assert found.depth == depth, "blocks after the last hookpoint are not loaded"


def test_a_pattern_of_sparsifys_means_what_fnmatch_makes_of_it():
    found = structure("qwen3")
    paths = [name for name in found.readings if not name.endswith(":in")]
    for pattern in ("layers.*.mlp", "layers.[02].mlp", "layers.?.self_attn.o_proj", "*norm"):
        assert [name for name in paths if fnmatch.fnmatch(name, pattern) and name.count(".") == pattern.count(".")] == (
            matched(found, pattern)
        )


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["h.0", "h.1", "h.2"], ["h.{0-2}"]),
        (["h.0:in", "h.2:in", "h.4:in"], ["h.{0-4:2}:in"]),
        (["h.1.mlp", "norm", "h.3.mlp"], ["h.{1,3}.mlp", "norm"]),
        (["a.0", "a.1", "a.2", "a.5", "a.7"], ["a.{0-2,5,7}"]),
        ([f"a.{i}.e.{j}.w" for i in (0, 1) for j in (0, 1, 2)], ["a.{0,1}.e.{0-2}.w"]),
        (["a.10", "a.9"], ["a.{9,10}"]),
    ],
)
def test_folded_names_are_patterns_that_mean_them(names, patterns):
    folded = fold(names)
    assert list(folded) == patterns
    for pattern, own in folded.items():
        assert {name for name in names if any(matches(each, name) for each in alternatives(pattern))} == set(own)


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({"transcode": True, "layers": "0"}, 1),
        ({"reads": "h.0.mlp.c_proj:in", "writes": "h.1.attn"}, 2),
        ({"reads": "resid_pre", "writes": "resid", "layers": "0-1"}, 2),
        ({"crosscode": "h.{0-1}"}, 2),
    ],
)
def test_blocks_behind_what_is_written_are_not_loaded(options, depth):
    assert chosen(TrainConfig(**options), shape_of(CONFIGS["gpt2"])).depth == depth


def test_a_second_model_has_the_same_hookpoints_in_its_own_widths():
    llama, qwen3 = (shape_of(CONFIGS[name]) for name in ("llama", "qwen3"))

    def pairs(**options):
        found = chosen(TrainConfig(crosscode_models="b", **options), llama, qwen3)
        widths = [[(part.name, part.width) for part in site.parts] for site in found.sites]
        assert [site.name for site in found.sites] == [parts[0][0] for parts in widths]
        assert all(site.kind == "crosscoder" and site.of_two_models for site in found.sites)
        return widths, found.depth, found.other_depth

    blocks, *depths = pairs(layers=(0, 1))
    assert (blocks[1], depths) == ([("layers.1", 32), ("other.layers.1", 32)], [2, 2])
    heads, *depths = pairs(hookpoints=("layers.{0-1}.self_attn.o_proj:in",))
    name = "layers.1.self_attn.o_proj:in"
    assert (heads[1], depths) == ([(name, 32), (f"other.{name}", 64)], [2, 2])


@pytest.mark.parametrize(
    ("hookpoints", "other", "problem"),
    [
        (
            None,
            "gpt2",
            "--crosscode-models b: it has no layers.0, its layers are h.0 to h.2. Choose hookpoints that both models",
        ),
        (("mlp",), "mamba-2", "--crosscode-models b: it has no layers.0.mlp, its layers are layers.0 to layers.2"),
        (("layers.0.mlp.gate_proj",), "qwen3-moe", "--crosscode-models b: it has no layers.0.mlp.gate_proj, its"),
    ],
)
def test_what_a_second_model_does_not_have_is_refused(hookpoints, other, problem):
    cfg = TrainConfig(crosscode_models="b", hookpoints=hookpoints)
    with pytest.raises(UserError, match=problem):
        chosen(cfg, shape_of(CONFIGS["llama"]), shape_of(CONFIGS[other]))
