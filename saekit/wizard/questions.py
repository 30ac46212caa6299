"""The questions, in their order."""

from __future__ import annotations

from saekit.wizard.amount import BATCH, CONTEXT, TOKENS
from saekit.wizard.dataset import ARGUMENTS, COLUMN, DATASET, SPLIT
from saekit.wizard.finish import CONFIRM, PLACEMENT, RUN
from saekit.wizard.machine import MACHINE
from saekit.wizard.model import MODEL
from saekit.wizard.shape import DICTIONARY, LAYERS, K

QUESTIONS = (
    MACHINE,
    MODEL,
    DATASET,
    ARGUMENTS,
    SPLIT,
    COLUMN,
    LAYERS,
    DICTIONARY,
    K,
    CONTEXT,
    TOKENS,
    BATCH,
    PLACEMENT,
    RUN,
    CONFIRM,
)
