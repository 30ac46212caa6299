"""The optimizers of coders, which implement the protocol `LayerOptimizer`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saekit.config import TrainConfig
from saekit.errors import UserError, first_line
from saekit.sae import Sae, normalize_decoder_, project_decoder_gradient_
from saekit.sae.kernels.eager import unit_rows
from saekit.sae.kernels.row_sums import RowSums
from saekit.training.adam import BETA1, EPS, SaeAdam
from saekit.training.prepared import PreparedOptimizer
from saekit.training.signum import ScheduleFreeSignum

REFERENCE_LATENTS = 2**14
"""The number of latents for which the default learning rates are given."""
REFERENCE_WIDTH = 128
"""The width D for which Adam's default learning rate is given."""
TRANSCODERS = 4.0
"""Factor on Adam's default learning rate for transcoders."""
TRAINED_WEIGHTS = "trained"
"""The state's entry for the weights that gradients are taken at, if the optimizer exports averaged weights instead."""


def base_lr(cfg: TrainConfig, num_latents: int, d_in: int) -> float:
    """Return `--lr`, or the optimizer's default for a dictionary of this size.

    The rate falls with the square root of the number of latents (Gao et al. 2024, appendix A.3). Adam moves each number
    by about the rate, which turns a row of norm 1 by the rate times √D. Adam's rate therefore also falls with the
    square root of D, so that rows turn equally far at every width. BatchTopK's rate is twice TopK's. A transcoder's is
    four times an SAE's, because its encoder and decoder do not begin as a pair and have further to go. All four are
    measured in docs/quality-defaults.md and docs/quality.md (transcoders).

    Args:
        cfg: The training's configuration.
        num_latents: M.
        d_in: D.
    """
    if cfg.lr is not None:
        return cfg.lr
    size = (num_latents / REFERENCE_LATENTS) ** 0.5
    adam = 1.75e-3 / size * (REFERENCE_WIDTH / d_in) ** 0.5 * cfg.sae.kind.lr_factor
    adam *= TRANSCODERS if cfg.transcodes else 1.0
    return {"adam": adam, "adam8bit": adam, "signum": 5e-3 / size, "muon": 2e-3}[cfg.optimizer]


def rate_ratios(cfg: TrainConfig, d_in: int) -> tuple[float, float]:
    """Return the learning rates of the decoder and of `b_enc`, divided by that of `W_enc`: as configured or by default.

    The defaults other than 1 are for Adam only, as measured in docs/quality-defaults.md. A bias is one number, so its
    rate does not fall with D.
    """
    adam = cfg.optimizer in ("adam", "adam8bit")
    default = 6 * (d_in / REFERENCE_WIDTH) ** 0.5 if adam else 1.0
    decoder = (4.0 if adam else 1.0) if cfg.decoder_lr_ratio is None else cfg.decoder_lr_ratio
    return decoder, default if cfg.encoder_bias_lr_ratio is None else cfg.encoder_bias_lr_ratio


def decays(cfg: TrainConfig) -> bool:
    """Tell whether the learning rate falls to zero over the run. A schedule-free optimizer averages instead."""
    return cfg.optimizer != "signum"


def make_optimizer(cfg: TrainConfig, sae: Sae, input_scale: float = 1.0) -> TorchOptimizer:
    """Return the configured optimizer for one SAE.

    Biases have the unit of the activations, but Adam's steps have no unit. With one learning rate for all layers, the
    biases hardly move if the activations are of size 100, and jump about if they are of size 0.01. With the
    activations' root mean square as `input_scale`, Adam trains the same SAE on `s · x` as on `x`, with biases `s` times
    as large. This has the effect of normalizing the activations, but the saved weights apply to them as they are.

    Args:
        cfg: The training's configuration.
        sae: The SAE.
        input_scale: Factor on the biases' learning rates, and divisor of Adam's ε.

    Raises:
        UserError: If the optimizer's library is missing or too old.
    """
    lr = base_lr(cfg, sae.num_latents, sae.d_in)
    to_decoder, to_biases = rate_ratios(cfg, sae.d_in)
    betas = (BETA1, cfg.beta2)
    eps = EPS / input_scale  # the biases' gradients have the inverse of their unit
    to_decoder *= (sae.d_in / sae.d_out) ** 0.5  # its rows have the target's width
    skip = [{"params": [sae.W_skip]}] if sae.W_skip is not None else []
    groups: list[dict[str, Any]] = [
        {"params": [sae.W_enc]},
        {"params": [sae.W_dec], "lr": lr * to_decoder},
        *skip,
        {"params": [sae.b_enc], "lr": lr * to_biases * input_scale, "eps": eps},
        {"params": [sae.b_dec], "lr": lr * input_scale, "eps": eps},
    ]
    if cfg.optimizer == "adam":
        unit_rows = [sae.W_dec] if sae.normalize_decoder else []
        dtype = torch.bfloat16 if cfg.moments_dtype == "bf16" else torch.float32
        adam = SaeAdam(groups, lr=lr, betas=betas, kernels=sae.kernels, unit_rows=unit_rows, moments_dtype=dtype)
        one_sum = cfg.grad_acc_steps == cfg.micro_acc_steps == 1 and not (cfg.sae.multi_topk or cfg.auxk_alpha > 0)
        return TorchOptimizer(sae, [adam], one_sum)
    if cfg.optimizer == "adam8bit":
        return TorchOptimizer(sae, [_adam_8bit(groups, lr, betas)])
    if cfg.optimizer == "signum":
        return TorchOptimizer(sae, [ScheduleFreeSignum(groups, lr=lr)])
    check_optimizer(cfg)
    # Muon is for matrices. Its step is scaled to the size of Adam's, so that both can use one learning rate.
    # No weight decay, as for the others: the decoder is renormalized, so it would shrink the encoder only.
    muon = torch.optim.Muon(groups[:-2], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return TorchOptimizer(sae, [muon, torch.optim.Adam(groups[-2:], lr=lr, betas=betas, fused=True)])


class TorchOptimizer:
    """One or more `torch.optim` optimizers that share the parameters of one SAE. Implements `LayerOptimizer`.

    `step` is a fixed graph if all of them are `PreparedOptimizer`s: Adam and Signum. It is not under `muon` and
    `adam8bit`, whose steps belong to torch and bitsandbytes: those count steps on the host and pass Python numbers.

    Args:
        sae: The SAE.
        optimizers: Its optimizers.
        one_sum: Whether a step adds to the gradient of a matrix only once.
    """

    def __init__(self, sae: Sae, optimizers: list[torch.optim.Optimizer], one_sum: bool = False) -> None:
        self.sae = sae
        self.optimizers = optimizers
        self.one_sum = one_sum
        self.averages = any(isinstance(each, ScheduleFreeSignum) for each in optimizers)
        # SaeAdam projects and renormalizes rows while it updates them.
        self._normalizes = sae.normalize_decoder and not any(isinstance(each, SaeAdam) for each in optimizers)
        self.base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def prepare(self, lr_scale: float) -> None:
        """Prepare the next step at `lr_scale` times the base learning rates, without waiting for the device."""
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * lr_scale
            if isinstance(optimizer, PreparedOptimizer):
                optimizer.prepare()

    def step(self) -> None:
        """Take the prepared step with the SAE's gradients."""
        if self._normalizes:
            project_decoder_gradient_(self.sae)
        for optimizer in self.optimizers:
            optimizer.step()
        if self._normalizes:
            normalize_decoder_(self.sae)

    def zero_grad(self) -> None:
        """Drop the gradients, deferred ones too."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def defer_gradients(self) -> None:
        """Defer the gradients of matrices to the step, unless they are sums of several: those would save no memory."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, SaeAdam) and self.one_sum:
                optimizer.defer_gradients()

    def deferred(self) -> list[RowSums]:
        """Return the rows whose sums are the deferred gradients."""
        of_adam = (each.deferred for each in self.optimizers if isinstance(each, SaeAdam))
        return [sums for deferred in of_adam for each in deferred.values() for sums in each]

    def state(self) -> dict[str, Tensor]:
        """Return all state needed to resume exactly, such as `W_enc.exp_avg`; plain numbers' names end in `.number`."""
        found: dict[str, Tensor] = {}
        for name, optimizer, parameter, _ in self._parameters():
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    found[f"{name}.{key}"] = value.detach()
                else:
                    found[f"{name}.{key}.number"] = torch.tensor(value, dtype=torch.float64)
            if isinstance(optimizer, ScheduleFreeSignum):  # `export` gives the average, not these weights
                found[f"{name}.{TRAINED_WEIGHTS}"] = parameter.detach()
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned. Tensors get new addresses, so a recorded graph must be recorded again."""
        loaded: dict[torch.optim.Optimizer, dict[int, dict[str, object]]] = {each: {} for each in self.optimizers}
        for name, optimizer, parameter, number in self._parameters():
            own: dict[str, object] = {}
            for full_name, value in state.items():
                key = full_name.removeprefix(f"{name}.")
                if key == full_name:
                    continue
                if key == TRAINED_WEIGHTS:
                    parameter.copy_(value)
                elif key.endswith(".number"):
                    own[key.removesuffix(".number")] = _plain_number(value)
                else:
                    own[key] = value.clone()  # the value may be mapped from a file that is deleted later
            loaded[optimizer][number] = own
        for optimizer, values in loaded.items():
            optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})

    def average(self) -> dict[str, Tensor]:
        """Return the parameters by name, or their averages under Signum. Works on shards of the tensors, too."""
        return {
            name: optimizer.average(parameter) if isinstance(optimizer, ScheduleFreeSignum) else parameter.detach()
            for name, optimizer, parameter, _ in self._parameters()
        }

    def export(self) -> dict[str, Tensor]:
        """Return the weights to save, by parameter name. Under Signum: the average, with decoder rows of norm 1."""
        weights = self.average()
        if self.averages and self.sae.normalize_decoder:
            weights["W_dec"] = unit_rows(weights["W_dec"])  # the mean of unit rows is shorter than one
        return weights

    def _parameters(self) -> Iterator[tuple[str, torch.optim.Optimizer, nn.Parameter, int]]:
        """Yield each parameter's name, its optimizer, itself, and its number inside that optimizer."""
        names = {parameter: name for name, parameter in self.sae.named_parameters()}
        for optimizer in self.optimizers:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for number, parameter in enumerate(parameters):
                yield names[parameter], optimizer, parameter, number


def _plain_number(value: Tensor) -> int | float:
    number = float(value.item())
    return int(number) if number.is_integer() else number


def check_optimizer(cfg: TrainConfig) -> None:
    """Check that the optimizer's library is installed.

    Raises:
        UserError: If it is missing or too old.
    """
    if cfg.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f"--optimizer muon needs torch 2.9 or newer; this is {torch.__version__}")
    if cfg.optimizer == "adam8bit":
        import_bitsandbytes("--optimizer adam8bit", "use --optimizer adam")


def import_bitsandbytes(option: str, instead: str) -> Any:
    """Import bitsandbytes.

    Args:
        option: The option that needs it, for the error message.
        instead: What to do without it, for the error message.

    Raises:
        UserError: If it cannot be imported.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # its import searches for CUDA libraries and can fail in any way
        raise UserError(
            f"{option} needs bitsandbytes, which cannot be imported ({first_line(error)}): {instead}"
        ) from error


def _adam_8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    adam: torch.optim.Optimizer = import_bitsandbytes("--optimizer adam8bit", "use --optimizer adam").optim.Adam8bit(
        groups, lr=lr, betas=betas
    )
    return adam
