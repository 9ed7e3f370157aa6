"""The decode steps of a run along one axis, for the charts that show them one by one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from markupsafe import Markup

from moe_offload.offload.profiling.charts.axis import Axis, number_axis
from moe_offload.offload.profiling.charts.columns import Column, columns
from moe_offload.offload.profiling.charts.frame import Mark
from moe_offload.offload.profiling.page.numbers import count
from moe_offload.offload.profiling.sections import StepSeries

# More columns than this would be thinner than a pixel or two of a wide page.
MOST_COLUMNS = 400
MOST_SEQUENCES = 24


@dataclass(frozen=True)
class DecodeStrip:
    """The columns of a strip: of each the points of the series that it shows, and where it begins in decode steps."""

    steps: StepSeries
    points: tuple[tuple[int, ...], ...]
    begin: tuple[int, ...]
    num_steps: int

    @classmethod
    def of(cls, steps: StepSeries) -> "DecodeStrip":
        """The decode steps of a report's series, neighbours together where there are too many to be told apart."""
        decode = [point for point, phase in enumerate(steps.phase) if phase == "decode"]
        together = -(-len(decode) // MOST_COLUMNS)
        points = [tuple(decode[first : first + together]) for first in range(0, len(decode), max(1, together))]
        begin = [0, *accumulate(sum(steps.num_steps[point] for point in column) for column in points)]
        return cls(steps, tuple(points), tuple(begin[:-1]), begin[-1])

    @property
    def axis(self) -> Axis:
        """Decode steps from the first to the last."""
        return number_axis("decode steps", 0, self.num_steps, count, ticks=6)

    def per_step(self, series: Sequence[float] | None) -> list[float] | None:
        """The mean of a series of sums over the steps of each column; None where there is no series."""
        if series is None:
            return None
        return [sum(series[point] for point in column) / self._num_steps(column) for column in self.points]

    def columns(self, parts: Sequence[tuple[tuple[str, float], ...]], tips: Iterable[str], y: Axis) -> Markup:
        """The drawing: every column as wide as its steps are many."""
        of = [
            Column(begin, each, f"{self._name(column)}: {tip}", width=self._num_steps(column))
            for column, begin, each, tip in zip(self.points, self.begin, parts, tips, strict=True)
        ]
        return columns(of, self.axis, y)

    def sequence_begins(self) -> list[int]:
        """The decode steps before which another prompt was read, as far as columns tell them apart."""
        sequences = [self.steps.sequence[column[0]] for column in self.points]
        return [
            begin for begin, (before, this) in zip(self.begin[1:], pairwise(sequences), strict=True) if this != before
        ]

    def note(self, *, cut: bool = False) -> str:
        """What the picture leaves out: that columns are means of several steps, that some stand out at the top."""
        notes = []
        most = max(map(self._num_steps, self.points), default=1)
        if most > 1:
            notes.append(f"Each column is the mean of up to {most} consecutive steps.")
        if cut:
            notes.append("The longest columns reach beyond the top; pointing at them tells their numbers.")
        return " ".join(notes)

    def _num_steps(self, column: tuple[int, ...]) -> int:
        return sum(self.steps.num_steps[point] for point in column)

    def _name(self, column: tuple[int, ...]) -> str:
        first, last = self.steps.first_step[column[0]], self.steps.first_step[column[-1]]
        last += self.steps.num_steps[column[-1]] - 1
        return f"step {first}" if first == last else f"steps {first} to {last}"


def sequence_marks(strip: DecodeStrip) -> tuple[Mark, ...]:
    """Where another prompt begins, unless there are too many to be told apart."""
    begins = strip.sequence_begins()
    return tuple(Mark("sequence", begin) for begin in begins) if len(begins) < MOST_SEQUENCES else ()
