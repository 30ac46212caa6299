"""Which tokenizers give two models the same token ids."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saekit import UserError
from saekit.activations.same_tokens import check_same_tokens, difference_of

LETTERS = {letter: number for number, letter in enumerate("abcdef ", start=1)}


def made(vocab=LETTERS, merges=(), added=(), kind="bpe", normalizer=None, splits=None):
    vocab = {"<end>": 0, **vocab}
    if kind == "unigram":
        model = models.Unigram([(text, -float(number)) for text, number in vocab.items()], unk_id=0)
    else:
        joined = {a + b: len(vocab) + place for place, (a, b) in enumerate(merges)}
        model = models.BPE({**vocab, **joined}, list(merges))
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splits is not None:
        tokenizer.pre_tokenizer = splits
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    whole.add_tokens(list(added))
    return whole


CHAT = [AddedToken("<|user|>", special=True), AddedToken("<|assistant|>", special=True)]


def test_tokens_at_the_end_of_one_are_accepted():
    assert difference_of(made(), made()) is None
    assert difference_of(made(), made(added=CHAT)) is None
    assert difference_of(made(added=CHAT[:1]), made(added=CHAT)) is None
    assert difference_of(made(kind="unigram"), made(kind="unigram", added=CHAT)) is None


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ({}, {"vocab": {**LETTERS, "a": 2, "b": 1}}, "of 7 and 7 regular tokens, 'a' is 1 in the first and 2 in the"),
        ({}, {"vocab": {**LETTERS, "g": 8}}, "of 7 and 8 regular tokens, 'g' is unknown in the first and 8 in the"),
        ({"merges": [("a", "b")]}, {"merges": [("b", "a")]}, "'ab' is 8 in the first and unknown in the second"),
        ({"added": CHAT}, {"added": CHAT[::-1]}, "the token '<|user|>' is 8 in the first and 9 in the second"),
        (
            {"vocab": {**LETTERS, "<|user|>": 8}},
            {"added": [*CHAT[1:], *CHAT[:1]]},
            "'<|user|>' is 8 in the first and 9",
        ),
        ({}, {"normalizer": normalizers.Lowercase()}, "they normalize text differently"),
        ({}, {"splits": pre_tokenizers.Whitespace()}, "they split text differently"),
        ({}, {"kind": "unigram"}, "they tokenize differently"),
    ],
)
def test_others_are_refused(one, other, difference):
    assert difference in difference_of(made(**one), made(**other))
    with pytest.raises(UserError, match="its tokenizer differs from the first model's: "):
        check_same_tokens((made(**one), made(**other)), (9, 9), "b", pytest.fail)


@pytest.mark.parametrize("known", [(True, False), (False, True), (False, False)])
def test_without_tokenizers_sizes_are_compared(known):
    said = []
    tokenizers = tuple(made() if each else None for each in known)
    check_same_tokens(tokenizers, (9, 9), "b", said.append)
    whose = {(True, False): "b", (False, True): "the first model", (False, False): "either model"}[known]
    assert said == [
        f"There is no tokenizer of {whose}, so saekit cannot check that token ids mean the same to both models"
    ]
    with pytest.raises(UserError, match="and the vocabularies differ in size: 9 and 8 tokens"):
        check_same_tokens(tokenizers, (9, 8), "b", said.append)
