"""Compares saekit's and eai-sparsify's reconstructions of the same activations with the same coders.

    python benchmarks/interop.py RUN/latest
    python benchmarks/interop.py

The folder holds one coder per hookpoint, written by saekit or by eai-sparsify. Without a folder, each toolkit writes
coders with random weights of every kind that both support (autoencoders, transcoders and skip transcoders, TopK and
GroupMax, two seeds each), and the other toolkit reads them.
"""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import activations, peer_python, run_script
from rich.console import Console
from safetensors.torch import load_file, save_file

import saekit
from saekit import Sae

TOKENS = 4096
FARTHEST = 1e-6
"""The largest difference that passes, see `main`."""
D, M, K = 24, 96, 8
console = Console()


@torch.inference_mode()
def main(
    saes: Annotated[Path | None, typer.Argument(help="A folder with one folder per hookpoint.")] = None,
    peer: Annotated[Path | None, typer.Option("--peer-python", help="A Python that has eai-sparsify.")] = None,
) -> None:
    """Print the largest difference of each coder, divided by the root mean square of saekit's reconstruction.

    Without a folder, exit with an error if one is above 1e-6.
    """
    python = peer_python(peer, console.print)
    if saes is not None:
        show(compare(saes, python))
        return
    with tempfile.TemporaryDirectory() as work:
        ours, theirs = Path(work, "saekit"), Path(work, "sparsify")
        write_ours(ours)
        run_script(python, "peers/sparsify_coders.py", theirs)
        found = {f"{folder.name}: {name}": far for folder in (ours, theirs) for name, far in compare(folder, python)}
    show(found.items())
    if not all(far <= FARTHEST for far in found.values()):
        raise SystemExit(f"the two toolkits differ by more than {FARTHEST:g}")


def compare(saes: Path, python: Path) -> list[tuple[str, float]]:
    """Return the difference between the two toolkits, by hookpoint and kind."""
    ours = {name: sae.eval() for name, sae in saekit.load_many(saes).items()}
    x = {name: activations(TOKENS, sae.d_in) for name, sae in ours.items()}
    with tempfile.TemporaryDirectory() as work:
        asked, answered = Path(work, "x.safetensors"), Path(work, "recon.safetensors")
        save_file(x, asked)
        run_script(python, "peers/sparsify_reconstruct.py", saes, asked, answered)
        theirs = load_file(answered)
    found = []
    for name, sae in ours.items():
        recon = sae(x[name]).recon.double()
        far = float((recon - theirs[name].double()).abs().max() / recon.square().mean().sqrt())
        skip = " with a skip connection" if sae.W_skip is not None else ""
        kind = f"{'transcoder' if sae.transcode else 'autoencoder'}{skip}"
        found.append((f"{name} ({sae.activation} {kind})", far))
    return found


def show(found: Any) -> None:
    """Print the differences."""
    for name, far in found:
        console.print(f"{name}: {far:.1e}", soft_wrap=True)


def write_ours(folder: Path) -> None:
    """Write coders with random weights."""
    kinds = product(("topk", "groupmax"), ({}, {"transcode": True}, {"transcode": True, "skip_connection": True}))
    for number, (selection, kind) in enumerate(kinds):
        for seed in range(2):
            generator = torch.Generator().manual_seed(100 * number + seed)
            sae = Sae(D, M, K, selection=selection, **kind)
            for parameter in sae.parameters():
                parameter.normal_(generator=generator)
            saekit.save(sae, folder / f"layers.{number}.mlp" / f"seed{seed}")


if __name__ == "__main__":
    typer.run(main)
