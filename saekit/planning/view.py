"""A plan as a table with bars, and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saekit.planning.machine import Machine
from saekit.planning.plan import Choice, Job, Plan

BAR = 24
"""Characters of a full bar."""
PARTS = {
    "language_model": "language model",
    "parameters": "SAE parameters",
    "gradients": "gradients",
    "optimizer_state": "optimiser state",
    "activations": "activations",
    "working": "working memory",
}
ESTIMATED = "Counted are the tensors of the busiest rank; the libraries' share is an allowance."


def render(plan: Plan, console: Console) -> None:
    """Print a plan."""
    job = plan.job
    console.print(Text(f"{job.cfg.model.model}: {_sizes(job)}", style="bold"), soft_wrap=True)
    console.print(f"on {_machine(job.machine)}\n", soft_wrap=True)
    console.print(_table(plan))
    for choice in plan.choices:
        console.print(_bar(choice))
    console.print()
    best = plan.recommended
    if best is None:
        least = min(plan.choices, key=lambda choice: choice.total)
        short = least.total - least.capacity
        console.print(
            f"[red]None fits[/red]: {least.placement} needs least and lacks {_gib(short)}. Try --micro-acc-steps, a "
            "smaller --batch-size with more --grad-acc-steps, --moments-dtype bf16, fewer --layers.",
            soft_wrap=True,
        )
    elif best.ranks > 1:
        console.print(f"Take [bold]{best.placement}[/bold]: of those that fit it moves least per step.")
    else:
        console.print("It fits.")
    console.print(f"[dim]{ESTIMATED}", soft_wrap=True)


def to_json(plan: Plan) -> dict[str, Any]:
    """The same as plain values, in bytes."""
    job = plan.job
    return {
        "model": job.cfg.model.model,
        "layers": list(job.layers),
        "d_in": job.shape.d_in,
        "num_latents": job.num_latents,
        "ctx_len": job.ctx_len,
        "dtype": str(job.dtype).removeprefix("torch."),
        "kernels": job.backend,
        "select_dtype": job.select_dtype,
        "tokens_per_step": job.tokens_per_step,
        "machine": {"kind": job.machine.kind, "count": job.machine.count, "bytes": job.machine.memory},
        "recommended": plan.recommended.placement if plan.recommended else None,
        "placements": {
            choice.placement: {
                "fits": choice.fits,
                "total": choice.total,
                "capacity": choice.capacity,
                "peak_at": choice.memory.peak.name,
                "parts": {name: size.total for name, size in choice.memory.peak.parts.items()},
                "freed_but_kept": choice.memory.freed,
                "libraries": choice.libraries,
                "sent_per_step": choice.sent,
                "layers_of_busiest": choice.layers_of_busiest,
            }
            for choice in plan.choices
        },
    }


def _table(plan: Plan) -> Table:
    shown = Table(box=None, pad_edge=False)
    shown.add_column("GiB per rank")
    for choice in plan.choices:
        shown.add_column(choice.placement, justify="right")
    for name, label in PARTS.items():
        shown.add_row(label, *(_number(choice.memory.peak.parts[name].total) for choice in plan.choices))
    if any(choice.memory.freed for choice in plan.choices):
        shown.add_row("freed, kept by the heap", *(_number(choice.memory.freed) for choice in plan.choices))
    shown.add_row("libraries", *(_number(choice.libraries) for choice in plan.choices))
    shown.add_row("in all", *(_number(choice.total) for choice in plan.choices), style="bold")
    shown.add_row("highest in", *(choice.memory.peak.name for choice in plan.choices), style="dim")
    if plan.job.machine.count > 1:
        shown.add_row("GiB sent per step", *(_number(choice.sent) for choice in plan.choices))
    return shown


def _bar(choice: Choice) -> Text:
    share = choice.total / choice.capacity
    filled = min(BAR, round(BAR * share))
    style = "green" if choice.fits else "red"
    line = Text(f"{choice.placement:10}").append("█" * filled, style).append("░" * (BAR - filled), "dim")
    verdict = "fits" if choice.fits else "does not fit"
    return line.append(f" {share:4.0%} of {_gib(choice.capacity)}, {verdict}")


def _sizes(job: Job) -> str:
    return (
        f"{len(job.layers)} SAEs of {job.num_latents:,} latents on width {job.shape.d_in:,}, "
        f"{job.tokens_per_step:,} tokens per step"
    )


def _machine(machine: Machine) -> str:
    if machine.on_gpu:
        return f"{machine.count} × {machine.name} ({_gib(machine.memory)})"
    ranks = f", {machine.count} ranks share its memory" if machine.count > 1 else ""
    return f"{machine.name} ({_gib(machine.memory)}{ranks})"


def _number(size: int) -> str:
    return f"{size / 2**30:,.2f}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
