"""Text to token ids to batches.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.data.batches import Sequences, StepBatches, sequences
from saekit.data.load import load_sequences
from saekit.data.pack import chunk_and_tokenize
from saekit.data.peek import Peek, peek
from saekit.data.prefetch import read_ahead

__all__ = [
    "Peek",
    "Sequences",
    "StepBatches",
    "chunk_and_tokenize",
    "load_sequences",
    "peek",
    "read_ahead",
    "sequences",
]
