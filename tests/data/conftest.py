import os

import pytest


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch):
    """`Dataset.map` in several processes leaves a copy in `os.environ`, which those who hold the original never see."""
    monkeypatch.setattr(os, "environ", os.environ)
