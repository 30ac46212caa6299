"""Under ddp all ranks have the same SAEs, to the bit, from the start to the end; if not, nothing is saved."""

import json

import pytest
import torch

from saekit.placement import replicas
from saekit.placement.replicas import checksum, strays
from tests.placement.conftest import CTX_LEN, DEMO_LM
from tests.placement.replicas import NAMES

DRIFTS = """
import torch

from saekit.registry import SOURCES


@SOURCES.register("drifts")
def open_drifting(cfg, placement, say, have):
    apply, steps = placement.apply, []

    def apply_and_drift(lr_scale):
        apply(lr_scale)
        steps.append(lr_scale)
        if (placement.rank, len(steps)) == (1, 3):
            with torch.no_grad():
                placement.sae("layers.4").W_enc[3, 2] += 1e-3

    placement.apply = apply_and_drift
    return SOURCES.get("live")(cfg, placement, say, have)
"""


@pytest.fixture(scope="module")
def placed(tmp_path_factory, forked):
    """What `tests.placement.replicas` finds on two ranks."""
    folder = tmp_path_factory.mktemp("replicas")
    codes = forked.run([folder / "found"], 2, folder / "said", folder, 90, script=replicas_script())
    assert codes == [0, 0], (folder / "said").read_text()
    return json.loads((folder / "found").read_text())


def replicas_script():
    from tests.placement import replicas as script

    return script.__file__


@pytest.mark.slow
def test_one_rank_makes_an_sae_and_all_have_it(placed):
    assert placed["blank"] == [["layers.1"], ["layers.0", "layers.2"]]
    assert placed["thresholds"] == [[0.0, 11.0, 2.0]] * 2
    for what in ("weights", "sums", "optimizers"):
        first, second = placed[what]
        assert first == second, what
    assert len(set(placed["sums"][0])) == len(NAMES)


@pytest.mark.slow
def test_a_replica_that_differs_in_one_bit_is_found(placed):
    assert placed["strays"] == [{}, {"layers.1": [1]}, {"layers.1": [1], "layers.2": [1]}]


@pytest.mark.slow
@pytest.mark.usefixtures("lost_unnoticed")
def test_replicas_that_differ_are_not_saved(tmp_path, forked, token_dir):
    (tmp_path / "drifts.py").write_text(DRIFTS)
    sizes = ["--num-latents", 64, "--k", 4, "--ctx-len", CTX_LEN, "--batch-size", 2, "--max-tokens", 40 * CTX_LEN]
    options = [*sizes, "--placement", "ddp", "--save-dir", tmp_path, "--run-name", "run", "--save-every", 2]
    command = ["train", DEMO_LM, token_dir, *options, "--plugin", tmp_path / "drifts.py", "--source", "drifts"]
    codes = forked.run(command, 2, tmp_path / "said", tmp_path, timeout=90)
    said = (tmp_path / "said").read_text("utf-8")
    assert 0 not in codes, said
    differs = "layers.4: the SAE of rank 1 differs from that of the other ranks at step 4"
    assert said.count("Error: ") == said.count(differs) == 1
    assert f"--resume {tmp_path / 'run'} continues" in said
    assert (tmp_path / "run" / "latest").resolve().name == "step_00000002"
    assert not list((tmp_path / "run").glob(".step*"))


def test_the_checksum_sees_every_bit_and_place(monkeypatch):
    monkeypatch.setattr(replicas, "BLOCK", 7)
    tensors = [torch.randn(5, 4), torch.randn(3, dtype=torch.float64), torch.randn(9).bfloat16(), torch.tensor(2.0)]
    usual = int(checksum(tensors))
    assert int(checksum([each.clone() for each in tensors])) == usual
    for tensor in tensors:
        bits = tensor.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
        for place in range(tensor.numel()):
            for bit in range(8 * tensor.element_size()):
                before = bits.clone()
                bits[place] ^= 1 << bit if bit < 8 * tensor.element_size() - 1 else -(1 << bit)
                assert int(checksum(tensors)) != usual
                bits[(place + 1) % len(bits)] ^= bits[place] ^ before[place]  # the same one of its neighbor
                assert len(bits) == 1 or int(checksum(tensors)) != usual
                bits.copy_(before)
    swapped = tensors[0].flatten()
    swapped[[0, 13]] = swapped[[13, 0]]
    assert int(checksum([swapped, *tensors[1:]])) != usual


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [((5, 5, 5), []), ((5, 5, 6), [2]), ((6, 5, 5), [0]), ((5, 6), [1]), ((1, 2, 3), [1, 2])],
)
def test_the_odd_ones_are_named(of_ranks, expected):
    assert strays({"h": of_ranks}) == ({"h": expected} if expected else {})
