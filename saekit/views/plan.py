"""A plan as a table with bars, and as JSON; measured rates as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saekit import units
from saekit.activations.patterns import fold
from saekit.activations.sites import widths_of
from saekit.placement.costs import Size
from saekit.planning.advice import Advice
from saekit.planning.calibration import MeasuredRates
from saekit.planning.job import Job
from saekit.planning.machine import Machine
from saekit.planning.plan import Choice, Plan
from saekit.planning.rates import Rates
from saekit.text import for_screen

BAR = 24
"""Characters of a full bar."""
PARTS = {
    "language_model": "language model",
    "parameters": "{coder} parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "activations",
    "working": "working memory",
}
ESTIMATED = "The numbers are the tensors of the busiest rank; the libraries' share is an allowance."
UNKNOWN = "Tokens/s are unknown until saekit plan --calibrate has measured this machine."


def render_plan(plan: Plan, console: Console, advice: Sequence[Advice] = ()) -> None:
    """Print a plan, and what to change where it does not fit."""
    job = plan.job
    models = [each.model for each in (job.cfg.model, job.cfg.other_model) if each is not None]
    _say(console, f"{' and '.join(models)}: {_sizes(job)}", "bold")
    for line in _read_and_written(job):
        _say(console, line)
    _say(console, f"on {_machine(job.machine)}\n")
    console.print(_table(plan))
    for choice in plan.choices:
        console.print(_bar(choice))
    console.print()
    console.print(_verdict(plan), soft_wrap=not console.file.isatty())
    if advice:
        console.print(_advice_table(advice))
        if not any(each.choice.fits for each in advice):
            console.print("None of these changes makes it fit, not even all together.")
    if job.machine.note:
        _say(console, job.machine.note, "yellow")
    elif not any(choice.time for choice in plan.choices):
        console.print(f"[dim]{UNKNOWN}" if job.machine.model else "[dim]Tokens/s are known for this machine only.")
    _say(console, ESTIMATED, "dim")


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(for_screen(text, console), style=style), soft_wrap=True)


def plan_to_json(plan: Plan, advice: Sequence[Advice] = ()) -> dict[str, Any]:
    """Return the same as plain values, in bytes and seconds."""
    job = plan.job
    return {
        "model": job.cfg.model.model,
        **({} if job.cfg.other_model is None else {"other_model": job.cfg.other_model.model}),
        "layers": list(job.layers),
        "hookpoints": [each.site.name for each in job.units],
        "coder": job.coder,
        "sites": [
            {"name": site.name, "reads": widths_of(site.reads), "writes": widths_of(site.writes)}
            for site in (each.site for each in job.units)
        ],
        "d_in": _of_units([each.site.d_in for each in job.units]),
        "d_out": _of_units([each.site.d_out for each in job.units]),
        "num_latents": _of_units([each.num_latents for each in job.units]),
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
                "host": choice.memory.host,
                "tokens_per_second": choice.tokens_per_second,
                "seconds_per_step": asdict(choice.time) if choice.time else None,
            }
            for choice in plan.choices
        },
        "advice": [
            {
                "options": list(each.options),
                "placement": each.choice.placement,
                "layers": each.layers,
                "total": each.choice.total,
                "host": each.choice.memory.host,
                "fits": each.choice.fits,
            }
            for each in advice
        ],
    }


def _of_units(values: list[int]) -> int | list[int]:
    """Return the number of all SAEs, or one each if they differ."""
    return values[0] if len(set(values)) == 1 else values


def _table(plan: Plan) -> Table:
    shown = Table(box=None, pad_edge=False)
    shown.add_column("GiB per rank")
    for choice in plan.choices:
        shown.add_column(choice.placement, justify="right")
    for name, label in PARTS.items():
        shown.add_row(
            label.format(coder=plan.job.coder),
            *(_number(choice.memory.peak.parts[name].total) for choice in plan.choices),
        )
    if any(choice.memory.freed for choice in plan.choices):
        shown.add_row("freed, kept by the heap", *(_number(choice.memory.freed) for choice in plan.choices))
    shown.add_row("libraries", *(_number(choice.libraries) for choice in plan.choices))
    shown.add_row("total", *(_number(choice.total) for choice in plan.choices), style="bold")
    shown.add_row("peak in", *(choice.memory.peak.name for choice in plan.choices), style="dim")
    if plan.job.machine.count > 1:
        shown.add_row("GiB sent per step", *(_number(choice.sent) for choice in plan.choices))
    if any(choice.memory.host for choice in plan.choices):
        shown.add_row("GiB in host memory", *(_number(choice.memory.host) for choice in plan.choices))
    if any(choice.time for choice in plan.choices):
        shown.add_row("tokens/s, expected", *(_speed(choice) for choice in plan.choices))
    return shown


def _verdict(plan: Plan) -> str:
    """Tell which placement to take, or how much is lacking."""
    best = plan.recommended
    if not plan.fits:
        least = min(plan.considered, key=lambda choice: choice.total)
        lacking = f"lacks {_gib(least.total - least.capacity)}"
        if len(plan.considered) > 1:
            return f"[red]None fits[/red]: {least.placement} needs the least memory and {lacking}."
        other = f" {best.placement} would fit." if best else ""
        return f"[red]{least.placement} does not fit[/red]: it {lacking}.{other}"
    if best is None or best.ranks == 1:
        return "It fits."
    why = "it is expected to be the fastest" if best.time else "it sends the least per step"
    return f"Use [bold]{best.placement}[/bold]: of the placements that fit, {why}."


def _advice_table(advice: Sequence[Advice]) -> Table:
    shown = Table(box=None, pad_edge=False)
    shown.add_column("what to change")
    shown.add_column("GiB", justify="right")
    shown.add_column("")
    for each in advice:
        choice, host = each.choice, each.choice.memory.host
        verdict = Text("fits", "green") if choice.fits else Text("does not fit", "red")
        layers = units.plural(each.layers, "layer")
        on_host = f", {_gib(host)} per rank in host memory" if host else ""
        verdict.append(f": {choice.placement}, {layers}{on_host}", "default")
        shown.add_row(" ".join(each.options), _number(choice.total), verdict)
    return shown


def _speed(choice: Choice) -> str:
    return f"{choice.tokens_per_second:,.0f}" if choice.tokens_per_second else "unknown"


def _bar(choice: Choice) -> Text:
    share = choice.total / choice.capacity
    filled = min(BAR, round(BAR * share))
    style = "green" if choice.fits else "red"
    line = Text(f"{choice.placement:10}").append("█" * filled, style).append("░" * (BAR - filled), "dim")
    verdict = "fits" if choice.fits else "does not fit"
    return line.append(f" {share:4.0%} of {_gib(choice.capacity)}, {verdict}")


def _sizes(job: Job) -> str:
    sizes = [each.size for each in job.units]
    few = "" if len(sizes) == 1 and job.coder != "SAE" else "s"
    kinds = [
        f"{sizes.count(size):,}{'' if number else f' {job.coder}{few}'} of {size.num_latents:,} latents {_widths(size)}"
        for number, size in enumerate(dict.fromkeys(sizes))
    ]
    return f"{', '.join(kinds)}, {job.tokens_per_step:,} tokens per step"


def _widths(size: Size) -> str:
    return f"from width {size.d_in:,} to {size.d_out:,}" if size.transcodes else f"on width {size.d_in:,}"


def _read_and_written(job: Job) -> Iterator[str]:
    """Name what transcoders and crosscoders read and write; of an SAE it goes without saying."""
    if job.coder == "SAE":
        return
    sites = [each.site for each in job.units]
    read = ", ".join(fold([part.name for site in sites for part in site.reads]))
    if job.coder == "crosscoder":
        yield f"reads and writes {read}"
    else:
        yield f"read {read}"
        yield f"write {', '.join(fold([part.name for site in sites for part in site.writes]))}"


def _machine(machine: Machine) -> str:
    if machine.on_gpu:
        return f"{machine.count} × {machine.name} ({_gib(machine.memory)})"
    ranks = f", {machine.count} ranks share its memory" if machine.count > 1 else ""
    return f"{machine.name} ({_gib(machine.memory)}{ranks})"


def _number(size: int) -> str:
    return f"{size / 2**30:,.2f}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


BUSY = 0.15
"""Share of the CPU in others' use from which a calibration is doubted."""


def render_rates(calibration: MeasuredRates, console: Console) -> None:
    """Print what a calibration has found, and where it is kept."""
    for name, rates in calibration.found.items():
        shown = Table(box=None, pad_edge=False, title=name, title_justify="left", title_style="bold")
        shown.add_column("measured")
        shown.add_column("", justify="right")
        shown.add_column("")
        for row in _rows(rates):
            shown.add_row(*row)
        console.print(shown)
    if calibration.busy > BUSY:
        busy = f"Other processes used {calibration.busy:.0%} of the CPU"
        _say(console, f"{busy}, so the rates are too low: measure again when it is idle.", "yellow")
    _say(console, f"Saved to {calibration.file}\n", "dim")


def _rows(rates: Rates) -> Iterator[tuple[str, str, str]]:
    for name, rate in rates.matmul.items():
        yield f"matmul {name}", f"{rate / 1e12:,.2f}", "10¹² operations/s"
    yield "memory", f"{rates.bandwidth / 1e9:,.1f}", "GB/s read and written by a copy"
    for name, seconds in rates.block.items():
        yield f"a block {name}", f"{seconds * 1e9:,.1f}", "ns per token and dimension, without matmuls"
    for name, cost in rates.passes.items():
        parts = f"{cost.score * 1e9:.2f} N·M + {cost.term * 1e9:.2f} N·k·D + {cost.weight * 1e9:.2f} M·D"
        yield f"SAE {name}", parts, f"ns, and {cost.call * 1e3:.1f} ms, without the encoder's matmul"
    for name, seconds in rates.update.items():
        yield name, f"{seconds * 1e9:.2f}", "ns per parameter"
    for ranks, network in rates.network.items():
        yield f"all-reduce, {ranks} ranks", f"{network.all_reduce / 1e9:,.2f}", "GB/s sent by each rank"
        yield f"rank to rank, {ranks} ranks", f"{network.point_to_point / 1e9:,.2f}", "GB/s sent by each rank"
