"""Find the latents of one layer's transcoder that feed a latent of a later transcoder, by their weights and on a text.

    saekit demo --transcode
    python examples/circuit.py saekit-demo/run-1 --early 2 --late 4

A transcoder's latent adds its decoder row to the residual stream, and a later encoder reads the stream through the norm
before its MLP. The direct path from one latent to the other is therefore one number, the same on every text. Paths
through attention and through MLPs in between are left out. `# %%` marks cells.
"""

# %%
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import saekit


@torch.no_grad()
def main(
    run: Annotated[Path, typer.Argument(help="The folder of a run with transcoders of MLPs.")],
    early: int = 2,
    late: int = 4,
    latent: Annotated[int | None, typer.Option(help="Latent of the late layer; by default the most active.")] = None,
    text: str = "import os\n\n\ndef main(args):\n    for name in args:\n        print(name)\n",
    show: int = 8,
) -> None:
    """Print the latents that feed a late latent most, with their weights and their contributions on the text."""
    # %% Load the model that the run was trained on, and the two transcoders.
    name = yaml.safe_load((run / "config.yaml").read_text())["model"]
    model = AutoModelForCausalLM.from_pretrained(name).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    coders = saekit.load_many(run)
    first, second = (next(coders[each] for each in coders if f".{layer}." in each) for layer in (early, late))
    (reads_first,), (reads_second,) = first.reads, second.reads  # such as layers.2.mlp:in

    # %% Read the inputs of both on the text, and the residual stream before the later one's norm.
    norm_name = reads_second.replace("mlp:in", "post_attention_layernorm")
    norm = model.base_model.get_submodule(norm_name)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with saekit.tap(model, [reads_first, reads_second, f"{norm_name}:in"]) as read:
        seen = {each: acts[0, 1:] for each, acts in read(ids).items()}  # the first token is an outlier
    rms_N = seen[f"{norm_name}:in"].square().mean(-1).add(norm.variance_epsilon).sqrt()

    # %% Encode them as dense tensors, tokens × latents. Choose the latent to explain, and the token where it peaks.
    first_NM, second_NM = (
        torch.zeros(len(rms_N), coder.num_latents).scatter_(1, code.indices, code.acts)
        for coder, code in ((first, first.encode(seen[reads_first])), (second, second.encode(seen[reads_second])))
    )
    latent = int(second_NM.amax(0).argmax()) if latent is None else latent
    token = int(second_NM[:, latent].argmax())

    # %% Compute the circuit's weights: decoder rows times the encoder's row, with the norm's own weights in between.
    feeds_M = first.W_dec @ (norm.weight * second.W_enc[latent])

    # %% On that token, each latent's part is its activation times its weight, divided by the norm's scale.
    parts_M = first_NM[token] * feeds_M / rms_N[token]
    score = second.W_enc[latent] @ seen[reads_second][token] + second.b_enc[latent]
    word = tokenizer.decode(ids[0, 1 + token])
    typer.echo(f"latent {latent} of layer {late} on {word!r}: {float(score):.4f} before selection")
    typer.echo(f"of which layer {early}'s latents: {float(parts_M.sum()):.4f}")
    for number in parts_M.abs().topk(show).indices.tolist():
        typer.echo(f"  {number:6}  weight {float(feeds_M[number]):8.3f}  part {float(parts_M[number]):8.4f}")
    strongest = feeds_M.abs().topk(show).indices.tolist()
    typer.echo(f"strongest weights on any text: {', '.join(f'{i} ({float(feeds_M[i]):.2f})' for i in strongest)}")


if __name__ == "__main__":
    typer.run(main)
