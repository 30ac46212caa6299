"""Reading ahead gives the same batches, one step early and no more."""

import threading

import pytest
import torch

from saekit.data import read_ahead


def test_every_step_in_order_on_another_thread():
    threads = set()

    def read(step):
        threads.add(threading.current_thread().name)
        return [torch.tensor(step)]

    assert [(step, int(batches[0])) for step, batches in read_ahead(read, 3, 7)] == [(n, n) for n in range(3, 7)]
    assert list(read_ahead(read, 7, 7)) == []
    assert threading.current_thread().name not in threads


def test_one_step_ahead():
    asked = []
    second = threading.Event()

    def read(step):
        asked.append(step)
        if step == 1:
            second.set()
        return []

    steps = read_ahead(read, 0, 5)
    next(steps)
    assert second.wait(5)
    assert asked == [0, 1]
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokens")]
    assert asked == [0, 1]


def test_an_error_comes_when_its_step_does():
    def read(step):
        if step == 1:
            raise OSError("the disk is gone")
        return []

    steps = read_ahead(read, 0, 3)
    next(steps)
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)
