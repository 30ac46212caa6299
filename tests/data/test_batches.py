from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset

from saekit import UserError
from saekit.data import StepBatches, sequences


@pytest.fixture(scope="module")
def data():
    """100 sequences of 4 tokens; each starts with its number."""
    return sequences(Dataset.from_dict({"input_ids": [[n, 0, 0, 0] for n in range(100)]}))


def numbers(batches, step, world_size=1, micro_batches=1):
    parts = [list(batches.step(step, rank, world_size, micro_batches)) for rank in range(world_size)]
    return [
        torch.cat([parts[rank][micro] for rank in range(world_size)])[:, 0].tolist() for micro in range(micro_batches)
    ]


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (1, 3), (4, 2), (3, 8), (24, 1)])
def test_a_step_does_not_depend_on_how_it_is_split(data, world_size, micro_batches):
    batches = StepBatches(data, 24, seed=1)
    assert batches.num_steps == 5
    for step in range(5):
        split = list(chain(*numbers(batches, step, world_size, micro_batches)))
        assert split == numbers(batches, step)[0]
        assert len(split) == (24 if step < 4 else 4)


def test_every_sequence_once(data):
    batches = StepBatches(data, 24, seed=3)
    seen = list(chain(*(numbers(batches, step)[0] for step in range(batches.num_steps))))
    assert sorted(seen) == list(range(100))
    assert seen != sorted(seen)


def test_the_seed_decides_the_order(data):
    first, same, other, plain = (StepBatches(data, 10, seed) for seed in (5, 5, 6, None))
    assert numbers(first, 3) == numbers(same, 3)
    assert numbers(first, 3) != numbers(other, 3)
    assert numbers(plain, 3) == [list(range(30, 40))]


def test_max_tokens(data):
    batches = StepBatches(data, 10, seed=5, max_tokens=4 * 35 + 3)
    assert (batches.num_sequences, batches.num_steps) == (35, 4)
    assert numbers(batches, 1) == numbers(StepBatches(data, 10, seed=5), 1)


def test_less_than_one_step(data):
    with pytest.raises(UserError, match="100 sequences of 4 tokens, fewer than one optimizer step of 101"):
        StepBatches(data, 101, seed=0)


def test_ids_are_int64(data):
    assert data.read(np.array([3, 1])).dtype == torch.int64
    assert data.read(np.array([], dtype=np.int64)).shape == (0, 4)
