"""Real runs of the command line on several processes that speak gloo."""

import subprocess
from itertools import count
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from saekit.demo import MODEL_DIR
from tests.forked import ROOT

DEMO_LM = MODEL_DIR
STEPS, CTX_LEN, GLOBAL_BATCH = 12, 16, 12
SEQUENCES = STEPS * GLOBAL_BATCH - 5
"""The last step has too few sequences for all ranks."""


@pytest.fixture
def lost_unnoticed(monkeypatch):
    """A rank whose peer is gone waits on in the data group, where no signal's handler runs: as under NCCL."""
    monkeypatch.setenv("STRICT_LOST", "hang")


def save_gpt2(folder, tokenizer_of, seed, **sizes):
    """Save a small GPT-2 with random weights; returns its folder."""
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=2048, n_positions=32, n_head=2, bos_token_id=0, eos_token_id=1, **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory, model_dir):
    """A GPT-2 of two layers, and a tokenizer for its folder."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), model_dir, 0, n_embd=24, n_layer=2)


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory, gpt2_dir):
    """A narrower GPT-2 of three layers, with the same tokenizer."""
    return save_gpt2(tmp_path_factory.mktemp("other"), gpt2_dir, 1, n_embd=16, n_layer=3)


@pytest.fixture(scope="session")
def token_dir(tmp_path_factory):
    """Random tokens; a tenth of them is left out of the training, unevenly, so that ranks have different counts."""
    folder = tmp_path_factory.mktemp("tokens") / "data"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2000, (SEQUENCES, CTX_LEN), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = 5
    Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory, gpt2_dir, token_dir):
    """A GPT-2 whose activations are NaN where it reads one token, and data that have it in steps 4, 8 and 9.

    On two ranks, one of them sees it first, then the other.
    """
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("overflowing")
    model = GPT2LMHeadModel.from_pretrained(gpt2_dir)
    with torch.no_grad():
        model.transformer.wte.weight[2001] = float("nan")
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(gpt2_dir).save_pretrained(folder / "model")
    ids = Dataset.load_from_disk(token_dir)["input_ids"][:]
    for step, place in ((4, 2), (8, 7), (9, 11)):
        ids[(step - 1) * GLOBAL_BATCH + place][3] = 2001
    Dataset.from_dict({"input_ids": ids}).save_to_disk(folder / "data")
    return folder / "model", folder / "data"


@pytest.fixture(scope="session")
def train(tmp_path_factory, token_dir, forked):
    """Run `saekit train` on some ranks and return the run's folder; each different command runs once."""
    root = tmp_path_factory.mktemp("runs")
    done: dict[tuple, Path] = {}
    numbers = count()  # not of what is done: a run that failed has left its folder

    def run(
        model,
        *options,
        ranks=1,
        batch_size=None,
        expect=0,
        launch_file=None,
        name=None,
        data=token_dir,
        script=None,
        devices=False,
    ):
        key = (str(model), str(data), ranks, batch_size, launch_file, name, script, devices, *options)
        if key in done:
            return done[key]
        name = name or f"run{next(numbers)}"
        sizes = [
            "--batch-size",
            batch_size or GLOBAL_BATCH // ranks,
            "--num-latents",
            256,
            "--k",
            4,
        ]  # so many that some die
        settings = ["--lr", 1e-3, "--lr-warmup-steps", 2, "--dead-feature-threshold", 300, "--exclude-tokens", 5]
        settings += ["--auxk-alpha", 1 / 32]
        # Bit-exact work: in bfloat16 the split of a batch over ranks shows in the activations' last bits.
        settings += ["--select-dtype", "fp32", *([] if "--dtype" in options else ["--dtype", "float32"])]
        place = ["--ctx-len", CTX_LEN, "--save-dir", root, "--run-name", name]
        command = ["train", model, data, *sizes, *settings, *place, *options]
        said = root / f"{name}.stderr"
        if launch_file is None:
            some = ranks if ranks > 1 or "zero3" in options else None
            codes = forked.run(command, some, said, root, timeout=300, script=script, devices=devices)
            code = int(any(codes))
            assert bool(code) == all(codes), said.read_text()  # the ranks fail together
        else:
            code = launch(forked, launch_file, command, ranks, said, root)
        assert code == expect, said.read_text()
        done[key] = root / name
        said.rename(done[key] / "stderr.txt")
        return done[key]

    return run


def torchrun(forked, *command, ranks=2):
    """Run `python COMMAND...` on some ranks, to its end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    return forked.complete(*launcher, *command)


def launch(forked, launch_file, command, ranks, said, cwd):
    """Run `saekit COMMAND...` with one of our launch files; returns the launcher's exit code."""
    launcher = [forked.python, "-m", "accelerate.commands.launch", "--num_processes", ranks, "--main_process_port", 0]
    launcher += ["--config_file", ROOT / "accelerate_configs" / launch_file, "-m", "saekit"]
    parts = [str(part) for part in (*launcher, *command)]
    with said.open("w") as file:
        done = subprocess.run(
            parts, env=forked.environment(), cwd=cwd, stdout=subprocess.PIPE, stderr=file, timeout=300, check=False
        )
    return done.returncode
