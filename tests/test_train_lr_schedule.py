"""The learning rate against the two lines that define it."""

import pytest

from minilm.orchestrator.train.lr_schedule import learning_rate


def test_rises_to_the_peak_and_falls_to_zero():
    rates = [learning_rate(s, peak=2.0, warmup_steps=4, num_steps=12) for s in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[-1] == pytest.approx(2.0 / 8)
    falls = [a - b for a, b in zip(rates[4:], rates[5:], strict=False)]
    assert falls == pytest.approx([2.0 / 8] * len(falls))


def test_no_warmup_starts_at_the_peak():
    assert learning_rate(0, peak=3.0, warmup_steps=0, num_steps=10) == 3.0


def test_cosine_is_half_a_wave_and_constant_stays():
    def rates(schedule: str) -> list[float]:
        return [
            learning_rate(s, peak=2.0, warmup_steps=2, num_steps=10, schedule=schedule) for s in range(10)
        ]

    # (1 + cos x) / 2 at x = 0, 45, 90, 135 degrees: 1, (2 + sqrt 2) / 4, 1/2, (2 - sqrt 2) / 4
    root = 2**0.5
    assert rates("cosine")[:3] == [1.0, 2.0, 2.0]
    assert rates("cosine")[4:9:2] == pytest.approx([2 * (2 + root) / 4, 1.0, 2 * (2 - root) / 4])
    assert rates("cosine")[9] > 0
    assert rates("constant") == [1.0] + [2.0] * 9
    assert rates("linear")[:2] == rates("cosine")[:2]


def test_wsd_is_stable_up_to_its_decay_wherever_that_begins():
    def rates(num_steps: int) -> list[float]:
        options = {"peak": 2.0, "warmup_steps": 2, "schedule": "wsd", "decay_steps": 4}
        return [learning_rate(s, num_steps=num_steps, **options) for s in range(num_steps)]

    assert rates(8) == [1.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert rates(20)[:16] == rates(40)[:16] and rates(20)[16:] == rates(8)[4:]


def test_a_schedule_of_no_name():
    with pytest.raises(ValueError, match="schedule 'step' is not known; use linear, cosine, constant or wsd"):
        learning_rate(1, peak=1.0, warmup_steps=0, num_steps=2, schedule="step")


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match="outside 0..9"):
        learning_rate(step, peak=1.0, warmup_steps=2, num_steps=10)
