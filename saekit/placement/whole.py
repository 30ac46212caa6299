"""Assembles whole units from the ranks' pieces, for checkpoints and evaluations, and cuts whole units into pieces."""

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
"""Elements that one rank sends at a time, in total over the ranks that it sends to."""
Bring = Callable[[str, Callable[[Piece], Tensor]], Any]
"""Assembles a whole tensor, given a parameter's name and a function from a piece to a tensor with its flat tensor's
layout. Collective."""


def bring_all(
    pieces: Mapping[str, Piece],
    state: Mapping[Tensor, Mapping[str, Any]],
    bring: Bring,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Assemble a unit's whole weights and its whole optimizer state. Collective.

    Args:
        pieces: The unit's pieces by parameter name.
        state: The optimizer's state by flat tensor. A flat tensor without an entry has no state yet.
        bring: Assembles each tensor.

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
    """Assemble one tensor of each of several units, on the CPU of the rank that leads the unit. Collective.

    The pieces travel in slices. On the device, a rank never holds more than twice `SLICE` elements of them, however
    large the tensors are.

    Args:
        pieces: By leading rank, this rank's piece of the unit's tensor, and a tensor with the layout of the piece's
            flat tensor. All have one type.
        device: The device on which ranks exchange tensors.

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
    """Make the optimizer that a unit would have on one rank, from what `bring_all` returned."""
    copy = around(tensors, **sae.sizes())
    optimizer = make_optimizer(copy)
    for each in optimizer.optimizers:
        each.state.update({parameter: states[name] for name, parameter in copy.named_parameters()})
    return optimizer


def optimizer_of_pieces(
    sae: Sae, pieces: Mapping[str, Piece], state: Mapping[Tensor, Mapping[str, Any]], make_optimizer: OptimizerFactory
) -> LayerOptimizer:
    """Make an optimizer of this rank's pieces of a unit. It shares the trained weights and state, without copies.

    Args:
        sae: The unit's SAE.
        pieces: The unit's pieces by parameter name.
        state: The optimizer's state by flat tensor. A flat tensor without an entry has no state yet.
        make_optimizer: Makes an elementwise optimizer, which also works on pieces.
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
    """Return this rank's parts of a unit's whole weights, as parameters, and an optimizer with its parts of the state.

    The whole tensors may be in files that are mapped into memory. The parts of other ranks are not read.

    Args:
        sae: The unit's SAE.
        pieces: The unit's pieces by parameter name.
        weights: Whole weights by parameter name.
        state: The whole state, as `LayerOptimizer.state` returned it.
        make_optimizer: Makes an elementwise optimizer, which also works on parts.
    """
    parts = without_memory(**sae.sizes())
    for name, piece in pieces.items():
        setattr(parts, name, nn.Parameter(piece.part(weights[name]).clone()))
    optimizer = make_optimizer(parts)
    optimizer.load_state({key: pieces[key.partition(".")[0]].part(value) for key, value in state.items()})
    return parts, optimizer
