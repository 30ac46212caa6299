"""The memory of training one layer's SAE: runs the training's own step on the meta device under a meter."""

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
"""Bytes of state per parameter in bitsandbytes' Adam: two 8-bit moments, with a float32 scale per block of 256."""
TRITON_CHUNK_BYTES, TRITON_GROUP, TRITON_SLICE, TRITON_PARTIAL_BYTES = 2**30, 32, 64, 2**28
"""As in `saekit.sae.kernels.triton_ops`, which can be imported only with Triton. A test compares the values."""
META = torch.device("meta")


@dataclass(frozen=True)
class LayerCost:
    """The memory of training one layer, with whole tensors, even if a placement shards them."""

    parameters: Bytes
    gradients: Bytes
    """Gradients, or the rows of deferred gradients."""
    state: Bytes
    """The optimizer's state."""
    counters: Bytes
    first_chunk: Bytes
    """The peak of the forward and backward pass of a chunk that makes the gradients, without parameters, state and
    gradients."""
    later_chunk: Bytes
    """The same for a chunk whose gradients are added to existing ones."""
    update: Bytes
    """The peak of the optimizer's step, without all of the above."""


KNOWN: dict[tuple[object, ...], LayerCost] = {}
"""A cache of results, since placements and advice meter the same layer many times."""


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
    """Meter a training step of one layer.

    Args:
        cfg: The training's configuration.
        size: The size of the coder.
        tokens: Tokens per chunk: those of a micro-batch divided by `micro_acc_steps`.
        act_dtype: The type of the language model's activations.
        kernels: From `on_meta`.
        on_gpu: Whether the memory is a GPU's.
        dead: Dead latents, for the losses that revive them.
        owns_gradient: Whether gradients may be deferred to the step, see `Placement.owns_gradient`.
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
        if not layer.optimizer.deferred():  # deferred gradients come from a single pass
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
    """Return kernels that compute nothing but allocate what those of a backend allocate.

    Args:
        backend: One of `saekit.sae.kernels.BACKENDS`.
        select_dtype: The type in which candidates are selected, see `Kernels.select_dtype`.
    """
    if backend == "eager":
        return Eager()
    ops: dict[str, Ops] = {"cpu": _CpuOps(), "native": native_ops, "triton": _TritonOps()}
    return Sparse(backend, ops[backend], select_dtype)


class _CpuOps:
    """Allocates what `torch_ops` allocates, with stand-ins for what the meta device does not implement."""

    topk = staticmethod(torch_ops.topk)
    best_of = staticmethod(torch_ops.best_of)
    gather_sum = staticmethod(torch_ops.gather_sum)
    segment_sum = staticmethod(torch_ops.segment_sum)
    sort_pairs = staticmethod(torch_ops.sort_pairs)

    def gather_dot(self, x_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
        """Allocate the sparse pattern and the result, `[N, K]`."""
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
    """Allocates what `triton_ops` allocates."""

    best_of = staticmethod(torch_ops.best_of)
    sort_pairs = staticmethod(torch_ops.sort_pairs)

    def topk(
        self, x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, dtype: torch.dtype, in_order: bool = True, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Allocate inputs in `dtype`, and a chunk's scores, maxima and candidates."""
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
        """Allocate the products of slices of D, and their sums, `[N, K]`."""
        (N, K), slices = indices_NK.shape, -(-x_ND.shape[1] // TRITON_SLICE)
        rows = min(N, max(1, TRITON_PARTIAL_BYTES // (4 * slices * max(1, K))))
        out_NK = x_ND.new_empty(N, K)
        x_ND.new_empty(slices, rows, K)
        return out_NK

    def gather_sum(self, weights_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
        """Allocate the result, `[N, D]`."""
        return W_MD.new_empty(indices_NK.shape[0], W_MD.shape[1])

    def segment_sum(self, weights_P: Tensor, tokens_P: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
        """Allocate the result, `[M, D]`."""
        return rows_ND.new_empty(len(starts_M) - 1, rows_ND.shape[1])

    def adam_(self, param: Tensor, grad: Tensor | RowSums, *_: Tensor, **__: object) -> None:
        """Allocate the gradient if it was deferred. The update itself is in place."""
        if isinstance(grad, RowSums):
            self.segment_sum(*grad)
