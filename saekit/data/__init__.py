"""Turn text into token ids, and token ids into batches.

Internal: may change in any release. The API is the names in `saekit`.
"""

from saekit.data.batches import Sequences, StepBatches, numbers_read, read_ahead, sequences
from saekit.data.load import Peek, load_sequences, peek
from saekit.data.pack import chunk_and_tokenize
from saekit.data.vocabulary import check_tokens

__all__ = [
    "Peek",
    "Sequences",
    "StepBatches",
    "check_tokens",
    "chunk_and_tokenize",
    "load_sequences",
    "numbers_read",
    "peek",
    "read_ahead",
    "sequences",
]
