"""Run on every rank by test_zero3.py: train under zero3 and count the layers that are whole at any time.

Rank 0 prints the largest counts: in forward passes, in backward passes, in between, and how often it has counted.
"""

import sys

import torch
from datasets import Dataset
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import GPT2Config, GPT2LMHeadModel

from saekit import SaeConfig, SaeTrainer, TrainConfig
from saekit.placement import connect

counts = {"forward": [], "backward": [], "between": []}


def whole(placement):
    layers = (placement.sae(name) for name in placement.layers())
    return sum(any(p.ds_status == ZeroParamStatus.AVAILABLE for p in sae.parameters()) for sae in layers)


def main(folder):
    placement = connect("zero3")
    backward = placement.backward

    def counting(hookpoint, loss):
        backward(hookpoint, loss)
        counts["between"].append(whole(placement))

    placement.backward = counting
    place = placement.place

    def watching(hookpoints, make_sae, make_optimizer):
        def made(hookpoint, **options):
            counts["between"].append(whole(placement))
            return make_sae(hookpoint, **options)

        place(hookpoints, made, make_optimizer)
        for name in placement.layers():
            sae = placement.sae(name)
            # DeepSpeed's own hooks, which gather, come first.
            sae.register_forward_pre_hook(lambda *_: counts["forward"].append(whole(placement)))
            sae.W_dec.register_post_accumulate_grad_hook(lambda _: counts["backward"].append(whole(placement)))

    placement.place = watching
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=6, n_head=2, bos_token_id=0, eos_token_id=1)
    data = Dataset.from_dict({"input_ids": torch.randint(2, 64, (24, 8)).tolist()})
    cfg = TrainConfig(sae=SaeConfig(num_latents=32, k=2), batch_size=4, save_dir=folder, run_name="run")
    SaeTrainer(cfg, data, GPT2LMHeadModel(config), placement=placement).fit()
    rank = placement.rank
    placement.close()
    if rank == 0:
        numbers = [*(max(each) for each in counts.values()), *(len(each) for each in counts.values())]
        sys.stdout.write(f"WHOLE {' '.join(map(str, numbers))}\n")


if __name__ == "__main__":
    main(sys.argv[1])
