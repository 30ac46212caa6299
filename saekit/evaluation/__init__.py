"""How good SAEs are on held-out tokens, and what they cost the language model."""

from saekit.evaluation.checkpoint import EvalOptions, evaluate_checkpoint, joined
from saekit.evaluation.evaluate import Subject, evaluate
from saekit.evaluation.results import Evaluation, Grafted, LayerResult, Reconstruction

__all__ = [
    "EvalOptions",
    "Evaluation",
    "Grafted",
    "LayerResult",
    "Reconstruction",
    "Subject",
    "evaluate",
    "evaluate_checkpoint",
    "joined",
]
