"""Run on every rank by test_layer_map.py: route layers' activations and count what is alive while each is at work.

Rank 0 writes into the file `found`, for each of its layers, how many layers' activations of a rank's tokens there are.
Every rank checks that `counted` marks the rows that arrive as their senders marked them, and that nothing travels to
coders of other kinds but what they read and write.
"""

import gc
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist

from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import autoencoder, crosscoder, join, transcoder
from saekit.placement import connect
from saekit.placement.layer_map import LayerMap

TOKENS, WIDTH, LAYERS = 96, 24, 7


class Nothing(torch.nn.Module):
    """An SAE's stand-in, without a tensor."""

    device = torch.device("cpu")


def alive():
    """Layers' activations of one rank's tokens that storages are held for; small and other tensors do not count.

    The least of some looks: gloo's thread lets go of an operation a moment after it has said that it is done.
    """
    looks = []
    for _ in range(10):
        looks.append(look())
        time.sleep(0.02)
    return min(looks)


def look():
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.dtype == torch.float32]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values()) / (4 * TOKENS * WIDTH)


def check_counted(placement, names):
    """Rows say who sent them and which they are; the ranks count different ones of them."""
    rows = torch.arange(TOKENS, device=placement.device)
    masks = [rows % 3 == 0, rows > 70]
    sent = [(rows + 1000 * rank).float()[:, None].expand(TOKENS, WIDTH) for rank in range(2)]
    counted = placement.counted(masks[placement.rank])
    assert counted.dtype == torch.bool
    for _, x_ND in placement.route({name: sent[placement.rank].contiguous() for name in names}, last=True):
        expected = torch.cat([each[mask] for each, mask in zip(sent, masks, strict=True)])
        assert torch.equal(x_ND[counted], expected)


def check_what_travels(world):
    """A crosscoder, an SAE, and a transcoder whose input and output lie layers apart; two of them share a hookpoint."""
    placement = LayerMap(world)
    optimizer = SimpleNamespace(defer_gradients=lambda: None)
    parts = {Hookpoint("layers.0", 8): 1, Hookpoint("layers.1.mlp:in", 24): 2, Hookpoint("layers.3.mlp", 16): 3}
    first, hidden, last = parts
    sites = {each.name: each for each in (crosscoder([first, hidden]), autoencoder(hidden), transcoder(first, last))}
    placement.place(dict.fromkeys(sites, 1), lambda name: Nothing(), lambda sae: optimizer)

    def sent_by(rank, site):
        each = [torch.full((TOKENS, part.width), parts[part] + 10.0 * rank) for part in site.parts]
        return torch.cat(each, 1).to(placement.device)

    elements = []
    send = dist.all_to_all_single

    def counting(arrived, leaving, receive, split, **options):
        elements.append(sum(size for rank, size in enumerate(split) if rank != placement.rank))
        assert len(leaving) == sum(split)
        return send(arrived, leaving, receive, split, **options)

    of = {part.name: sent_by(placement.rank, autoencoder(part)) for part in parts}
    with patch.object(dist, "all_to_all_single", counting):
        for name, x_NW in placement.route(join(of, list(sites.values())), last=True):
            assert torch.equal(x_NW, torch.cat([sent_by(rank, sites[name]) for rank in range(2)]))
    owners = placement.owners()
    assert set(owners.values()) == {0, 1}
    leaving = [site.width for name, site in sites.items() if owners[name] != placement.rank]
    assert sum(elements) == TOKENS * sum(leaving), (elements, leaving)
    assert not of


def main():
    placement = connect("layer-map")
    names = [f"layers.{number}" for number in range(LAYERS)]
    optimizer = SimpleNamespace(defer_gradients=lambda: None)
    placement.place(dict.fromkeys(names, 1), lambda name: Nothing(), lambda sae: optimizer)
    numbers = []
    for _ in range(2):
        acts = {
            name: torch.full((TOKENS, WIDTH), float(number), device=placement.device)
            for number, name in enumerate(names)
        }
        for name, x_ND in placement.route(acts, last=True):
            assert x_ND.shape == (2 * TOKENS, WIDTH)
            assert (x_ND == names.index(name)).all()
            numbers.append(alive())
            del x_ND
        assert not acts
        assert alive() == 0
    rank = placement.rank
    check_counted(placement, names)
    check_what_travels(placement.world)
    placement.close()
    if rank == 0:
        Path("found").write_text(" ".join(map(str, numbers)), encoding="utf-8")


if __name__ == "__main__":
    main()
