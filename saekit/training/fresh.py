"""Initial coders of a run: weights fitted to the first batch, or those of earlier coders."""

from __future__ import annotations

from torch import Tensor

from saekit.sae import Sae
from saekit.training import state
from saekit.training.finetune import load_finetune
from saekit.training.frame import framed
from saekit.training.optimizers import TorchOptimizer, make_optimizer
from saekit.training.plan import RunPlan
from saekit.training.start import fit_
from saekit.training.unit import Calibration
from saekit.units import active


class Fresh:
    """Makes each unit's coder, and its optimizer. Implements `SaeFactory`.

    Args:
        plan: The run.
        calibration: By site.
        sample: By site `[R, W]`, the activations that its coder is fitted to. Entries are removed as they are used.
            Empty for a resumed run.
        resumes: Whether the run resumes from a checkpoint, whose weights are loaded later.
    """

    def __init__(
        self, plan: RunPlan, calibration: dict[str, Calibration], sample: dict[str, Tensor], *, resumes: bool
    ) -> None:
        self.plan, self._calibration, self._sample, self._resumes = plan, calibration, sample, resumes
        self._scales: dict[Sae, float] = {}
        self.earlier: set[str] = set()
        """The selections of the coders of `--finetune`, in words."""

    def __call__(self, name: str, /, *, blank: bool = False) -> Sae:
        """Make a unit's coder on the CPU."""
        cfg, known = self.plan.cfg, self._calibration[name]
        sae = state.new_sae(self.plan, name, blank=blank)
        sae.max_norm, sae.max_norm_out = known.max_norm, known.max_norm_out
        self._scales[sae] = known.rms if cfg.scale_biases else 1.0
        rows_RW = self._sample.pop(name, None)
        if blank:
            return sae
        if not self._resumes:
            sae.b_dec.data.copy_(known.mean_D)
        rows_RD, targets_RD = (rows_RW, None) if rows_RW is None else framed(rows_RW, known.frame)
        if rows_RD is not None and cfg.init == "fit":
            fit_(sae, rows_RD, targets_RD)
        if not self._resumes and cfg.finetune is not None:
            before = load_finetune(cfg.finetune, name, sae, known.frame, only_unit=len(self.plan.units) == 1)
            self.earlier.add(active(before.k, before.activation))
        if rows_RD is not None:
            sae.fit_selection_(rows_RD, known.rms)
        return sae

    def optimizer(self, sae: Sae) -> TorchOptimizer:
        """Make a coder's optimizer.

        A placement also makes optimizers later, to assemble a sharded unit. Those take no step, so their learning rate
        does not matter.
        """
        return make_optimizer(self.plan.cfg, sae, self._scales.get(sae, 1.0))
