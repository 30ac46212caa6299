import pytest

from saekit.training.schedule import dead_threshold, lr_scale, warmup_steps


def test_shape():
    scales = [lr_scale(step, warmup=2, total_steps=6, decay=True) for step in range(6)]
    assert scales == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4])


def test_no_warmup_and_no_decay():
    assert [lr_scale(step, warmup=0, total_steps=3, decay=True) for step in range(3)] == pytest.approx(
        [1, 2 / 3, 1 / 3]
    )
    assert [lr_scale(step, warmup=1, total_steps=3, decay=False) for step in range(3)] == [0.5, 1, 1]


def test_warmup_longer_than_the_run_never_divides_by_zero():
    assert [lr_scale(step, warmup=9, total_steps=2, decay=True) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(("asked", "total", "expected"), [(None, 50_000, 15_000), (None, 9, 2), (7, 200, 7), (0, 9, 0)])
def test_default_warmup(asked, total, expected):
    assert warmup_steps(asked, total, decay=True) == expected
    assert warmup_steps(asked, total, decay=False) == (expected // 3 if asked is None else asked)


@pytest.mark.parametrize(
    ("total", "step", "latents", "expected"),
    [
        (10**6, 2048, 4096, 20_000),  # a fiftieth of the run
        (10**7, 2048, 4096, 38_400),  # 300 x 128
        (10**9, 16_384, 4096, 163_840),  # ten steps
        (10**10, 2048, 10**7, 10**7),
        (30, 30, 64, 1),
    ],
)
def test_default_dead_threshold(total, step, latents, expected):
    sizes = {"total_tokens": total, "step_tokens": step, "num_latents": latents, "k": 32}
    assert dead_threshold(None, **sizes) == expected
    assert dead_threshold(7, **sizes) == 7
