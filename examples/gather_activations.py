"""Write a model's residual stream and its SAEs' codes to a file.

    saekit demo
    python examples/gather_activations.py saekit-demo/run-1 README.md --out acts.safetensors

`# %%` marks cells, for stepping through the script.
"""

# %%
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import saekit


def main(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    text: Annotated[Path, typer.Argument(help="A text file.")],
    out: Path = Path("acts.safetensors"),
    ctx_len: int = 256,
    batch_size: int = 8,
) -> None:
    """Gather activations and codes."""
    # %% Load the model that the run was trained on, and its SAEs.
    name = yaml.safe_load((run / "config.yaml").read_text())["model"]
    model = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    saes = saekit.load_many(run)

    # %% Tokenize the text into sequences of equal length. The rest at the end is dropped.
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids)
    sequences = ids[: len(ids) // ctx_len * ctx_len].view(-1, ctx_len)

    # %% Gather activations and codes, batch by batch.
    parts: dict[str, list[torch.Tensor]] = {}
    with torch.inference_mode(), saekit.tap(model, list(saes)) as read:
        for batch in sequences.split(batch_size):
            for hookpoint, resid in read(batch).items():
                code = saes[hookpoint].encode(resid)
                parts.setdefault(f"{hookpoint}.resid", []).append(resid.to(torch.bfloat16))
                parts.setdefault(f"{hookpoint}.acts", []).append(code.acts)
                parts.setdefault(f"{hookpoint}.latents", []).append(code.indices.int())

    # %% Write one file: resid [S, T, D], acts and latents [S, T, K], and the token ids [S, T].
    tensors = {name: torch.cat(each) for name, each in parts.items()}
    save_file({**tensors, "input_ids": sequences.contiguous()}, out)
    for name, tensor in tensors.items():
        typer.echo(f"{name:24} {list(tensor.shape)!s:20} {tensor.dtype}")


if __name__ == "__main__":
    typer.run(main)
