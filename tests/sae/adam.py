"""Arguments of a kernel's Adam."""

import torch

from saekit.sae.kernels.eager import adam_numbers


def adam_settings(step, *, lr=0.01, betas=(0.9, 0.95), unit_rows=False, device="cpu"):
    """Of a step, from 1; all but the tensors that it changes, and the gradient."""
    numbers = torch.tensor(adam_numbers(step, lr, *betas), dtype=torch.float64, device=device)
    return {"numbers": numbers, "beta1": betas[0], "beta2": betas[1], "eps": 1e-8, "unit_rows": unit_rows}
