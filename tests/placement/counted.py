"""Run on every rank by test_zero3.py: train under zero3 and count, with the CPU standing in for a GPU.

Rank 0 writes `counts.json`: how many layers are whole at a time, in forward passes, in backward passes and in between;
how often the host waits for the device inside backward passes, where gradients are collected and in the optimizer's
step; what it asks the other ranks there.
"""

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import GPT2Config, GPT2LMHeadModel

from saekit import SaeConfig, SaeTrainer, TrainConfig
from saekit.placement import connect

LAYERS, STEPS = 6, 3
whole_ones = {"forward": [], "backward": [], "between": []}
inside = ["elsewhere"]
calls = Counter()


def counted(what, function):
    """A function whose calls are counted, by the part of the step that makes them."""

    def call(*args, **kwargs):
        calls[f"{what}: {inside[-1]}"] += 1
        return function(*args, **kwargs)

    return call


class Stream:
    """As much of a GPU's stream as DeepSpeed uses."""

    device = torch.device("cpu")

    def __init__(self):
        self.synchronize = counted("waits", lambda: None)

    def wait_stream(self, other):
        """Nothing waits: the CPU has done what it was told."""


def behave_like_a_gpu():
    """Have DeepSpeed wait as it does on a GPU, from the moment on when its optimizer is made."""
    accelerator, made = get_accelerator(), stage3.DeepSpeedZeroOptimizer_Stage3.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.reduce_and_partition_stream = Stream()
        here = Stream()
        accelerator.resolves_data_dependency = lambda: False
        accelerator.current_stream = torch.cuda.current_stream = lambda *_: here
        accelerator.synchronize = counted("waits", lambda: None)

    stage3.DeepSpeedZeroOptimizer_Stage3.__init__ = make
    stage3.dist.all_reduce = counted("all-reduces", stage3.dist.all_reduce)


def whole(placement):
    layers = (placement.sae(name) for name in placement.layers())
    return sum(any(p.ds_status == ZeroParamStatus.AVAILABLE for p in sae.parameters()) for sae in layers)


def watch(placement):
    def part(name, function, *args):
        inside.append(name)
        result = function(*args)
        inside.pop()
        if name == "backward":
            whole_ones["between"].append(whole(placement))
        return result

    for name in ("backward", "collect", "apply"):
        setattr(placement, name, partial(part, name, getattr(placement, name)))
    place = placement.place

    def watching(hookpoints, make_sae, make_optimizer):
        def made(hookpoint):
            whole_ones["between"].append(whole(placement))
            return make_sae(hookpoint)

        place(hookpoints, made, make_optimizer)
        for name in placement.layers():
            sae = placement.sae(name)
            # DeepSpeed's own hooks, which gather, come first.
            sae.register_forward_pre_hook(lambda *_: whole_ones["forward"].append(whole(placement)))
            sae.W_dec.register_post_accumulate_grad_hook(lambda _: whole_ones["backward"].append(whole(placement)))

    placement.place = watching


def main(folder):
    behave_like_a_gpu()
    placement = connect("zero3")
    watch(placement)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=LAYERS, n_head=2, bos_token_id=0, eos_token_id=1
    )
    data = Dataset.from_dict({"input_ids": torch.randint(2, 64, (8 * STEPS, 8)).tolist()})
    cfg = TrainConfig(sae=SaeConfig(num_latents=32, k=2), batch_size=4, save_dir=folder, run_name="run")
    SaeTrainer(cfg, data, GPT2LMHeadModel(config), placement=placement).fit()
    of_training = dict(calls)
    rank = placement.rank
    placement.close()
    if rank == 0:
        most = {name: max(each) for name, each in whole_ones.items()}
        found = {"whole": most, "forwards": len(whole_ones["forward"]), "calls": of_training}
        (Path(folder) / "counts.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
