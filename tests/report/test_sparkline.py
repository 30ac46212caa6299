from __future__ import annotations

import math
from itertools import pairwise

import pytest

from saekit import units
from saekit.report.sparkline import BLOCKS, GAP, TO_ASCII, bars, sparkline


def test_equal_ratios_are_equal_drops():
    line = sparkline([0.8, 0.4, 0.2, 0.1], 24)
    heights = [BLOCKS.index(block) for block in line]
    assert (heights[0], heights[-1]) == (7, 0)
    assert [a - b for a, b in pairwise(heights)] == pytest.approx([7 / 3] * 3, abs=0.7)


def test_noise_does_not_fill_the_height():
    heights = [BLOCKS.index(block) for block in sparkline([0.1000, 0.1005, 0.0998, 0.1002], 24)]
    assert max(heights) - min(heights) <= 1
    assert set(sparkline([0.3] * 5, 24)) == {BLOCKS[4]}


def test_missing_values_are_gaps():
    assert sparkline([None, math.nan, math.inf, 0.0, -1.0], 24) == GAP * 5
    assert sparkline([1.0, None, 0.5], 24) == f"█{GAP}▁"
    assert sparkline([], 24) == ""


def test_more_values_than_columns_are_averaged():
    assert sparkline([1.0] * 50 + [0.1] * 50, 10) == "█████▁▁▁▁▁"
    assert len(sparkline([1.0] * 1000, 7)) == 7


def test_bars_are_linear_and_show_the_smallest_count():
    assert bars([0, 1, 4, 8, 1000, 2000]) == [" ▁▁▁▄█"]
    assert bars([0, 1, 500, 1000], rows=2) == ["   █", " ▁██"]
    assert bars([0, 0]) == ["  "]
    assert bars([]) == [""]


def test_ascii_stand_ins_are_ascii():
    assert (BLOCKS + GAP + units.UNKNOWN + "✓ × ≤ … ‖ ├─┼┤").translate(TO_ASCII).isascii()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (999, "999"), (1234, "1.23k"), (12_345, "12.3k"), (999_950, "1.00M"), (2.5e9, "2.50B"), (None, "–")],
)
def test_short_counts(value, shown):
    assert units.short_count(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "0s"),
        (59.7, "1m 00s"),
        (3599, "59m 59s"),
        (7620, "2h 07m"),
        (4 * 86400 + 3600 * 11, "4d 11h"),
        (None, "–"),
    ],
)
def test_durations(seconds, shown):
    assert units.duration(seconds) == shown


def test_small_shares_stay_visible():
    assert [units.percent(x) for x in (0.0, 1e-5, 0.5, 1.0, math.nan)] == ["0.0%", "<0.1%", "50.0%", "100.0%", "–"]


def test_sizes():
    assert [units.size(x) for x in (10, 2**20, 3.2 * 2**30, 2**50)] == ["10 B", "1 MiB", "3.2 GiB", "1024.0 TiB"]
