"""Settings found by trials on the run's own steps: what is tried, what is kept, and what it costs to find out."""

import random

import pytest

from moe_offload.offload.experts.step_tuning import (
    HOLD_STEPS,
    LEADING_STEPS,
    TRIAL_STEPS,
    TRIALS,
    StepTuner,
    Turn,
)


def tuner_of(depth: int) -> StepTuner[int]:
    """That of ``--prefetch auto``: without, or so many layers ahead."""
    return StepTuner((0, depth), fallback=0)


def run_steps(tuner: StepTuner[int], num_steps: int, on_s: float, off_s: float) -> list[int]:
    """Depths of the steps; a step takes ``on_s`` with prefetching and ``off_s`` without."""
    depths = []
    for _ in range(num_steps):
        depths.append(tuner.setting)
        tuner.record(on_s if tuner.setting else off_s, 1)
    return depths


TRIAL_PERIOD = 2 * TRIAL_STEPS + (TRIALS - 1) * (LEADING_STEPS + TRIAL_STEPS)


@pytest.mark.parametrize("leading", [0, 1])
def test_tries_both_in_turn_and_what_leads_for_longer(leading: int) -> None:
    depths = run_steps(tuner_of(1), TRIAL_PERIOD, on_s=0.95 if leading else 1.0, off_s=1.0)
    rounds = ([leading] * LEADING_STEPS + [1 - leading] * TRIAL_STEPS) * (TRIALS - 1)
    assert depths == [0] * TRIAL_STEPS + [1] * TRIAL_STEPS + rounds


@pytest.mark.parametrize(("on_s", "depth"), [(0.5, 2), (0.9, 2), (0.99, 0), (1.0, 0), (1.5, 0)])
def test_keeps_what_is_faster(on_s: float, depth: int) -> None:
    tuner = tuner_of(2)
    run_steps(tuner, TRIAL_PERIOD, on_s, off_s=1.0)
    held = HOLD_STEPS - TRIAL_PERIOD  # what is far faster is held as soon as that is clear
    assert run_steps(tuner, held, on_s, off_s=1.0) == [depth] * held


def test_tries_again_later() -> None:
    """A disk that becomes slow, or a cache that warms up, is noticed."""
    tuner = tuner_of(1)
    run_steps(tuner, TRIAL_PERIOD, on_s=1.1, off_s=1.0)
    assert tuner.setting == 0
    run_steps(tuner, HOLD_STEPS, on_s=1.1, off_s=1.0)
    assert 1 in run_steps(tuner, TRIAL_PERIOD, on_s=0.9, off_s=1.0)
    assert run_steps(tuner, HOLD_STEPS, on_s=0.9, off_s=1.0) == [1] * HOLD_STEPS
    run_steps(tuner, TRIAL_PERIOD, on_s=1.1, off_s=1.0)
    assert tuner.setting == 0


def test_is_not_misled_by_a_hiccup() -> None:
    tuner = tuner_of(1)
    for step in range(TRIAL_PERIOD):
        hiccup_s = 50.0 if step % 7 == 3 else 0.0
        tuner.record(hiccup_s + (1.1 if tuner.setting else 1.0), 1)
    assert tuner.setting == 0


def test_does_not_count_the_first_step_of_a_trial() -> None:
    """It still lives on what the other setting brought."""
    tuner = tuner_of(1)
    before = tuner.setting
    for step in range(TRIAL_PERIOD):
        switched = tuner.setting != before or step == 0
        before = tuner.setting
        tuner.record(0.0 if switched and tuner.setting else 100.0 if switched else 1.1 if tuner.setting else 1.0, 1)
    assert tuner.setting == 0


@pytest.mark.parametrize("on_s", [0.9, 1.0])
def test_sees_through_steps_that_miss_differently_much(on_s: float) -> None:
    """Where a step's misses make most of its time, those that the trials happened to have do not decide."""
    draw = random.Random(0)
    for _ in range(20):
        tuner = tuner_of(1)
        for _ in range(TRIAL_PERIOD):
            num_missed = draw.randint(0, 8)
            tuner.record((on_s if tuner.setting else 1.0) + 0.5 * num_missed + draw.uniform(0.0, 0.02), num_missed)
        assert tuner.setting == (on_s < 1.0)


def test_does_not_try_where_nothing_is_missed() -> None:
    tuner = tuner_of(1)
    for _ in range(HOLD_STEPS):
        tuner.record(1.0, 0)
        assert tuner.setting == 0


def test_does_not_try_once_nothing_is_missed_any_more() -> None:
    """A run that begins with an empty cache misses at first: what comes after that is not worth a read."""
    tuner = tuner_of(1)
    for step in range(2 * HOLD_STEPS):
        tuner.record(1.0, 5 if step < 2 else 0)
        assert tuner.setting == 0


def test_tries_when_something_is_missed_again() -> None:
    tuner = tuner_of(1)
    for _ in range(2 * HOLD_STEPS):
        tuner.record(1.0, 0)
    depths = run_steps(tuner, TRIAL_PERIOD, on_s=0.8, off_s=1.0)
    assert 1 in depths
    assert tuner.setting == 1


def test_what_misses_nothing_while_it_is_tried_is_not_given_up_for_that() -> None:
    """Prefetches that come in time leave no misses to be seen: those without them count."""
    tuner = tuner_of(1)
    for _ in range(HOLD_STEPS):
        tuner.record(0.8 if tuner.setting else 1.0, 0 if tuner.setting else 3)
    assert tuner.setting == 1


def test_soon_gives_up_what_is_far_slower() -> None:
    depths = run_steps(tuner_of(1), TRIAL_PERIOD, on_s=1.5, off_s=1.0)
    assert sum(depths) == TRIAL_STEPS


def test_is_soon_done_with_leaving_out_what_helps_much() -> None:
    depths = run_steps(tuner_of(1), TRIAL_PERIOD, on_s=0.7, off_s=1.0)
    assert depths == [0] * TRIAL_STEPS + [1] * (TRIAL_PERIOD - TRIAL_STEPS)


# -- three ways, of a step that may be cut short --


class Machine:
    """Steps of ``NUM_LAYERS`` layers that take the same with every setting, but for what a miss costs."""

    NUM_LAYERS = 16

    def __init__(self, miss_s: dict[str, float], *, seed: int, base_s: float = 1.0, noise: float = 0.05) -> None:
        self.miss_s, self.base_s, self.noise = miss_s, base_s, noise
        self.random = random.Random(seed)

    def draw(self) -> list[tuple[int, float]]:
        """A step: how many misses each layer has, and how much longer than it should it takes."""
        factor = 30.0 if self.random.random() < 0.002 else 1.0  # now and then something else has the machine
        return [
            (self.random.choice([0, 0, 1, 2]), factor * (1.0 + self.random.uniform(-self.noise, self.noise)))
            for _ in range(self.NUM_LAYERS)
        ]

    def layer_s(self, setting: str, num_missed: int, factor: float) -> float:
        return factor * (self.base_s / self.NUM_LAYERS + num_missed * self.miss_s[setting])

    def fixed_s(self, setting: str, steps: list[list[tuple[int, float]]]) -> float:
        return sum(self.layer_s(setting, *layer) for step in steps for layer in step)

    def tuned_s(self, tuner: StepTuner[str], steps: list[list[tuple[int, float]]]) -> float:
        total_s = 0.0
        for step in steps:
            elapsed_s = 0.0
            for layer in step:
                elapsed_s += self.layer_s(tuner.setting_after(elapsed_s), *layer)
            tuner.record(elapsed_s, sum(num_missed for num_missed, _ in step))
            total_s += elapsed_s
        return total_s


def three_ways() -> StepTuner[str]:
    """That of ``--miss-path auto``."""
    return StepTuner(("split", "copy", "cpu"), fallback="copy")


@pytest.mark.parametrize(
    ("copy_s", "cpu_s", "split_s"),
    [
        (0.10, 0.05, 0.04),
        (0.10, 0.10, 0.06),
        (0.05, 0.10, 0.045),
        (0.05, 0.051, 0.06),
        (0.02, 0.80, 0.021),  # a CPU forty times as slow as the link
        (0.80, 0.02, 0.021),
        (0.05, 0.04, 0.12),
        (0.001, 0.001, 0.001),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_finding_out_costs_little(copy_s: float, cpu_s: float, split_s: float, seed: int) -> None:
    """Over 800 steps, trials and hiccups included, at most 3 % more than the best fixed setting."""
    machine = Machine({"copy": copy_s, "cpu": cpu_s, "split": split_s}, seed=seed)
    steps = [machine.draw() for _ in range(800)]
    best_s = min(machine.fixed_s(setting, steps) for setting in machine.miss_s)
    assert machine.tuned_s(three_ways(), steps) <= 1.03 * best_s


@pytest.mark.parametrize("seed", range(3))
def test_another_program_on_the_cpu_is_noticed(seed: int) -> None:
    free, busy = {"copy": 0.06, "cpu": 0.03, "split": 0.025}, {"copy": 0.06, "cpu": 0.50, "split": 0.30}
    machine, tuner = Machine(free, seed=seed), three_ways()
    machine.tuned_s(tuner, [machine.draw() for _ in range(600)])
    assert tuner.setting == "split"
    machine.miss_s = busy
    machine.tuned_s(tuner, [machine.draw() for _ in range(300)])
    assert tuner.setting == "copy"
    machine.miss_s = free
    machine.tuned_s(tuner, [machine.draw() for _ in range(HOLD_STEPS + 100)])
    assert tuner.setting == "split"


def test_a_hopeless_step_is_cut_short() -> None:
    machine, tuner = Machine({"copy": 0.01, "cpu": 5.0, "split": 0.01}, seed=0), three_ways()
    times_s = [machine.tuned_s(tuner, [machine.draw()]) for _ in range(40)]
    assert sum(step_s > 10 for step_s in times_s) <= 1
    assert max(times_s) < 20, "a whole step of such misses would take a minute"


def test_two_tuners_try_in_turn() -> None:
    turn = Turn()
    one, other = (StepTuner((0, depth), fallback=0, turn=turn) for depth in (1, 2))
    for _ in range(3 * HOLD_STEPS):
        both = one.setting and other.setting
        one_tries, other_tries = one.is_trying, other.is_trying
        assert not (one_tries and other_tries)
        for tuner in (one, other):
            tuner.record(0.9 if both else 0.95 if one.setting or other.setting else 1.0, 1)
    assert (one.setting, other.setting) == (1, 2)
