"""Run on every rank by test_zero3.py: train under zero3 and count, with the CPU standing in for a GPU.

Rank 0 writes `counts.json`: how many layers are whole at a time, in forward passes, in backward passes and in between;
how often the host waits for the device inside backward passes, where gradients are collected and in the optimizer's
step; what it asks the other ranks there; how often it starts another process; what Python objects ranks exchange from
step to step; how long groups wait, in seconds; and whether what a save brings together is what a gather of whole
tensors gives, to the bit.
"""

import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import GPT2Config, GPT2LMHeadModel

from saekit import SaeConfig, SaeTrainer, TrainConfig
from saekit.placement import connect
from saekit.placement import whole as pieces_to_whole

LAYERS, STEPS = 6, 3
whole_ones = {"forward": [], "backward": [], "between": []}
inside = ["elsewhere"]
calls = Counter()
objects, objects_before = [], []
"""Pickled objects that the ranks have exchanged, and how many when each step's gradients were collected."""


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
    start = subprocess.Popen.__init__

    def start_one(self, *args, **kwargs):
        if inside[-1] != "elsewhere":
            calls[f"other processes: {inside[-1]}"] += 1
        start(self, *args, **kwargs)

    subprocess.Popen.__init__ = start_one
    gather = dist.all_gather_object
    dist.all_gather_object = lambda *args, **kwargs: objects.append(1) or gather(*args, **kwargs)


def whole(placement):
    layers = (placement.sae(name) for name in placement.layers())
    return sum(any(p.ds_status == ZeroParamStatus.AVAILABLE for p in sae.parameters()) for sae in layers)


def watch(placement):
    def part(name, function, *args):
        inside.append(name)
        if name == "collect":
            objects_before.append(len(objects))
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


def saves_what_is_there(placement):
    """Compare what this rank saves, in slices of which the last is short, with whole tensors gathered on every rank."""
    pieces_to_whole.SLICE = 3 * 50
    saved = {name: (weights, state) for name, weights, state in placement.each_whole()}
    assert len(saved) == LAYERS // placement.world_size
    same, moments = [], placement._torch_optimizer.state
    for hookpoint in placement.layers():
        for name, parameter in placement.sae(hookpoint).named_parameters():
            piece, (weights, state) = placement._pieces[parameter], saved.get(hookpoint, ({}, {}))
            for key in ("exp_avg", "exp_avg_sq"):
                whole = piece.gathered(piece.of(moments[piece.flat][key]), placement.device)
                same.append(hookpoint not in saved or whole.equal(state[f"{name}.{key}"]))
            whole = piece.gathered(piece.of(piece.flat), placement.device)
            same.append(hookpoint not in saved or whole.equal(weights[name]))
    return all(placement.gather(all(same)))


def main(folder):
    behave_like_a_gpu()
    placement = connect("zero3")
    watch(placement)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=LAYERS, n_head=2, bos_token_id=0, eos_token_id=1
    )
    data = Dataset.from_dict({"input_ids": torch.randint(2, 64, (8 * STEPS, 8)).tolist()})
    cfg = TrainConfig(sae=SaeConfig(num_latents=33, k=2), batch_size=4, save_dir=folder, run_name="run", log_every=99)
    SaeTrainer(cfg, data, GPT2LMHeadModel(config), placement=placement).fit()
    of_training = dict(calls)
    rank, saved = placement.rank, saves_what_is_there(placement)
    backends = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    timeouts = sorted({each.options._timeout.total_seconds() for each in backends})
    placement.close()
    if rank == 0:
        most = {name: max(each) for name, each in whole_ones.items()}
        found = {"whole": most, "forwards": len(whole_ones["forward"]), "calls": of_training, "saved": saved}
        found["timeouts"] = timeouts
        found["objects per step"] = objects_before[-1] - objects_before[-2]
        (Path(folder) / "counts.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
