"""What is read off an SAE's firings, against plain loops over a dense table."""

from collections import Counter

import numpy as np
import pytest

from saekit.analysis.codes import AFTER, BEFORE, STRETCH, WINDOW, Codes, find_contexts
from saekit.analysis.features import chosen

CTX_LEN, SEQUENCES, LATENTS = 150, 4, 12
PLACES = CTX_LEN * SEQUENCES
ALL = np.arange(LATENTS)


@pytest.fixture
def table():
    """Activations `[places, latents]`: latent 0 never fires, 1 on one token, the others ever more often."""
    rng = np.random.default_rng(0)
    fires = rng.random((PLACES, LATENTS)) < np.linspace(0, 0.3, LATENTS)
    fires[:, :2] = False
    fires[77, 1] = True
    return np.where(fires, rng.gamma(2.0, size=fires.shape), 0).astype(np.float32)


@pytest.fixture
def codes(table):
    places, latents = np.nonzero(table)
    order = np.random.default_rng(1).permutation(len(places))  # in whatever order they come
    places, latents = places[order], latents[order]
    return Codes.of(latents, places, table[places, latents], LATENTS, PLACES)


@pytest.fixture
def empty():
    nothing = np.zeros(0, np.int64)
    return Codes.of(nothing, nothing, np.zeros(0, np.float32), LATENTS, PLACES)


def test_counts_and_activations(codes, table):
    assert codes.counts_M.tolist() == (table > 0).sum(0).tolist()
    latents, places = np.meshgrid(ALL, np.arange(PLACES))
    assert np.array_equal(codes.at(latents, places), table)


def test_quantiles_are_values_of_firings(codes, table):
    shares = (0.1, 0.5, 1.0)
    found = codes.quantiles(ALL[::-1], shares)[::-1]
    assert np.isnan(found[0]).all()
    for latent in ALL[1:]:
        fired = table[:, latent][table[:, latent] > 0]
        assert found[latent].tolist() == np.quantile(fired, shares, method="lower").tolist()


def test_histograms_count_every_firing(codes, table, empty):
    some = ALL[::-2]
    found = codes.histograms(some, 5)
    for row, latent in enumerate(some):
        fired = table[:, latent][table[:, latent] > 0]
        largest = fired.max(initial=0)
        assert found.bounds_L2[row].tolist() == [0, largest]
        expected = np.histogram(fired, 5, (0, float(largest) or 1))[0]
        assert found.counts_LB[row].tolist() == expected.tolist()
    assert not codes.histograms(ALL[:1], 5).bounds_L2.any()
    assert empty.histograms(ALL, 5).counts_LB.shape == (LATENTS, 5)


def test_a_histogram_begins_below_zero_where_negative_values_fire():
    zeros = np.zeros(3, np.int64)
    codes = Codes.of(zeros, np.arange(3), np.array([-1.0, -0.9, 1.0], np.float32), 1, 3)
    found = codes.histograms(np.zeros(1, np.int64), 4)
    assert found.bounds_L2.tolist() == [[-1, 1]]
    assert found.counts_LB.tolist() == [[2, 0, 0, 1]]


def test_the_tokens_it_fires_on_most_often(codes, table):
    ids = np.random.default_rng(2).integers(0, 7, PLACES) * 1000
    tokens, shares = codes.favorites(ALL, ids, 3)
    assert tokens[0].tolist() == [-1, -1, -1]
    assert tokens[1].tolist() == [ids[77], -1, -1]
    assert shares[1].tolist() == [1, 0, 0]
    for latent in ALL[2:]:
        counts = Counter(ids[table[:, latent] > 0].tolist())
        wanted = [count for _, count in counts.most_common(3)] + [0] * (3 - len(counts))
        assert shares[latent] == pytest.approx(np.array(wanted) / counts.total())
        assert [counts.get(int(token), 0) for token in tokens[latent]] == wanted


def peaks(table, latent):
    """The strongest place in each stretch in which the latent fires, strongest first."""
    found = []
    for sequence in range(SEQUENCES):
        for start in range(0, CTX_LEN, STRETCH):
            first = sequence * CTX_LEN + start
            part = table[first : first + min(STRETCH, CTX_LEN - start), latent]
            if part.any():
                found.append((-float(part.max()), first + int(part.argmax())))
    return sorted(found)


@pytest.mark.parametrize(("top", "spread"), [(3, 2), (10, 5), (1, 0)])
def test_contexts(codes, table, top, spread, monkeypatch):
    monkeypatch.setattr("saekit.analysis.codes.LATENTS_AT_ONCE", 5)
    found = find_contexts(codes, ALL, CTX_LEN, top, spread)
    assert found.places_LC.shape == (LATENTS, top + spread)
    for latent in ALL:
        ranked = peaks(table, latent)
        weaker = ranked[top:]
        if len(weaker) > spread:
            weaker = [weaker[int((part + 0.5) / spread * len(weaker))] for part in range(spread)]
        wanted = [ranked[:top], weaker[:spread]]
        wanted = [place for some, width in zip(wanted, (top, spread), strict=True) for place in _filled(some, width)]
        assert found.places_LC[latent].tolist() == wanted
        for context, place in enumerate(wanted):
            window = np.zeros(WINDOW, np.float32)
            for i, here in enumerate(range(place - BEFORE, place + AFTER + 1)):
                if place >= 0 and here // CTX_LEN == place // CTX_LEN:
                    window[i] = table[here, latent]
            assert np.array_equal(found.acts_LCW[latent, context], window)
            assert found.acts_LC[latent, context] == window[BEFORE]


def _filled(ranked, width):
    return [place for _, place in ranked] + [-1] * (width - len(ranked))


def test_an_sae_that_never_fires(empty):
    found = find_contexts(empty, ALL, CTX_LEN, 2, 1)
    assert (found.places_LC == -1).all()
    assert not found.acts_LCW.any()
    assert np.isnan(empty.quantiles(ALL, (0.5,))).all()
    tokens, shares = empty.favorites(ALL, np.zeros(PLACES, np.int64), 2)
    assert (tokens == -1).all()
    assert not shares.any()


def test_of_a_large_dictionary_the_densest_and_a_sample():
    counts = np.arange(1000) % 500  # two never fire, the two densest are 499 and 999
    some = chosen(counts, 300)
    assert len(some) == 300
    assert (np.diff(some) > 0).all()
    assert {499, 999, 498, 998} <= set(some.tolist())
    assert counts[some].min() > 0
    assert chosen(counts, 1000).tolist() == list(range(1000))
    assert len(set(chosen(counts, 300, seed=1)) ^ set(some)) > 100
