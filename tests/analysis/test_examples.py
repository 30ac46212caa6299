"""The examples that work with a trained run, as a reader would start them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import saekit
from saekit import Sae
from saekit.demo import MODEL_DIR

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def start(forked):
    def start(name, *arguments):
        done = forked.complete(EXAMPLES / name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return start


@pytest.mark.parametrize(("name", "lines"), [("steer.py", 60), ("gather_activations.py", 60), ("circuit.py", 80)])
def test_they_are_short(name, lines):
    assert len((EXAMPLES / name).read_text("utf-8").splitlines()) < lines


def test_a_circuits_parts_add_up_to_what_a_transcoder_adds(tmp_path, start):
    text, said = tmp_path / "text.txt", "import os\n\ndef main(args):\n    return os.path.join(*args)\n"
    text.write_text(said * 40)
    options = {"transcode": True, "layers": "2,4", "num_latents": 128, "k": 8, "ctx_len": 32, "max_tokens": 1024}
    saekit.train(MODEL_DIR, text, dtype="float32", batch_size=4, save_dir=tmp_path, run_name="run", **options)
    lines = start("circuit.py", tmp_path / "run", "--text", said, "--show", 4).splitlines()
    assert len([line for line in lines if line.startswith("  ")]) == 4
    latent = int(lines[0].split()[1])
    score, of_early = (float(line.split()[-3 if line.endswith("selection") else -1]) for line in lines[:2])

    # So much less would the late encoder's score be without what the early one's latents add, at the same divisor.
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR).float().eval()
    early, late = saekit.load_many(tmp_path / "run").values()
    assert late.trained_on == (str(MODEL_DIR), "layers.4.mlp", None)
    saekit.save(late, tmp_path / "alone")
    alone = saekit.load(tmp_path / "alone")
    assert (alone.trained_on, alone.reads, alone.writes) == (late.trained_on, {"layers.4.mlp:in": 128}, late.writes)
    ids = AutoTokenizer.from_pretrained(MODEL_DIR)(said, return_tensors="pt").input_ids
    norm_in = "layers.4.post_attention_layernorm:in"
    with saekit.tap(model, ["layers.2.mlp:in", "layers.4.mlp:in", norm_in]) as read, torch.no_grad():
        seen = {name: acts[0, 1:] for name, acts in read(ids).items()}
        scores_N = seen["layers.4.mlp:in"] @ late.W_enc[latent] + late.b_enc[latent]
        token = int((scores_N - score).abs().argmin())
        assert float(scores_N[token]) == pytest.approx(score, abs=1e-3)
        added_D = (early(seen["layers.2.mlp:in"]).recon - early.b_dec)[token]
        norm = model.model.layers[4].post_attention_layernorm
        rms = (seen[norm_in][token].square().mean() + norm.variance_epsilon).sqrt()
        less = float((norm.weight * added_D / rms) @ late.W_enc[latent])
    assert of_early == pytest.approx(less, abs=1e-3)


def test_steering_changes_what_is_written(demo_run, start):
    said = start("steer.py", demo_run, "--layer", 3, "--strength", 20, "--new-tokens", 12)
    as_it_is, pushed = said.split("--- as it is\n")[1].split("--- pushed\n")
    assert as_it_is.startswith("import os")
    assert pushed.startswith("import os")
    assert as_it_is.strip() != pushed.strip()
    # Without a push both are the same.
    said = start("steer.py", demo_run, "--layer", 3, "--strength", 0, "--new-tokens", 12)
    as_it_is, pushed = said.split("--- as it is\n")[1].split("--- pushed\n")
    assert as_it_is.strip() == pushed.strip()


def test_gathered_codes_decode_to_the_reconstruction(demo_run, tmp_path, start):
    out = tmp_path / "acts.safetensors"
    said = start("gather_activations.py", demo_run, EXAMPLES / "steer.py", "--out", out, "--ctx-len", 32)
    assert "layers.3.resid" in said
    tensors = load_file(out)
    sae = Sae.load_many(demo_run)["layers.3"]
    resid = tensors["layers.3.resid"].float()
    assert tensors["input_ids"].shape == resid.shape[:2]
    with torch.no_grad():
        recon = sae.decode(tensors["layers.3.acts"], tensors["layers.3.latents"].long())
        again = sae(resid).recon
    # The activations are kept in 16 bits.
    assert (recon - again).norm() < 0.02 * again.norm()
