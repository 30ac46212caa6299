"""The placement zero3: SAEs are sharded by DeepSpeed's ZeRO stage 3 (Rajbhandari et al. 2020, arXiv 1910.02054)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saekit.config import TrainConfig
from saekit.placement.base import OptimizerFactory, SaeFactory
from saekit.placement.costs import FLOAT32, Costs, Traffic, Workload
from saekit.placement.local import size_of
from saekit.placement.replicas import send
from saekit.placement.shards import Piece, UnitRows, find_pieces, same_memory, share_masters
from saekit.placement.whole import (
    bring_all,
    bring_to_leaders,
    optimizer_of_parts,
    optimizer_of_pieces,
    whole_optimizer,
)
from saekit.placement.world import Ranked, World
from saekit.sae import Sae, normalize_decoder_
from saekit.sae.model import around

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ELEMENTWISE = ("adam", "signum")
"""Elementwise optimizers, which can work on any piece of a tensor."""


class Zero3(Ranked):
    """Shards parameters, gradients and optimizer states over the ranks.

    One engine holds the bank. A layer's tensors are whole only while it computes: its forward and backward passes
    gather them. After every backward pass, the gradient is summed over the ranks, and each rank keeps its shard.

    Each rank projects the decoder's gradient and renormalizes its rows on its own shard, in hooks of the optimizer. The
    hooks see master weights and gradients on the device that they are offloaded to.

    Args:
        world: The ranks. Its accelerator must have a plugin for stage 3.
    """

    name = "zero3"
    title = "each holds a part of every SAE"
    travels = "weights"
    owns_gradient = False
    keeps_gradients = True
    gathers = True
    buffer_bytes = 4_000_000  # the bucket for travelling gradients, see `saekit.placement.deepspeed.settings`
    deepspeed = True
    offloads = True
    shards_lm = True

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._saes: dict[str, Sae] = {}
        self._pieces: dict[nn.Parameter, Piece] = {}
        self._backwards: Counter[str] = Counter()
        self._engine: Any = None

    @classmethod
    def join(cls, layer_map: str | None = None) -> Zero3:
        """Meet the other ranks with accelerate's plugin for ZeRO stage 3."""
        from saekit.placement.deepspeed import start_zero3

        return cls(start_zero3())

    @classmethod
    def supports(cls, train: TrainConfig) -> str | None:
        """Refuse optimizers that need whole tensors."""
        if train.optimizer not in ELEMENTWISE:
            return (
                f"--placement {cls.name} cannot train with --optimizer {train.optimizer}, which needs whole tensors "
                "(or whole blocks of them): use --optimizer adam or signum, or --placement layer-map"
            )
        return super().supports(train)

    @classmethod
    def parts(cls, world_size: int) -> int:
        """Return one part per rank."""
        return world_size

    @classmethod
    def traffic(cls, load: Workload, owned: int | None = None) -> Traffic:
        """Count parameters before every forward and backward pass, gradients after it, and fired counts as under ddp.

        Every chunk gathers each layer's parameters twice and reduce-scatters its gradients. If W divides M, shards hold
        whole decoder rows. If not, the rows' dot products with the gradient and their norms before and after the step
        are all-reduced: float32 `[3, M]` per layer.
        """
        vector, weights = FLOAT32 * load.size.num_latents, FLOAT32 * load.params
        passes = load.micro_batches * load.chunks
        each_layer = load.all_reduce(vector)
        each_layer += passes * (2 * load.all_gather(weights) + load.reduce_scatter(weights))
        if load.size.num_latents % load.world_size:
            each_layer += 3 * load.all_reduce(vector)
        total = round(load.layers * each_layer)
        return Traffic(total, total)

    def place(self, hookpoints: Costs, make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """Make the SAEs one by one and shard each at once, so that at most one is whole at a time."""
        import deepspeed  # needs the settings that `start_zero3` makes first

        from saekit.placement.deepspeed import avoid_syncs, merge_groups

        self._make_optimizer = make_optimizer
        config = self.world.accelerator.deepspeed_plugin.deepspeed_config
        torch_optimizers: list[torch.optim.Optimizer] = []
        for hookpoint in hookpoints:
            sae = make_sae(hookpoint).to(self.device).train()
            optimizer = make_optimizer(sae)
            torch_optimizers += optimizer.optimizers
            # DeepSpeed broadcasts rank 0's weights before it shards them, but not the selection's state.
            deepspeed.zero.Init(module=sae, config_dict_or_path=config, mem_efficient_linear=False)
            send(sae.selection.state().values(), 0)
            self._saes[hookpoint] = sae
        self._torch_optimizer: Any = merge_groups(torch_optimizers)  # a `PreparedOptimizer` of saekit.training
        self._base_rates = [group["lr"] for group in self._torch_optimizer.param_groups]

        bank = nn.ModuleList(self._saes.values())
        self._engine, _ = self.world.accelerator.prepare(bank, self._torch_optimizer)
        self.world.lengthen_timeouts()  # for the engine's own groups
        avoid_syncs(self._engine.optimizer)
        share_masters(self._engine.optimizer)
        self._pieces = find_pieces(self._engine.optimizer)
        decoders = [self._pieces[sae.W_dec] for sae in self._saes.values() if sae.normalize_decoder]
        rows = UnitRows(decoders, self.rank, self._sum_rows)
        self._torch_optimizer.register_step_pre_hook(rows.project)
        self._torch_optimizer.register_step_post_hook(rows.normalize)

    def layers(self) -> tuple[str, ...]:
        """Return all hookpoints, since each rank holds a part of each unit."""
        return tuple(self._saes)

    def sae(self, hookpoint: str) -> Sae:
        """Return the module with DeepSpeed's hooks. Calling it gathers its parameters, and only those."""
        return self._saes[hookpoint]

    def backward(self, hookpoint: str, loss: Tensor) -> None:
        """Run DeepSpeed's backward pass, which gathers the layer and sums the gradient over the ranks."""
        # DeepSpeed counts backward passes of the whole bank, to decide whether a gradient replaces that of the last
        # step or adds to that of this step. Here a pass is of one layer, so DeepSpeed gets the layer's own count.
        zero = self._engine.optimizer
        zero.clear_backward_seen_flag()
        zero.micro_step_id = self._backwards[hookpoint]
        zero.set_gradient_accumulation_boundary(False)  # a step ends in `collect`, which offloads its gradients
        self._backwards[hookpoint] += 1
        # DeepSpeed averages over ranks, but the loss is already this rank's part of the global loss, so undo that.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """Sum this rank's pieces of the gradients, which DeepSpeed has summed over ranks in the backward passes.

        Offloaded gradients are summed on the device, which then starts to copy them to the optimizer on the CPU. The
        copies are complete when the host has read the sums.
        """
        zero = self._engine.optimizer
        if zero.offload_optimizer:
            zero.finalize_gradient_accumulation_boundary()
            zero._offload_boundary_param_ids.clear()  # otherwise `engine.step` would copy them again
        return {
            hookpoint: torch.stack([self._piece_sum(parameter) for parameter in sae.parameters()]).sum()
            for hookpoint, sae in self._saes.items()
        }

    def _piece_sum(self, parameter: nn.Parameter) -> Tensor:
        zero = self._engine.optimizer
        if not zero.offload_optimizer:
            return zero.get_local_fp32_grad_for_param(parameter).sum()
        # `avoid_syncs` puts the sum there. A rank past the last element has only padding.
        found = zero.norm_for_param_grads.get(zero.get_param_id(parameter))
        return torch.zeros((), device=self.device) if found is None else found

    def skip(self) -> None:
        """Drop the gradients as DeepSpeed does after an overflow in float16."""
        # There is no public function for it.
        self._engine.optimizer._overflow_clean_up(None)
        self._backwards.clear()

    def apply(self, lr_scale: float) -> None:
        """Step the engine, whose optimizer projects and renormalizes in hooks."""
        for group, rate in zip(self._torch_optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * lr_scale
        # DeepSpeed keeps the groups empty and passes the optimizer one flat tensor at a time in its own step.
        self._engine.optimizer._set_fp32_optimizer_param_groups()
        self._torch_optimizer.prepare()
        self._engine.optimizer._clear_fp32_optimizer_param_groups()
        self._engine.step()
        self._backwards.clear()

    def _sum_rows(self, partial: Tensor) -> Tensor:
        return self.sum(partial.to(self.device)).to(partial.device)

    def whole(self, hookpoint: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Assemble the layer on the rank that leads it, as it would be on one rank."""
        return self._led([hookpoint])

    @torch.no_grad()
    def _led(self, hookpoints: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Assemble layers with different leaders, and return the one that this rank leads. Collective.

        The tensors go straight to the CPU. On a GPU they would take three times the memory of the layer's weights.
        """
        saes = {self.leader(hookpoint): self._saes[hookpoint] for hookpoint in hookpoints}

        def bring(name: str, part: Callable[[Piece], Tensor]) -> Any:
            pieces = {leader: self._pieces[sae.get_parameter(name)] for leader, sae in saes.items()}
            return bring_to_leaders({leader: (each, part(each)) for leader, each in pieces.items()}, self.device)

        # All layers have taken the same steps, so their states have the same entries. A rank that leads none can use
        # those of any layer.
        sae = saes.get(self.rank, next(iter(saes.values())))
        tensors, states = bring_all(self._pieces_of(sae), self._torch_optimizer.state, bring)
        if self.rank not in saes:
            return None
        optimizer = whole_optimizer(sae, tensors, states, self._make_optimizer)
        return optimizer.export(), optimizer.state()

    @torch.no_grad()
    def whole_sae(self, hookpoint: str) -> Sae:
        """Gather the weights to save on every rank. If they are averages, each rank computes its part first."""
        sae = self._saes[hookpoint]
        pieces = self._pieces_of(sae)
        optimizer = optimizer_of_pieces(sae, pieces, self._torch_optimizer.state, self._make_optimizer)
        tensors = {name: pieces[name].gathered(part, self.device) for name, part in optimizer.average().items()}
        whole = around(tensors, **sae.sizes()).eval()
        if optimizer.averages and sae.normalize_decoder:
            normalize_decoder_(whole)
        return whole

    def _pieces_of(self, sae: Sae) -> dict[str, Piece]:
        return {name: self._pieces[parameter] for name, parameter in sae.named_parameters()}

    def each_whole(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
        """Assemble as many consecutive layers at a time as there are ranks, so that each rank leads one."""
        hookpoints = self.layers()
        for start in range(0, len(hookpoints), self.world_size):
            # Wait here: a rank may still be writing its last layer, for longer than a collective may take.
            self.gather(None)
            wave = hookpoints[start : start + self.world_size]
            if (whole := self._led(wave)) is not None:
                yield (wave[self.rank], *whole)
            del whole  # free it before the next layers are assembled

    @torch.no_grad()
    def load(self, hookpoint: str, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Copy this rank's parts of the whole weights and of the whole optimizer state."""
        pieces = self._pieces_of(self._saes[hookpoint])
        parts, optimizer = optimizer_of_parts(self._saes[hookpoint], pieces, weights, state, self._make_optimizer)
        for name, part in parts.named_parameters():
            piece = pieces[name]
            piece.put(part, piece.flat)
            piece.shard.copy_(piece.of(piece.flat))
            flat_state = self._torch_optimizer.state[piece.flat]
            for each in optimizer.optimizers:
                for key, value in each.state.get(part, {}).items():
                    if isinstance(value, Tensor) and value.shape == part.shape:
                        if key not in flat_state:
                            flat_state[key] = torch.zeros_like(piece.flat, dtype=value.dtype)
                        piece.put(value, flat_state[key])
                    else:
                        flat_state[key] = value

    def load_sharded(self, load: Callable[[], PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
        """Shard the model with DeepSpeed: each of its modules is gathered while it runs."""
        from saekit.placement.deepspeed import load_sharded

        model = load_sharded(load, dtype)
        self.world.lengthen_timeouts()  # for DeepSpeed's own groups
        return model

    def held_bytes(self) -> int:
        """Count shards, gradients, optimizer state, and master weights unless they are the shards."""
        shards = [piece.shard for piece in self._pieces.values()]
        flats = {id(piece.flat): piece.flat for piece in self._pieces.values()}.values()
        states = [value for flat in flats for value in self._torch_optimizer.state[flat].values()]
        gradients = self._engine.optimizer.grad_partitions_flat_buffer
        masters = [] if same_memory(shards, flats) else list(flats)
        return size_of([*shards, *masters, gradients, *(value for value in states if isinstance(value, Tensor))])

    def close(self) -> None:
        """End the engine, which has its own process groups, and leave the other ranks."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        self.world.accelerator.free_memory()  # it still refers to the engine
        super().close()

    def shard_bytes(self) -> int | None:
        """Return the bytes of the first layer's shards."""
        first = next(iter(self._saes.values()))
        return size_of(self._pieces[parameter].shard for parameter in first.parameters())
