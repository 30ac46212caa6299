"""`saekit hookpoints`: in process, for models of many kinds."""

import io
import json

import pytest
from rich.console import Console

from saekit.activations.structure import measure
from saekit.views.hookpoints import describe, render_modules
from tests.activations.odd_models import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tree_has_every_module_once_and_fits_a_terminal(name):
    structure = measure(None, CONFIGS[name])
    out = io.StringIO()
    render_modules(name, structure, Console(file=out, width=80))
    table, short = out.getvalue().split("\n\nresid ")
    rows = table.splitlines()[3:]
    assert all(len(line.rstrip()) <= 80 for line in table.splitlines())
    assert len(rows) < 45, "repeated blocks are folded into one line"
    assert short.count(structure.prefix) >= 4
    blocks = f"{structure.prefix.split('.')[-1]}.{{0-{structure.depth - 1}}}"
    assert any(line.split()[0].endswith(blocks) for line in rows) or name == "qwen3-next"
    found = describe(name, structure, ["resid"])
    assert json.loads(json.dumps(found)) == found
    assert [each["name"] for each in found["matched"]] == [f"{structure.prefix}.{i}" for i in range(structure.depth)]
    assert {each["width"] for each in found["matched"]} == {found["d_in"]} == {32}


def test_the_command_shows_modules_and_what_a_pattern_means(saekit, model_dir):
    done = saekit("hookpoints", model_dir)
    assert done.code == 0, done.err
    assert "attn      outputs of the blocks' attention: layers.{0-2}.self_attn" in done.out
    assert "    down_proj" in done.out
    done = saekit("hookpoints", model_dir, "layers.{0-2:2}.mlp,layers.*.mlp.down_proj:in,rotary_emb")
    assert done.code == 0, done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[1:] == [
        "layers.{0-2}.mlp.down_proj:in 3 32",
        "layers.{0,2}.mlp 2 16 writes to the residual stream",
        "rotary_emb cannot be read: it outputs [1, tokens, 8], not [batch, tokens, width]",
    ]
    done = saekit("hookpoints", model_dir, "mlp:in", "--json")
    (first, *_) = json.loads(done.out)["matched"]
    assert first == {"name": "layers.0.mlp:in", "width": 16, "reason": None, "writes_to_residual_stream": False}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["layers.*.mpl"],
            "Error: --hookpoints layers.*.mpl: there is no such module, but there are layers.{0-2}.self_attn",
        ),
        ([""], "Error: --hookpoints"),
    ],
)
def test_what_is_wrong_is_one_line(saekit, model_dir, arguments, says):
    done = saekit("hookpoints", model_dir, *arguments)
    assert done.code == 2
    assert done.err.startswith(says)
    assert done.err.count("\n") == 1
