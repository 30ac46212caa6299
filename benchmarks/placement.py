"""Compares the traffic and memory of each placement on several ranks with what the placement predicts.

It trains SAEs, SAEs of two widths, and transcoders with a skip connection that read in one layer and write in the next.

    python benchmarks/placement.py                     two ranks
    python benchmarks/placement.py --ranks 3           with decoder rows cut between ranks, and an uneven layer map

Ranks are processes on this machine's CPU with gloo. Traffic is what the kernel counts per TCP socket. Memory is that of
the tensors that the placement holds when the optimizer steps. Exits with code 1 if measured and predicted bytes differ
by more than a tenth.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from common import HERE, hardware, run_script, versions
from rich.console import Console
from rich.table import Table

from saekit.placement.choose import kind_of
from saekit.placement.costs import Size, Workload

PLACEMENTS = ("ddp", "zero3", "layer-map")
TOLERANCE = 0.1
SMALLEST = 100_000
"""The smallest number of bytes that a difference is compared with. Token counts, requests to stop and the store take a
few thousand bytes per step, which the planner leaves out, also where it predicts no traffic at all."""
CTX_LEN = 64
FIRST_STEP, STEPS = 3, 13
"""The optimizer steps in which counters are read: by then, connections and lazy buffers exist."""
QUANTITIES = ("sent", "received", "held")
console = Console()


@dataclass(frozen=True)
class Setting:
    """How a step is split, the type of the activations, and the coders. The tokens of a step are always the same."""

    name: str
    micro_batches: int
    chunks: int
    dtype: str
    coders: tuple[tuple[str, str], ...] = ()
    """Options of `TrainConfig`; without any, SAEs of all blocks' outputs. `LAST` stands for the number of the last
    layer, `BEFORE` for that of the second to last."""
    skip: bool = False

    def options(self, layers: int) -> dict[str, str]:
        """Return the options for a model with this number of layers."""
        last, before = str(layers - 1), str(layers - 2)
        return {name: value.replace("LAST", last).replace("BEFORE", before) for name, value in self.coders}


HIDDEN, EARLIER_HIDDEN = "layers.*.mlp.down_proj:in", "layers.{0-BEFORE}.mlp.down_proj:in"
"""Hookpoints that are twice as wide as the residual stream."""
SETTINGS = (
    Setting("whole", 1, 1, "float32"),
    Setting("cut", 2, 3, "bfloat16"),
    Setting("transcoders", 1, 2, "float32", (("reads", EARLIER_HIDDEN), ("writes", "layers.{1-LAST}.mlp")), skip=True),
    Setting("two widths", 2, 1, "bfloat16", (("hookpoints", f"resid,{HIDDEN}"),)),
)
BYTES = {"float32": 4, "bfloat16": 2}


def main(
    ranks: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
    layers: Annotated[int, typer.Option(help="Layers of the language model, with one or two coders each.", min=2)] = 4,
    width: Annotated[int, typer.Option(help="Width of the language model.")] = 128,
    latents: Annotated[int, typer.Option(help="Latents per SAE.")] = 1024,
    k: Annotated[int, typer.Option(help="Active latents per token.")] = 16,
    batch_size: Annotated[
        int, typer.Option(help=f"Sequences of {CTX_LEN} tokens per rank and step; even.", min=2)
    ] = 16,
    placement: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PLACEMENTS)}; repeatable, all by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File for the results.")] = HERE / "results" / "placement.json",
) -> None:
    """Measure the traffic and the memory of the placements, and compare them with the planner's."""
    if unknown := set(placement or ()) - set(PLACEMENTS):
        names = ", ".join(PLACEMENTS)
        raise typer.BadParameter(f"--placement {', '.join(sorted(unknown))}: there is none; choose from {names}")
    if batch_size % 2:
        raise typer.BadParameter(f"--batch-size {batch_size} is odd: give an even number, for two micro-batches")
    base = Workload(layers, Size(latents, width, width), ranks, batch_size * CTX_LEN, backend="gloo")
    runs = []
    with tempfile.TemporaryDirectory(prefix="saekit-placement-") as work:
        for setting in SETTINGS:
            load = replace(
                base,
                micro_batches=setting.micro_batches,
                chunks=setting.chunks,
                act_bytes=BYTES[setting.dtype],
                skip=setting.skip,
            )
            for name in (each for each in PLACEMENTS if each in (placement or PLACEMENTS)):
                read = measure(name, load, setting, k, Path(work) / f"{setting.name}-{name}")
                runs.append({"setting": setting.name, "placement": name, "ranks": list(compare(name, load, read))})
                console.print(table(runs[-1]))
    write(out, base, runs)
    worst = max(runs, key=deviation)
    console.print(f"Furthest apart: {worst['placement']}, {worst['setting']}: {deviation(worst):.1%}")
    console.print(f"The numbers are in {out.name}.")
    if deviation(worst) > TOLERANCE:
        raise typer.Exit(1)


def measure(placement: str, load: Workload, setting: Setting, k: int, folder: Path) -> list[dict[str, Any]]:
    """Train for a few steps and return every rank's readings."""
    folder.mkdir()
    job = {
        "placement": placement,
        "world_size": load.world_size,
        "layers": load.layers,
        "d_in": load.size.d_in,
        "num_latents": load.size.num_latents,
        "k": k,
        "ctx_len": CTX_LEN,
        "batch_size": load.tokens // CTX_LEN // setting.micro_batches,
        "micro_batches": setting.micro_batches,
        "chunks": setting.chunks,
        "dtype": setting.dtype,
        "coders": setting.options(load.layers),
        "skip": setting.skip,
        "first": FIRST_STEP,
        "steps": STEPS,
        "out": str(folder),
    }
    file = folder / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    run_script(sys.executable, "placement_worker.py", file)
    return [json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in range(load.world_size)]


def compare(placement: str, load: Workload, readings: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each rank's quantities, measured and planned."""
    kind = kind_of(placement)
    for read in readings:
        sizes = {name: Size(*size) for name, size in read["units"].items()}
        held = [sizes[name] for name in read["held_units"]]
        expected = dict.fromkeys(QUANTITIES, 0)
        for size in dict.fromkeys(sizes.values()):
            part = replace(load, layers=list(sizes.values()).count(size), size=size)
            planned, owned = kind.traffic(part, held.count(size)), held.count(size)
            more = (planned.sent, planned.received, kind.memory(part, owned))
            expected = {key: expected[key] + each for key, each in zip(QUANTITIES, more, strict=True)}
        pairs = {key: {"measured": read[key], "planned": plan} for key, plan in expected.items()}
        yield {"layers": len(held), **pairs}


def deviation(run: dict[str, Any]) -> float:
    """Return the largest relative difference between measured and planned quantities."""
    pairs = [rank[quantity] for rank in run["ranks"] for quantity in QUANTITIES]
    return max(abs(pair["measured"] - pair["planned"]) / max(pair["planned"], SMALLEST) for pair in pairs)


def table(run: dict[str, Any]) -> Table:
    """Make a table of one run's ranks, measured and planned. Traffic is per optimizer step."""
    shown = Table("rank", "layers", "", title=f"{run['placement']}, step {run['setting']}", title_justify="left")
    for column in ("measured MB", "planned MB", "ratio"):
        shown.add_column(column, justify="right")
    for number, rank in enumerate(run["ranks"]):
        for quantity in QUANTITIES:
            measured, planned = rank[quantity]["measured"], rank[quantity]["planned"]
            ratio = f"{measured / planned:.4f}" if planned else "–"
            own = (str(number), str(rank["layers"])) if quantity == QUANTITIES[0] else ("", "")
            shown.add_row(*own, quantity, f"{measured / 1e6:.3f}", f"{planned / 1e6:.3f}", ratio)
    return shown


def write(out: Path, base: Workload, runs: list[dict[str, Any]]) -> None:
    """Write these runs to the file, which may also hold runs with other numbers of ranks."""
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    record[f"{base.world_size} ranks"] = {
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": {**versions(sys.executable), "deepspeed": version("deepspeed")},
        "workload": {
            **{key: getattr(base, key) for key in ("layers", "tokens", "backend")},
            "d_in": base.size.d_in,
            "num_latents": base.size.num_latents,
        },
        "settings": {each.name: vars(each) for each in SETTINGS},
        "runs": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
