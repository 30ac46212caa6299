"""Text to token ids to batches."""

from saekit.data.batches import Sequences, StepBatches, read_ahead, sequences
from saekit.data.load import Peek, load_sequences, peek
from saekit.data.pack import chunk_and_tokenize

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
