"""Python imports this first where its folder is in PYTHONPATH: a launcher's ranks then speak through a strict group."""

import os

if "LOCAL_RANK" in os.environ:
    from tests import strict

    strict.install(devices=False)
