"""The decode steps of a run along one axis, for the charts that show them one by one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moe_offload.offload.profiling.charts.axis import Axis, exact_axis
from moe_offload.offload.profiling.charts.columns import Column, columns
from moe_offload.offload.profiling.page.numbers import count
from moe_offload.offload.profiling.sections import StepSeries


@dataclass(frozen=True)
class DecodeStrip:
    """Which points of the series are decode steps, and where each begins: counted in decode steps alone."""

    steps: StepSeries
    points: tuple[int, ...]
    begin: tuple[int, ...]
    num_steps: int

    @classmethod
    def of(cls, steps: StepSeries) -> "DecodeStrip":
        """The decode steps of a report's series."""
        points, begin, total = [], [], 0
        for point, phase in enumerate(steps.phase):
            if phase == "decode":
                points.append(point)
                begin.append(total)
                total += steps.num_steps[point]
        return cls(steps, tuple(points), tuple(begin), total)

    @property
    def axis(self) -> Axis:
        """Decode steps from the first to the last."""
        return exact_axis("decode steps", 0, max(1, self.num_steps), count)

    def per_step(self, series: Sequence[float] | None) -> list[float] | None:
        """A series of sums at these points, divided by the steps of each; None where there is no series."""
        return None if series is None else [series[point] / self.steps.num_steps[point] for point in self.points]

    def columns(self, parts: Sequence[tuple[tuple[str, float], ...]], tips: Iterable[str], y: Axis) -> Markup:
        """A column for every point, as wide as its steps are many."""
        of = [
            Column(begin, each, f"{self._name(point)}: {tip}", width=self.steps.num_steps[point])
            for point, begin, each, tip in zip(self.points, self.begin, parts, tips, strict=True)
        ]
        return columns(of, self.axis, y)

    def note(self, *, cut: bool = False) -> str:
        """What the picture leaves out: that columns are means of several steps, that some stand out at the top."""
        notes = []
        if self.steps.steps_per_point > 1:
            notes.append(f"Each column is the mean of up to {self.steps.steps_per_point} consecutive steps.")
        if cut:
            notes.append("The longest columns reach beyond the top; pointing at them tells their numbers.")
        return " ".join(notes)

    def _name(self, point: int) -> str:
        first, many = self.steps.first_step[point], self.steps.num_steps[point]
        return f"step {first}" if many == 1 else f"steps {first} to {first + many - 1}"
