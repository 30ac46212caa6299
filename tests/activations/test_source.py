"""A source from outside the package is one file, and no other file needs to know of it."""

import json

import pytest
import torch

from saekit import Sae, SaeConfig, SaeTrainer, TrainConfig, UserError
from saekit.activations.live import LiveModel
from saekit.report import Reporters
from tests.cli.conftest import saekit  # noqa: F401  # a fixture
from tests.training.conftest import make_trainer, tiny_llama, tokens  # noqa: F401  # fixtures
from tests.training.runs import assert_same_tensors, tensors_of

ONE_FILE = '''
import torch

from saekit.activations.hookpoints import Hookpoint
from saekit.activations.source import Activations, Source
from saekit.registry import SOURCES


@SOURCES.register("directions")
class Directions(Source):
    """Sums of a few of 48 directions, of two widths; a function of step and seed."""

    name, data_name, ctx_len, num_sequences = "directions", "none", 16, 8 * 12

    def __init__(self, cfg, placement, say, have):
        say("Making up activations")

    def begin(self, cfg, device, rank, world_size):
        self.hookpoints = (Hookpoint("layers.0", 12), Hookpoint("layers.0.mlp", 20))
        self.device, self.global_batch, self.slice = device, cfg.batch_size * world_size, (rank, world_size)

    def read(self, step):
        return [step]

    def checksum(self, step):
        return str(step)

    def count(self, step):
        return self.global_batch // self.slice[1] * self.ctx_len

    def __call__(self, step):
        of = {}
        for hookpoint in self.hookpoints:
            generator = torch.Generator().manual_seed(hookpoint.seed(0))
            directions = torch.randn(48, hookpoint.width, generator=generator)
            generator.manual_seed(step)
            chosen = torch.rand(self.global_batch * self.ctx_len, 48, generator=generator) < 0.05
            rank, world_size = self.slice
            of[hookpoint.name] = (chosen.float() @ directions).tensor_split(world_size)[rank].to(self.device)
        return Activations(of)
'''


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "directions.py"
    file.write_text(ONE_FILE, encoding="utf-8")
    return file


def test_it_trains_through_the_command_line(plugin, saekit, tmp_path):  # noqa: F811
    """Two hookpoints of two widths, neither of which any language model gave."""
    command = ("train", "directions", "none", "--plugin", plugin, "--source", "directions", "--save-dir", tmp_path)
    done = saekit(*command, "--expansion-factor", 4, "--k", 3, "--batch-size", 8, "--run-name", "run", "--log-every", 1)
    assert done.code == 0, done.err
    saes = Sae.load_many(tmp_path / "run")
    assert {name: (sae.d_in, sae.num_latents) for name, sae in saes.items()} == {
        "layers.0": (12, 48),
        "layers.0.mlp": (20, 80),
    }
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    fvus = [[layer["fvu"] for layer in each["layers"].values()] for each in steps if "layers" in each]
    assert len(fvus) == 12
    assert all(last < 0.9 * first for first, last in zip(fvus[0], fvus[-1], strict=True))
    index = json.loads((tmp_path / "run" / "latest" / "checkpoint.json").read_text())
    assert index["resolved"]["num_latents"] == {"layers.0": 48, "layers.0.mlp": 80}
    assert index["resolved"]["d_in"] == {"layers.0": 12, "layers.0.mlp": 20}
    inspected = saekit("inspect", tmp_path / "run", "--json")
    assert inspected.code == 0, inspected.err


@pytest.mark.slow
def test_units_of_several_widths_under_each_placement(plugin, tmp_path, forked):
    """The same SAEs in one process and on two ranks, of which each has a unit of another width under layer-map."""
    found = {}
    for name, count in (("single", None), ("ddp", 2), ("layer-map", 2), ("zero3", 2)):
        command = ["train", "directions", "none", "--plugin", plugin, "--source", "directions", "--k", 3]
        command += ["--batch-size", 8 // (count or 1), "--expansion-factor", 4, "--activation", "batchtopk"]
        command += ["--save-dir", tmp_path, "--run-name", name, *(["--placement", name] if count else [])]
        said = tmp_path / f"{name}.txt"
        assert not any(forked.run(command, count, said, tmp_path, 120, devices=name == "layer-map")), said.read_text()
        found[name] = tensors_of((tmp_path / name / "latest").resolve())
    for name in ("ddp", "layer-map", "zero3"):
        assert_same_tensors(found[name], found["single"], rtol=1e-4, atol=1e-5)


def test_without_the_plug_in_there_is_none_of_that_name(saekit):  # noqa: F811
    done = saekit("train", "directions", "none", "--source", "directions_2")
    assert done.code == 2
    assert "there is no source of that name: choose one of live" in done.err


def test_only_a_live_model_is_evaluated_in_training(plugin, saekit, tmp_path):  # noqa: F811
    command = ("train", "directions", "none", "--plugin", plugin, "--source", "directions", "--save-dir", tmp_path)
    done = saekit(*command, "--num-latents", 64, "--eval-every", 2)
    assert done.code == 2
    assert "eval_every needs the language model, but the source directions only gives its activations" in done.err


def test_what_was_begun_is_forgotten_when_reading_ends(tiny_llama, tokens):  # noqa: F811
    """Else a run that is stopped would keep the activations of its next step."""
    source = LiveModel(tiny_llama, tokens)
    source.begin(TrainConfig(batch_size=2), torch.device("cpu"), 0, 1)

    def stopped():
        with source.open():
            source.prefetch(source.read(0)[0])
            assert source._begun is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert source._begun is None


def test_a_trainer_needs_a_model_and_data_or_a_source(tiny_llama, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="needs a data set and a language model, or a source"):
        SaeTrainer(TrainConfig(save_dir=tmp_path), None, tiny_llama, reporter=Reporters())


@pytest.mark.parametrize("options", [{}, {"grad_acc_steps": 2, "batch_size": 4, "micro_acc_steps": 2}], ids=str)
def test_masked_tokens_train_as_dropped_ones_do(make_trainer, tiny_llama, tokens, tmp_path, options):  # noqa: F811
    """A whole run, whose last step is shorter than the others, and dropped for all."""
    dropped = make_trainer("dropped", **options).fit()
    settings = {"batch_size": 8, "lr": 1e-2, "lr_warmup_steps": 2, "dead_feature_threshold": 150, **options}
    cfg = TrainConfig(
        SaeConfig(num_latents=64, k=4), save_dir=tmp_path, run_name="masked", auxk_alpha=1 / 32, **settings
    )
    seen = []
    source = LiveModel(tiny_llama, tokens, fixed_rows=True)
    masked = SaeTrainer(cfg, source=source, reporter=Reporters())
    real = source._run

    def run(batch):
        acts = real(batch)
        seen.append((next(iter(acts.of.values())).shape[0], acts.counted_N is not None))
        return acts

    source._run = run
    folder = masked.fit()
    full = 96 // options.get("grad_acc_steps", 1)
    assert seen[:-2].count((full, True)) >= len(seen) - 4, "every whole step has the same shape"
    assert seen[-1][1] is False
    assert_same_tensors(tensors_of(folder), tensors_of(dropped), rtol=1e-3, atol=1e-5)
