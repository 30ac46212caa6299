"""The recipe of Gao et al. 2024, given explicitly, and the default recipe, written out once more in plain torch."""

import pytest
import torch
import torch.nn.functional as F

from saekit import Sae, TrainConfig
from saekit.activations import tap
from saekit.activations.live import LiveModel
from saekit.training.optimizers import rate_ratios
from tests.training.conftest import CTX_LEN

LR, WARMUP, ALPHA, THRESHOLD, STEPS = 3e-3, 2, 1 / 32, 150, 6
COMMON = {
    "optimizer": "adam",
    "lr": LR,
    "lr_warmup_steps": WARMUP,
    "dead_feature_threshold": THRESHOLD,
    "init": "uniform",
    "shuffle": False,
    "kernels": "eager",
}
GAO = {
    "auxk_alpha": ALPHA,
    "scale_biases": False,
    "decoder_lr_ratio": 1.0,
    "encoder_bias_lr_ratio": 1.0,
    "revive_alpha": 0.0,
    "beta2": 0.999,
    "auxk_relative_to": "variance",
}
DEFAULTS = {
    "auxk_alpha": 0.0,
    "scale_biases": True,
    "decoder_lr_ratio": 4.0,
    "encoder_bias_lr_ratio": 6 * (16 / 128) ** 0.5,  # of the model below, whose width is 16
    "beta2": 0.95,
    "revive_alpha": 1e-4,
}
"""What `saekit train` does without being told, but for what is `COMMON` to both; `--init fit` has tests of its own."""


def reference(activations, sae, k, recipe):
    """Trains one SAE on a list of `[N, D]`, in float64, with torch's Adam, and returns its parameters by name."""
    W_enc, b_enc, W_dec, b_dec = (p.detach().double().requires_grad_() for p in sae.parameters())
    first = activations[0].double()
    b_dec.data = first.mean(0)
    variance = (first - first.mean(0)).square().sum(1).mean()
    rms = (variance / first.shape[1]).sqrt() if recipe["scale_biases"] else 1.0
    ratios = (1.0, recipe["encoder_bias_lr_ratio"] * rms, recipe["decoder_lr_ratio"], rms)
    groups = [{"params": [each]} for each in (W_enc, b_enc, W_dec, b_dec)]
    adam = torch.optim.Adam(groups, lr=LR, betas=(0.9, recipe["beta2"]), eps=1e-8)
    slept = torch.zeros(len(W_enc), dtype=torch.int64)
    revived = 0
    for step, x in enumerate(each.double() for each in activations):
        rising, falling = (step + 1) / (WARMUP + 1), (len(activations) - step) / (len(activations) - WARMUP)
        for group, ratio in zip(adam.param_groups, ratios, strict=True):
            group["lr"] = float(LR * ratio * (rising if step < WARMUP else falling))
        scores = F.relu((x - b_dec) @ W_enc.T + b_enc)
        acts, latents = scores.topk(k)
        error = x - torch.einsum("nk,nkd->nd", acts, W_dec[latents]) - b_dec
        loss = error.square().sum() / (len(x) * variance)
        dead = (slept >= THRESHOLD).nonzero().squeeze(1)
        if len(dead):
            revived += 1
            loss = loss - recipe["revive_alpha"] * b_enc[dead].sum() / (variance / x.shape[1]).sqrt()
            k_aux = x.shape[1] // 2
            aux_acts, aux = scores[:, dead].topk(min(k_aux, len(dead)))
            predicted = torch.einsum("nk,nkd->nd", aux_acts, W_dec[dead][aux])
            auxk = (error.detach() - predicted).square().sum() / (len(x) * variance)
            loss = loss + recipe["auxk_alpha"] * min(1, len(dead) / k_aux) * auxk
        adam.zero_grad()
        loss.backward()
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec.detach()
        adam.step()
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
        fired = torch.zeros_like(slept).scatter_add_(0, latents.flatten(), (acts > 0).flatten().long()) > 0
        slept = (slept + len(x)).masked_fill(fired, 0)
    assert revived, "else AuxK would not be tested"
    return dict(zip(dict(sae.named_parameters()), (W_enc, b_enc, W_dec, b_dec), strict=True))


@pytest.mark.parametrize("recipe", [GAO, DEFAULTS], ids=["Gao et al.", "defaults"])
def test_recipe(make_trainer, tiny_llama, tokens, recipe):
    data = tokens.select(range(8 * STEPS))
    trainer = make_trainer(data=data, **COMMON, **recipe)
    found = Sae.load_many(trainer.fit())
    hookpoint, excluded = trainer.plan.hookpoints[1], torch.tensor([0, 1])
    activations = []
    with torch.inference_mode(), tap(tiny_llama, [hookpoint]) as read:
        for batch in data.with_format("torch").iter(8):
            assert batch["input_ids"].shape[1] == CTX_LEN
            kept = ~torch.isin(batch["input_ids"], excluded)
            activations.append(read(batch["input_ids"])[hookpoint][kept].clone())
    fresh = Sae(16, 64, 4, generator=torch.Generator().manual_seed(1))  # layer 1 of seed 0
    for name, expected in reference(activations, fresh, 4, recipe).items():
        torch.testing.assert_close(found[hookpoint].get_parameter(name).double(), expected, rtol=1e-3, atol=1e-4)


def test_the_defaults_are_the_defaults():
    cfg = TrainConfig()
    assert rate_ratios(cfg, 16) == (DEFAULTS["decoder_lr_ratio"], DEFAULTS["encoder_bias_lr_ratio"])
    assert all(getattr(cfg, name) == value for name, value in DEFAULTS.items() if "ratio" not in name)


@pytest.mark.parametrize("unit", [1 / 64, 64.0])
def test_activations_in_another_unit_train_the_same_sae(make_trainer, tokens, monkeypatch, unit):
    recipe = {"dead_feature_threshold": THRESHOLD, "shuffle": False, "kernels": "eager"}
    data = tokens.select(range(8 * STEPS))
    plain = Sae.load_many(make_trainer(data=data, **recipe).fit())
    run = LiveModel._run

    def scaled_run(self, batch):
        acts = run(self, batch)
        return acts._replace(of={name: x_ND * unit for name, x_ND in acts.of.items()})

    monkeypatch.setattr(LiveModel, "_run", scaled_run)
    scaled = Sae.load_many(make_trainer(data=data, run_name="scaled", **recipe).fit())
    assert plain.keys() == scaled.keys()
    for hookpoint, sae in plain.items():
        assert scaled[hookpoint].max_norm == pytest.approx(sae.max_norm * unit)
        for name, expected in sae.named_parameters():
            factor = unit if name.startswith("b_") else 1.0
            torch.testing.assert_close(
                scaled[hookpoint].get_parameter(name), expected * factor, rtol=1e-4, atol=1e-5 * factor
            )
