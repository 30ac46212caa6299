"""Whole units from the ranks' pieces of them, for checkpoints and evaluations, and pieces from whole ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saekit.placement.base import LayerOptimizer, OptimizerFactory
from saekit.placement.shards import Piece
from saekit.sae import Sae
from saekit.sae.model import around, without_memory

SLICE = 2**24
"""Elements of a tensor that travel to the ranks that save it at a time, from one rank to all of them together."""
Bring = Callable[[str, Callable[[Piece], Tensor]], Any]
"""Makes a tensor whole, from a parameter's name and from what is laid out like a piece's flat tensor. Collective."""


def bring_all(
    pieces: Mapping[str, Piece],
    state: Mapping[Tensor, Mapping[str, Any]],
    bring: Bring,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Make a unit's weights and its optimizer's state whole. Collective.

    Args:
        pieces: By parameter name.
        state: The optimizer's, by flat tensor; without an entry there is none.
        bring: Makes each of them whole.

    Returns:
        Weights by parameter name, and states by parameter name and key.
    """
    tensors, states = {}, {}
    for name, own in pieces.items():
        tensors[name] = bring(name, lambda piece: piece.flat)
        states[name] = dict(state.get(own.flat, {}))
        for key in [key for key, value in states[name].items() if own.is_laid_out(value)]:
            states[name][key] = bring(name, lambda piece, key=key: state[piece.flat][key])  # type: ignore[misc]
    return tensors, states


def bring_to_leaders(pieces: Mapping[int, tuple[Piece, Tensor]], device: torch.device) -> Tensor | None:
    """Put one tensor of several units together, each on the CPU of the rank that leads the unit. Collective.

    The pieces travel in slices: on the device no rank holds more of them than twice `SLICE`, however large the tensors.

    Args:
        pieces: By leading rank this rank's piece of the unit's tensor, and what is laid out like the piece's flat one;
            all of one type.
        device: Where ranks exchange tensors.

    Returns:
        The whole tensor of the unit that this rank leads; None if it leads none of them.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    length = max(1, SLICE // ranks)
    slices = {leader: pieces[leader][0].of(pieces[leader][1]).split(length) for leader in sorted(pieces)}
    whole: Tensor | None = None
    if rank in pieces:
        piece, like_flat = pieces[rank]
        whole = torch.empty(ranks, piece.size, dtype=like_flat.dtype)
    for number in range(max(map(len, slices.values()))):
        leaving = {leader: each[number] for leader, each in slices.items() if number < len(each)}
        send = [len(leaving[leader]) if leader in leaving else 0 for leader in range(ranks)]
        sent = torch.cat([each.to(device) for each in leaving.values()])
        arrived = sent.new_empty(ranks, send[rank])
        dist.all_to_all_single(arrived.view(-1), sent, [send[rank]] * ranks, send)
        del sent  # before the next slices are made
        if whole is not None:
            whole[:, number * length :][:, : send[rank]].copy_(arrived)
        del arrived
    return None if whole is None else pieces[rank][0].unpadded(whole)


def whole_optimizer(
    sae: Sae, tensors: Mapping[str, Tensor], states: Mapping[str, dict[str, Any]], make_optimizer: OptimizerFactory
) -> LayerOptimizer:
    """Return the optimizer that a unit would have on one rank, from what `bring_all` returned."""
    copy = around(tensors, **sae.sizes())
    optimizer = make_optimizer(copy)
    for each in optimizer.optimizers:
        each.state.update({parameter: states[name] for name, parameter in copy.named_parameters()})
    return optimizer


def optimizer_of_pieces(
    sae: Sae, pieces: Mapping[str, Piece], state: Mapping[Tensor, Mapping[str, Any]], make_optimizer: OptimizerFactory
) -> LayerOptimizer:
    """Return an optimizer of this rank's pieces of a unit; weights and state are those that are trained, not copies.

    Args:
        sae: The unit.
        pieces: By parameter name.
        state: The optimizer's, by flat tensor; without an entry there is none.
        make_optimizer: Makes one that treats every element alike, so that it takes pieces as well.
    """
    parts = without_memory(**sae.sizes())
    states: dict[Tensor, dict[str, Any]] = {}
    for name, piece in pieces.items():
        part = nn.Parameter(piece.of(piece.flat.detach()))
        setattr(parts, name, part)
        own = state.get(piece.flat, {})
        states[part] = {key: piece.of(value) if piece.is_laid_out(value) else value for key, value in own.items()}
    optimizer = make_optimizer(parts)
    for each in optimizer.optimizers:
        each.state.update(states)
    return optimizer


def optimizer_of_parts(
    sae: Sae,
    pieces: Mapping[str, Piece],
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    make_optimizer: OptimizerFactory,
) -> tuple[nn.Module, LayerOptimizer]:
    """Return this rank's parts of a unit's weights, as parameters, and an optimizer with these parts of its state.

    The whole tensors may be in files that are mapped into memory: what belongs to other ranks is not read.

    Args:
        sae: The unit.
        pieces: By parameter name.
        weights: Whole, by parameter name.
        state: Whole, as `LayerOptimizer.state` returned it.
        make_optimizer: Makes one that treats every element alike, so that it takes parts as well.
    """
    parts = without_memory(**sae.sizes())
    for name, piece in pieces.items():
        setattr(parts, name, nn.Parameter(piece.part(weights[name]).clone()))
    optimizer = make_optimizer(parts)
    optimizer.load_state({key: pieces[key.partition(".")[0]].part(value) for key, value in state.items()})
    return parts, optimizer
