"""The benchmarks start, and what they time is a unit's own step. What they find is in docs/performance.md."""

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"

TINY = """
import recipe_cost
import torch
from common import activations

x_ND = activations(64, 16)
for name, recipe in recipe_cost.RECIPES.items():
    unit = recipe_cost.make_unit(recipe, x_ND, 64, 4, dead=0.25)
    before = [parameter.clone() for parameter in unit.sae.parameters()]
    unit.step()
    unit.passes()
    dead = unit.bank.num_dead.values()
    assert list(dead) == [16], f"{name}: {dead}"
    assert all(each.isfinite().all() for each in unit.held()), name
    changed = [not torch.equal(*pair) for pair in zip(before, unit.sae.parameters(), strict=True)]
    assert any(changed), name
"""


def test_a_recipe_is_trained_by_the_loops_own_step_and_every_benchmark_can_be_imported(forked):
    """Without the peers, whose scripts lie apart."""
    names = sorted(file.stem for file in FOLDER.glob("*.py"))
    names.sort(key="same_numbers".__eq__)  # last, for it takes the others off the search path
    environment = forked.environment(PYTHONPATH=os.pathsep.join([str(FOLDER), str(FOLDER.parent)]))
    done = forked.complete("-c", "\n".join([TINY, *(f"import {name}" for name in names)]), environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
