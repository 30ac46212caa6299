"""How good SAEs are on held-out tokens, and what they cost the language model.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.evaluation.checkpoint import EvalOptions, Prepared, evaluate_checkpoint, evaluate_prepared, joined, prepare
from saekit.evaluation.evaluate import Subject, evaluate
from saekit.evaluation.results import Evaluation, Grafted, LayerResult, Reconstruction

__all__ = [
    "EvalOptions",
    "Evaluation",
    "Grafted",
    "LayerResult",
    "Prepared",
    "Reconstruction",
    "Subject",
    "evaluate",
    "evaluate_checkpoint",
    "evaluate_prepared",
    "joined",
    "prepare",
]
