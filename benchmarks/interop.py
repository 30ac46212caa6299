"""Both toolkits reconstruct the same activations with the same SAEs: how far apart are they?

    python benchmarks/interop.py RUN/latest

The folder holds one SAE per hookpoint, written by saekit or by eai-sparsify.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import activations, peer_python, run_script
from rich.console import Console
from safetensors.torch import load_file, save_file

from saekit import Sae

TOKENS = 4096
console = Console()


@torch.inference_mode()
def main(
    saes: Annotated[Path, typer.Argument(help="A folder with one SAE folder per hookpoint.")],
    peer: Annotated[Path | None, typer.Option("--peer-python", help="A Python that has eai-sparsify.")] = None,
) -> None:
    """Print the largest difference of each layer, divided by the root mean square of our reconstruction."""
    ours = {name: sae.eval() for name, sae in Sae.load_many(saes).items()}
    x = {name: activations(TOKENS, sae.d_in) for name, sae in ours.items()}
    with tempfile.TemporaryDirectory() as work:
        asked, answered = Path(work, "x.safetensors"), Path(work, "recon.safetensors")
        save_file(x, asked)
        run_script(peer_python(peer, console.print), "peers/sparsify_reconstruct.py", saes, asked, answered)
        theirs = load_file(answered)
    for name, sae in ours.items():
        recon = sae(x[name]).recon.double()
        console.print(
            f"{name}: {float((recon - theirs[name].double()).abs().max() / recon.square().mean().sqrt()):.1e}"
        )


if __name__ == "__main__":
    typer.run(main)
