"""What all tests share: no hub, no cache outside the test's own folders, and a tiny language model on disk."""

import contextlib
import os

import torch

# Triton decides at its first import whether it interprets kernels, which is how they are tested without a GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # no Triton on this system: its tests skip
        import saekit.sae.kernels.triton_ops  # noqa: F401
    del os.environ["TRITON_INTERPRET"]  # processes that tests start are to behave as a user's

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

from tests.forked import Forked

settings.register_profile(
    "saekit", max_examples=int(os.environ.get("SAEKIT_EXAMPLES", "100")), deadline=None, derandomize=True
)
settings.load_profile("saekit")


@pytest.fixture(scope="session", autouse=True)
def _hermetic(tmp_path_factory):
    """Caches of data sets go to a folder of the session; tiny tensors are not worth two threads."""
    cache = tmp_path_factory.mktemp("datasets-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A folder with a tiny random Llama of 3 layers, width 16, 64 positions, and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, **{letter: number for number, letter in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def forked():
    """Starts ranks without a launcher, see `tests.forked`."""
    with Forked() as ranks:
        yield ranks


@pytest.fixture(scope="session")
def documents():
    """1,200 short texts, more than one batch of `Dataset.map`."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (1200,), generator=generator).tolist()
    return [
        "".join(chr(97 + (number * 7 + i * i) % 26) for i in range(length)) for number, length in enumerate(lengths)
    ]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, documents):
    """The documents as JSON lines."""
    from datasets import Dataset

    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    Dataset.from_dict({"text": documents, "id": list(range(len(documents)))}).to_json(file)
    return file


def pytest_collection_modifyitems(config, items):
    """With several workers, files with slow tests first: a long one that comes last keeps one of them waiting."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
