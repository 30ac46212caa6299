"""The cost of one layer's SAE: the training's own code runs for a step on the meta device under a meter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.placement.costs import Size
from saekit.planning.layer import Layer
from saekit.planning.meter import Bytes, Meter, all_of, sized
from saekit.sae import project_decoder_gradient_
from saekit.sae.kernels import Kernels, eager, native_ops, torch_ops
from saekit.sae.kernels.choose import Eager
from saekit.sae.kernels.row_sums import RowSums
from saekit.sae.kernels.sparse import Ops, Sparse

ADAM_8BIT_STATE = 2 + 2 * 4 / 256
"""Bytes per parameter of bitsandbytes' Adam: two moments in 8 bits, and a float32 scale for each block of 256."""
TRITON_CHUNK_BYTES, TRITON_GROUP, TRITON_SLICE, TRITON_PARTIAL_BYTES = 2**30, 32, 64, 2**28
"""As in `saekit.sae.kernels.triton_ops`, which can only be imported where Triton is; a test compares them."""
META = torch.device("meta")


@dataclass(frozen=True)
class LayerCost:
    """One layer's training; tensors are whole, whatever the placement does with them."""

    parameters: Bytes
    gradients: Bytes
    """Or what they are the sums of, where they are left to the step."""
    state: Bytes
    """The optimizer's."""
    counters: Bytes
    first_chunk: Bytes
    """The most that forward and backward pass of a chunk hold besides parameters, state and gradients, when the
    gradients are made by it."""
    later_chunk: Bytes
    """The same when there are gradients already that its own are added to."""
    update: Bytes
    """The most that the optimizer's step holds besides all of those."""


KNOWN: dict[tuple[object, ...], LayerCost] = {}
"""Results so far: placements and advice meter the same layer many times."""


def layer_cost(
    cfg: TrainConfig,
    size: Size,
    tokens: int,
    act_dtype: torch.dtype,
    kernels: Kernels,
    *,
    on_gpu: bool,
    dead: int = 0,
    owns_gradient: bool = False,
) -> LayerCost:
    """Meter a step of one layer.

    Args:
        cfg: The run's.
        size: Of the coder.
        tokens: Tokens per chunk, those of a micro-batch over `micro_acc_steps`.
        act_dtype: Of the language model's activations.
        kernels: From `on_meta`.
        on_gpu: Whether it is a GPU's memory.
        dead: Dead latents, which the losses that revive them look at.
        owns_gradient: Whether the placement has a layer's gradient on one rank, where it may be left to the step.
    """
    settings = (cfg.sae, cfg.optimizer, cfg.moments_dtype, cfg.auxk_alpha, cfg.revive_alpha, cfg.max_norm_multiple > 0)
    shape = (size, tokens, cfg.grad_acc_steps, cfg.micro_acc_steps, dead)
    asked = (settings, shape, act_dtype, kernels.name, kernels.select_dtype, on_gpu, owns_gradient)
    if asked in KNOWN:
        return KNOWN[asked]
    eight_bit = cfg.optimizer == "adam8bit"
    layer = Layer(cfg, size, kernels, META, owns_gradient)
    parameters = all_of(sized(4 * parameter.numel(), on_gpu) for parameter in layer.sae.parameters())
    chunk = torch.empty(tokens, size.width, dtype=act_dtype, device=META)
    dead_latents = torch.empty(dead, dtype=torch.int64, device=META) if dead and cfg.revives else None
    with Meter(on_gpu) as meter:
        layer.passes(chunk, dead_latents)
        gradients = meter.live
        first = later = meter.peak - gradients
        meter.restart()
        if not layer.optimizer.deferred():  # what is deferred is of one pass
            layer.passes(chunk, dead_latents)
            later = meter.peak - gradients
            meter.restart()
        layer.update()
        state = meter.live - gradients
        meter.restart()
        layer.update()
        update = meter.peak - gradients - state
        if eight_bit:
            state = parameters.times(ADAM_8BIT_STATE / 4)
            meter.restart()
            project_decoder_gradient_(layer.sae)
            update = meter.peak - meter.live
    KNOWN[asked] = LayerCost(
        parameters, gradients, state, sized(8 * size.num_latents, on_gpu).times(3), first, later, update
    )
    return KNOWN[asked]


def on_meta(backend: str, select_dtype: torch.dtype | None) -> Kernels:
    """Kernels that compute nothing and allocate what those of a backend do.

    Args:
        backend: One of `saekit.sae.kernels.BACKENDS`.
        select_dtype: As in `Kernels.select_dtype`.
    """
    if backend == "eager":
        return Eager()
    ops: dict[str, Ops] = {"cpu": _CpuOps(), "native": native_ops, "triton": _TritonOps()}
    return Sparse(backend, ops[backend], select_dtype)


class _CpuOps:
    """`torch_ops`, less what has no implementation on the meta device."""

    topk = staticmethod(torch_ops.topk)
    best_of = staticmethod(torch_ops.best_of)
    gather_sum = staticmethod(torch_ops.gather_sum)
    segment_sum = staticmethod(torch_ops.segment_sum)
    sort_pairs = staticmethod(torch_ops.sort_pairs)

    def gather_dot(self, x_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
        """Its pattern and its result."""
        N, K = indices_NK.shape
        starts = x_ND.new_empty(N + 1, dtype=torch.int64)
        zeros, out = x_ND.new_empty(N * K), x_ND.new_empty(N, K)
        del starts, zeros
        return out

    def adam_(self, param: Tensor, grad: Tensor | RowSums, *_: Tensor, **__: object) -> None:
        """Allocate copies of a block of rows in float32: products, and moments that are stored in another type."""
        grad = self.segment_sum(*grad) if isinstance(grad, RowSums) else grad
        block = torch.empty(min(torch_ops.ADAM_BYTES // 4, param.numel()), device=param.device)
        more = torch.empty_like(block), torch.empty_like(block)
        del block, more


class _TritonOps:
    """Allocate what `triton_ops` allocates."""

    best_of = staticmethod(torch_ops.best_of)
    sort_pairs = staticmethod(torch_ops.sort_pairs)

    def topk(
        self, x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, dtype: torch.dtype, in_order: bool = True, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Inputs in `dtype`, a chunk's scores, maxima and candidates."""
        N, M = x_ND.shape[0], W_MD.shape[0]
        x_ND, W_MD, b_M = x_ND.to(dtype), W_MD.to(dtype), b_M.to(dtype)
        groups = -(-M // TRITON_GROUP)
        rows = max(1, min(N, TRITON_CHUNK_BYTES // (groups * TRITON_GROUP * dtype.itemsize)))
        scores = x_ND.new_empty(rows, groups * TRITON_GROUP)
        values_NK, indices_NK = x_ND.new_empty(N, k), x_ND.new_empty(N, k, dtype=torch.int64)
        found: tuple[Tensor, ...]
        if parts > 1:
            found = eager.topk_in_parts(scores[:, :M], k, parts)
        elif k >= groups:
            found = tuple(scores.topk(k, dim=-1))
        else:
            maxima = scores.new_empty(rows, groups)
            best_NK = maxima.topk(k, dim=-1, sorted=False).indices
            members = scores.new_empty(rows, k * TRITON_GROUP)
            found = tuple(members.topk(k, dim=-1))
            group_NK = found[1] // TRITON_GROUP
            best_NK.gather(1, group_NK)
        del found
        return values_NK, indices_NK

    def gather_dot(self, x_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
        """Its slices' products, and their sums."""
        (N, K), slices = indices_NK.shape, -(-x_ND.shape[1] // TRITON_SLICE)
        rows = min(N, max(1, TRITON_PARTIAL_BYTES // (4 * slices * max(1, K))))
        out_NK = x_ND.new_empty(N, K)
        x_ND.new_empty(slices, rows, K)
        return out_NK

    def gather_sum(self, weights_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
        """`[N, D]`."""
        return W_MD.new_empty(indices_NK.shape[0], W_MD.shape[1])

    def segment_sum(self, weights_P: Tensor, tokens_P: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
        """`[M, D]`."""
        return rows_ND.new_empty(len(starts_M) - 1, rows_ND.shape[1])

    def adam_(self, param: Tensor, grad: Tensor | RowSums, *_: Tensor, **__: object) -> None:
        """In place, of a gradient that is there."""
        if isinstance(grad, RowSums):
            self.segment_sum(*grad)
