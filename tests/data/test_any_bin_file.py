"""Whatever bytes a `.bin` file holds: it is read as what it is, or refused in one line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saekit import UserError
from saekit.config import DataConfig
from saekit.data import check_tokens, load_sequences
from saekit.data.token_files import TYPES

VOCABULARIES = (2, 40, 257, 1000, 50_257, 65_535, 65_536, 65_537, 128_256, 262_144)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "ids.bin"


def read(file, content, vocabulary, ctx_len, **arguments):
    """Return the ids that a run would train on."""
    # To write over a file that is mapped into memory would be another fault.
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    try:
        data = load_sequences(DataConfig(str(file), data_args=arguments), None, ctx_len)
        check_tokens(data, vocabulary)
    except UserError as error:
        if "\n" in str(error):
            raise ValueError(f"more than one line: {error}") from error
        raise
    return data.read(np.arange(len(data))).flatten().numpy()


@st.composite
def honest_ids(draw, vocabulary):
    """Ids of a vocabulary: all of it, few of them, mostly zeros, padded, or drawn one by one."""
    kind = draw(st.sampled_from(["any", "few", "zeros", "padded", "drawn"]))
    if kind == "drawn":
        return np.array(draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=200)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = random.integers(0, vocabulary, draw(st.integers(1, 3000)))
    if kind == "few":
        return ids % draw(st.integers(1, 9))
    if kind == "zeros":
        return ids * (random.random(len(ids)) < 0.1)
    if kind == "padded":
        # Documents of two tokens at least: of one token each, padded to two, they are the bytes of a wider type.
        length = draw(st.integers(3, 40))
        return np.where(np.arange(len(ids)) % length < random.integers(2, length), ids, 0)
    return ids


def shifted(content, draw):
    at = draw(st.integers(0, len(content)))
    return content[at:]


def cut(content, draw):
    return content[: draw(st.integers(0, len(content)))]


def flipped(content, draw):
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        if found:
            found[draw(st.integers(0, len(found) - 1))] ^= draw(st.integers(1, 255))
    return bytes(found)


def with_something_before(content, draw):
    return draw(st.binary(max_size=300)) + content


def repeated(content, draw):
    return content[: draw(st.integers(0, 64))] * draw(st.integers(1, 100))


def swapped(content, draw):
    return np.frombuffer(content[: len(content) // 2 * 2], "<u2").byteswap().tobytes()


MUTATIONS = [shifted, cut, flipped, with_something_before, repeated, swapped]


@given(st.data())
def test_an_honest_file_is_read_as_it_is(file, data):
    vocabulary = data.draw(st.sampled_from(VOCABULARIES))
    said = data.draw(st.sampled_from(list(TYPES)))
    ids = data.draw(honest_ids(min(vocabulary, 2**16) if said == "uint16" else vocabulary))
    ctx_len = data.draw(st.integers(1, len(ids)))
    found = read(file, ids.astype(TYPES[said]).tobytes(), vocabulary, ctx_len, dtype=said)
    assert np.array_equal(found, ids[: len(ids) // ctx_len * ctx_len])


@given(st.data())
def test_a_file_of_another_type_is_refused(file, data):
    vocabulary = data.draw(st.sampled_from([each for each in VOCABULARIES if each > 9]))
    really, said = data.draw(st.sampled_from([(one, two) for one in TYPES for two in TYPES if one[-2:] != two[-2:]]))
    limit = min(vocabulary, 2**16) if really == "uint16" else vocabulary
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = random.integers(0, limit, data.draw(st.integers(200, 3000)))
    ids = np.where(random.random(len(ids)) < 0.3, 0, ids)  # some padding
    with pytest.raises(UserError) as refused:
        read(file, ids.astype(TYPES[really]).tobytes(), vocabulary, data.draw(st.integers(1, 30)), dtype=said)
    looks = really.replace("int32", "uint32").replace("uuint", "uint")
    size = f"not a whole number of {said}"
    assert f"looks like {looks}" in str(refused.value) or size in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.data())
def test_any_content_is_read_or_refused(file, data):
    vocabulary = data.draw(st.sampled_from(VOCABULARIES))
    said = data.draw(st.sampled_from([None, *TYPES]))
    if data.draw(st.booleans()):
        content = data.draw(st.binary(max_size=2000))
    else:
        really = data.draw(st.sampled_from(list(TYPES)))
        limit = min(vocabulary, 2**16) if really == "uint16" else vocabulary
        content = data.draw(honest_ids(limit)).astype(TYPES[really]).tobytes()
    for change in data.draw(st.lists(st.sampled_from(MUTATIONS), max_size=3)):
        content = change(content, data.draw)
    arguments = {} if said is None else {"dtype": said}
    ctx_len = data.draw(st.integers(1, 100))
    try:
        found = read(file, content, vocabulary, ctx_len, **arguments)
    except UserError:
        return
    whole = np.frombuffer(content, TYPES[said or "uint16"])
    assert np.array_equal(found, whole[: len(whole) // ctx_len * ctx_len])
    assert len(found)
    assert found.min() >= 0
    assert found.max() < vocabulary
    # What every second id of a wider type would show is not there.
    pairs = whole[: len(whole) // 2 * 2].reshape(-1, 2)
    larger = pairs[:, 0] > vocabulary // 2**16
    if whole.itemsize < 8 and larger.sum() > 100 and len(np.unique(pairs[larger, 0])) > 20:
        assert pairs[:, 1].any()
