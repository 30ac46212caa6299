"""Steer a language model along one latent of an SAE, and see what it writes.

    saekit demo
    python examples/steer.py saekit-demo/run-1 --layer 3 --text "def main("

`# %%` marks cells, for stepping through the script.
"""

# %%
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import saekit


def main(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    layer: int = 0,
    latent: Annotated[int | None, typer.Option(help="Latent to steer; by default the most active on the text.")] = None,
    strength: Annotated[float, typer.Option(help="Factor on the latent's largest activation on the text.")] = 4.0,
    text: str = "import os",
    new_tokens: int = 40,
) -> None:
    """Generate text with and without steering."""
    # %% Load the model that the run was trained on, and the SAE of one layer.
    name = yaml.safe_load((run / "config.yaml").read_text())["model"]
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    saes = saekit.load_many(run)
    hookpoint = next(each for each in saes if each.endswith(f".{layer}"))
    sae = saes[hookpoint]

    # %% Find the latents that are active on the text, without the first token, which is an outlier in most models.
    prompt = tokenizer(text, return_tensors="pt")
    with saekit.tap(model, [hookpoint]) as read:
        acts, indices = sae.encode(read(prompt.input_ids)[hookpoint][0, 1:])
    dense = torch.zeros(len(acts), sae.num_latents).scatter_(1, indices, acts.detach())
    latent = int(dense.amax(0).argmax()) if latent is None else latent
    push = strength * max(float(dense[:, latent].max()), 1.0) * sae.W_dec[latent].detach()
    typer.echo(f"{hookpoint}, latent {latent}; pushed by {float(push.norm()):.2f}\n")

    # %% Generate text with and without steering.
    for title, changes in {"as it is": {}, "pushed": {hookpoint: lambda resid: resid + push}}.items():
        with torch.no_grad(), saekit.splice(model, changes):
            written = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        typer.echo(f"--- {title}\n{tokenizer.decode(written[0])}\n")


if __name__ == "__main__":
    typer.run(main)
