"""What the tests of SAEs against formulas have in common."""

import torch


def away_from_the_start_(sae, size):
    """Move all weights off the special start, biases at zero and a tied decoder, in place; always alike."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return sae


def tokens(*shape):
    """Activations, float64, always alike."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 + 1


def dense_topk(scores, k):
    """`[N, M]` with all but the k largest entries of each row set to zero."""
    return scores * torch.zeros_like(scores).scatter(1, scores.topk(k, dim=1).indices, 1.0)


def dense(acts, indices, num_latents):
    """A code as `[..., M]`."""
    return torch.zeros(*acts.shape[:-1], num_latents, dtype=acts.dtype).scatter(-1, indices, acts)


def gradients(sae, loss):
    """By the parameters' names."""
    return dict(zip(dict(sae.named_parameters()), torch.autograd.grad(loss, list(sae.parameters())), strict=True))
