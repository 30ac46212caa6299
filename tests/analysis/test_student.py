"""The quantile of Student's t, next to the tables of textbooks."""

import math

import pytest

from saekit.analysis.student import EXACT_UP_TO, Z, _expansion, standard_errors

TABLE = {
    1: 12.7062,
    2: 4.30265,
    3: 3.18245,
    4: 2.77645,
    5: 2.57058,
    6: 2.44691,
    7: 2.36462,
    8: 2.30600,
    9: 2.26216,
    10: 2.22814,
    15: 2.13145,
    20: 2.08596,
    30: 2.04227,
    40: 2.02108,
    49: 2.00958,
    60: 2.00030,
    80: 1.99006,
    100: 1.98397,
    120: 1.97993,
    1000: 1.96234,
}
"""The two-sided 5% column of any table, and of NIST's (Engineering Statistics Handbook, section 1.3.6.7.2)."""


@pytest.mark.parametrize("freedom", TABLE)
def test_the_table(freedom):
    assert standard_errors(freedom) == pytest.approx(TABLE[freedom], rel=4e-6)


def test_closed_forms():
    assert standard_errors(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert standard_errors(2) == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), rel=1e-12)


def test_both_ways_agree_where_they_meet():
    for freedom in (EXACT_UP_TO - 1, EXACT_UP_TO):
        assert standard_errors(freedom) == pytest.approx(_expansion(freedom), rel=1e-10)


def test_it_falls_to_the_normal_distributions():
    quantiles = [standard_errors(freedom) for freedom in (1, 2, 5, 50, 199, 200, 201, 500, 10**4, 10**8)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] == pytest.approx(Z, abs=1e-7)
