"""Every rank holds a part of every SAE: DeepSpeed's ZeRO stage 3 (Rajbhandari et al. 2020, arXiv 1910.02054)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from saekit.errors import UserError
from saekit.placement.base import LayerOptimizer, OptimizerFactory, SaeFactory
from saekit.placement.local import size_of
from saekit.placement.pieces import Piece, find_pieces, same_memory, share_masters
from saekit.placement.rows import RowShard, project_rows_, scale_rows_
from saekit.placement.world import Ranked, World
from saekit.sae import Sae
from saekit.sae.model import around

SHARDED_OPTIMIZERS = ("SaeAdam", "ScheduleFreeSignum")
"""Those that treat every element alike, and so can work on any piece of a tensor."""


class Zero3(Ranked):
    """Sharded parameters, gradients and optimiser states. Implements `Placement`.

    One engine holds the bank. A layer's tensors are whole only while it computes: its forward and its backward pass
    gather them, and what each rank keeps of the gradient is summed over the ranks after every backward pass.

    The decoder's gradient is projected and its rows are renormalised on each rank's own piece, in hooks of the
    optimiser, which see master weights and gradients, wherever they are offloaded to.

    Args:
        world: The ranks; its accelerator was made with a plugin for stage 3.
    """

    name = "zero3"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.device = world.device
        self._saes: dict[str, Sae] = {}
        self._numbers: dict[str, int] = {}
        self._pieces: dict[nn.Parameter, Piece] = {}
        self._backwards: Counter[str] = Counter()
        self._engine: Any = None
        self._averages = False

    def place(self, hookpoints: Sequence[str], make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """See `Placement.place`.

        Raises:
            UserError: If the optimiser needs whole tensors.
        """
        self._make_optimizer = make_optimizer
        config = self.world.accelerator.deepspeed_plugin.deepspeed_config
        torch_optimizers: list[torch.optim.Optimizer] = []
        for hookpoint in hookpoints:
            sae = make_sae(hookpoint).to(self.device).train()
            optimizer = make_optimizer(sae)
            self._averages = optimizer.averages
            torch_optimizers += self._own_optimizers(optimizer)
            # Sharded at once, so that no more than one layer is ever whole.
            deepspeed.zero.Init(module=sae, config_dict_or_path=config, mem_efficient_linear=False)
            self._saes[hookpoint] = sae
        self._numbers = {hookpoint: number for number, hookpoint in enumerate(hookpoints)}
        self._torch_optimizer: Any = merged(torch_optimizers)  # one of training's that have `prepare`
        self._base_rates = [group["lr"] for group in self._torch_optimizer.param_groups]

        bank = nn.ModuleList(self._saes.values())
        self._engine, _ = self.world.accelerator.prepare(bank, self._torch_optimizer)
        share_masters(self._engine.optimizer)
        self._pieces = find_pieces(self._engine.optimizer)
        self._decoders = {
            self._pieces[sae.W_dec].flat: sae.W_dec for sae in self._saes.values() if sae.normalize_decoder
        }
        self._torch_optimizer.register_step_pre_hook(self._project)
        self._torch_optimizer.register_step_post_hook(self._normalize)

    @staticmethod
    def _own_optimizers(optimizer: LayerOptimizer) -> list[torch.optim.Optimizer]:
        for each in optimizer.optimizers:
            if type(each).__name__ not in SHARDED_OPTIMIZERS:
                raise UserError(
                    f"--placement zero3 cannot train with {type(each).__name__}, which needs whole tensors (or whole "
                    "blocks of them): use --optimizer adam or signum, or --placement layer-map"
                )
        return optimizer.optimizers

    def layers(self) -> tuple[str, ...]:
        """See `Placement.layers`."""
        return tuple(self._saes)

    def leads(self, hookpoint: str) -> bool:
        """See `Placement.leads`: the layers' files are shared out among the ranks."""
        return self._numbers[hookpoint] % self.world_size == self.rank

    def owners(self) -> dict[str, int]:
        """See `Placement.owners`."""
        return {}

    def sae(self, hookpoint: str) -> Sae:
        """See `Placement.sae`: calling it gathers its parameters, and only those."""
        return self._saes[hookpoint]

    def route(self, acts: dict[str, Tensor], last: bool) -> Iterator[tuple[str, Tensor]]:
        """See `Placement.route`: tokens stay where they are."""
        for hookpoint in list(acts):
            yield hookpoint, acts.pop(hookpoint)

    def backward(self, hookpoint: str, loss: Tensor) -> None:
        """See `Placement.backward`."""
        # DeepSpeed counts backward passes of the whole bank, to know whether a gradient overwrites the last step's or
        # adds to this step's. Ours are of one layer at a time, so the layer's own count is what it must be told.
        zero = self._engine.optimizer
        zero.clear_backward_seen_flag()
        zero.micro_step_id = self._backwards[hookpoint]
        self._backwards[hookpoint] += 1
        # It averages over the ranks, where the loss is already a part of the global one.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """See `Placement.collect`: DeepSpeed has brought them together in the backward passes."""
        zero = self._engine.optimizer
        return {
            hookpoint: sum(zero.get_local_fp32_grad_for_param(parameter).sum() for parameter in sae.parameters())
            for hookpoint, sae in self._saes.items()
        }

    def skip(self) -> None:
        """See `Placement.skip`."""
        # What DeepSpeed itself does when float16 overflows; it has no public name for it.
        self._engine.optimizer._overflow_clean_up(None)
        self._backwards.clear()

    def apply(self, lr_scale: float) -> None:
        """See `Placement.apply`."""
        for group, rate in zip(self._torch_optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * lr_scale
        # DeepSpeed empties the groups, and hands the optimizer one flat tensor at a time in its own step.
        self._engine.optimizer._set_fp32_optimizer_param_groups()
        self._torch_optimizer.prepare()
        self._engine.optimizer._clear_fp32_optimizer_param_groups()
        self._engine.step()
        self._backwards.clear()

    @torch.no_grad()
    def _project(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before the optimiser's step on one flat tensor: see `saekit.sae.project_decoder_gradient_`."""
        for flat, W_dec in self._stepping(optimizer):
            piece = self._pieces[W_dec]
            gradient = piece.of(flat.grad)  # type: ignore[arg-type]  # every layer has had a backward pass
            project_rows_(gradient, piece.of(flat), self._rows(piece), self._sum_rows)

    @torch.no_grad()
    def _normalize(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After it: see `saekit.sae.normalize_decoder_`."""
        for flat, W_dec in self._stepping(optimizer):
            piece = self._pieces[W_dec]
            scale_rows_(piece.of(flat), self._rows(piece), self._sum_rows)

    def _stepping(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """The flat tensors that are being stepped and hold a decoder to keep at unit norm; DeepSpeed steps one."""
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat in self._decoders:
                    yield flat, self._decoders[flat]

    def _rows(self, piece: Piece) -> RowShard:
        count, width = piece.shape
        return RowShard.of(self.rank, piece.size, count, width)

    def _sum_rows(self, partial: Tensor) -> Tensor:
        total = partial.to(self.device)
        dist.all_reduce(total)
        return total.to(partial.device)

    def share(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Placement.share`."""
        return self.share_all(counts)

    @torch.no_grad()
    def whole(self, hookpoint: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """See `Placement.whole`: the layer is put together on the rank that leads it, as it would be on one rank."""
        sae, leads = self._saes[hookpoint], self.leads(hookpoint)
        leader = self._numbers[hookpoint] % self.world_size
        optimizer = self._put_together(sae, lambda piece, like_flat: self._gathered(leader, piece, like_flat), leads)
        return None if optimizer is None else (optimizer.export(), optimizer.state())

    @torch.no_grad()
    def whole_sae(self, hookpoint: str) -> Sae:
        """See `Placement.whole_sae`."""
        sae = self._saes[hookpoint]
        if self._averages:
            optimizer = self._put_together(sae, self._gathered_by_all, True)
            assert optimizer is not None, "put together on every rank"
            return around(optimizer.export(), **sae.sizes()).eval()
        pieces = {name: self._pieces[parameter] for name, parameter in sae.named_parameters()}
        tensors = {name: self._gathered_by_all(piece, piece.flat) for name, piece in pieces.items()}
        return around(tensors, **sae.sizes()).eval()

    def _put_together(self, sae: Sae, gathered: Callable[[Piece, Tensor], Tensor], here: bool) -> LayerOptimizer | None:
        """A layer's optimiser with whole weights and state, if it is to be `here`. Collective.

        Args:
            sae: The layer.
            gathered: Makes a whole tensor of the ranks' pieces, on the ranks that are to have it.
            here: Whether this is one of them.
        """
        tensors: dict[str, Tensor] = {}
        states: dict[str, dict[str, Any]] = {}
        for name, parameter in sae.named_parameters():
            piece = self._pieces[parameter]
            tensors[name] = gathered(piece, piece.flat)
            states[name] = {
                key: gathered(piece, value) if _elementwise(value, piece) else value
                for key, value in self._torch_optimizer.state[piece.flat].items()
            }
        if not here:
            return None
        copy, optimizer = self._on_one_rank(sae, tensors)
        for each in optimizer.optimizers:
            for name, parameter in copy.named_parameters():
                each.state[parameter] = states[name]
        return optimizer

    def each_whole(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
        """See `Placement.each_whole`: of so many layers in a row as there are ranks, each rank leads one."""
        hookpoints = self.layers()
        for start in range(0, len(hookpoints), self.world_size):
            wave = hookpoints[start : start + self.world_size]
            mine = [(name, *whole) for name in wave if (whole := self.whole(name)) is not None]
            while mine:  # not kept here while the next wave is gathered
                yield mine.pop()

    def _gathered(self, leader: int, piece: Piece, like_flat: Tensor) -> Tensor:
        """A whole tensor from the ranks' pieces, on the rank that leads the layer; on the others, nothing."""
        mine = piece.of(like_flat).to(self.device).contiguous()
        leads = self.rank == leader
        whole = mine.new_empty(self.world_size if leads else 0, mine.numel())
        dist.gather(mine, list(whole) if leads else None, dst=leader)
        return piece.cut(whole) if leads else whole.view(-1)

    def _gathered_by_all(self, piece: Piece, like_flat: Tensor) -> Tensor:
        """The same on every rank."""
        mine = piece.of(like_flat).to(self.device).contiguous()
        whole = mine.new_empty(self.world_size, mine.numel())
        dist.all_gather(list(whole), mine)
        return piece.cut(whole)

    def _on_one_rank(self, sae: Sae, tensors: Mapping[str, Tensor]) -> tuple[Sae, LayerOptimizer]:
        """The same layer with whole tensors, and its optimiser."""
        copy = around(tensors, **sae.sizes())
        return copy, self._make_optimizer(copy)

    @torch.no_grad()
    def load(self, hookpoint: str, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """See `Placement.load`."""
        sae = self._saes[hookpoint]
        copy, optimizer = self._on_one_rank(sae, weights)
        optimizer.load_state(state)
        for name, whole in copy.named_parameters():
            piece = self._pieces[sae.get_parameter(name)]
            self._scatter(whole, piece.of(piece.flat))
            piece.shard.copy_(piece.of(piece.flat))
            flat_state = self._torch_optimizer.state[piece.flat]
            for each in optimizer.optimizers:
                for key, value in each.state.get(whole, {}).items():
                    if isinstance(value, Tensor) and value.shape == whole.shape:
                        if key not in flat_state:
                            flat_state[key] = torch.zeros_like(piece.flat, dtype=value.dtype)
                        self._scatter(value, piece.of(flat_state[key]))
                    else:
                        flat_state[key] = value

    def _scatter(self, whole: Tensor, piece: Tensor) -> None:
        """This rank's part of a whole tensor into its place; behind the last element there is padding."""
        start = self.rank * piece.numel()
        mine = whole.reshape(-1)[start : start + piece.numel()]
        piece[: mine.numel()].copy_(mine)

    def held_bytes(self) -> int:
        """See `Placement.held_bytes`."""
        shards = [piece.shard for piece in self._pieces.values()]
        flats = {id(piece.flat): piece.flat for piece in self._pieces.values()}.values()
        states = [value for flat in flats for value in self._torch_optimizer.state[flat].values()]
        gradients = self._engine.optimizer.grad_partitions_flat_buffer
        masters = [] if same_memory(shards, flats) else list(flats)
        return size_of([*shards, *masters, gradients, *(value for value in states if isinstance(value, Tensor))])

    def close(self) -> None:
        """See `Placement.close`."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        self.world.accelerator.free_memory()  # it holds the engine, which holds process groups of its own
        super().close()

    def shard_bytes(self) -> int | None:
        """See `Placement.shard_bytes`."""
        first = next(iter(self._saes.values()))
        return size_of(self._pieces[parameter].shard for parameter in first.parameters())


def merged(optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """One optimiser for several layers' parameters, a group for each; the first of them."""
    first, *others = optimizers
    for other in others:
        for group in other.param_groups:
            first.add_param_group(group)
    return first


def _elementwise(value: Any, piece: Piece) -> bool:
    return isinstance(value, Tensor) and value.numel() == piece.flat.numel()
