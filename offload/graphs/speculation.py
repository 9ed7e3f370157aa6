"""Whether to launch a whole step without asking whether its experts are there."""

FIRST_STEPS = 4
MOST_STEPS = 256


class Speculation:
    """After so many steps that missed nothing, the next one is launched whole; wrong once, twice as many are wanted.

    A step that was launched for nothing costs what a step costs without misses. So all that is lost this way is, but
    for the first few steps, a small share of the steps that went by; and where every expert fits, nothing is lost.
    """

    def __init__(self) -> None:
        self._wanted_steps = FIRST_STEPS
        self._full_steps = 0

    @property
    def is_on(self) -> bool:
        """For the next step."""
        return self._full_steps >= self._wanted_steps

    def record(self, missed: bool) -> None:
        """A step has missed an expert, or none."""
        if not missed:
            self._full_steps += 1
            if self._full_steps >= 2 * MOST_STEPS:
                self._wanted_steps = FIRST_STEPS
            return
        if self.is_on:
            self._wanted_steps = min(2 * self._wanted_steps, MOST_STEPS)
        self._full_steps = 0
