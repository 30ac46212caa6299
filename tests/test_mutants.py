"""The list of faults that the tests are tried with keeps up with the code."""

import itertools

import pytest

from tests.mutants import FAULTS
from tests.put_back import ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_has_exactly_one_place(fault):
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.good) == 1
    assert fault.good != fault.bad
    for tests in itertools.chain(*fault.suites()):
        path, _, test = tests.partition("::")
        assert (ROOT / path).exists()
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8")


def test_no_two_faults_have_one_name():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
