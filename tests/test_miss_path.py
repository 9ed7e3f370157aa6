"""Where misses are computed: how they are divided, and how rows get to the CPU and back."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import FakeDevice

from moe_offload.errors import ConfigError
from moe_offload.offload.experts import step_tuning
from moe_offload.offload.experts.host_step import MAX_ROWS, HostStep
from moe_offload.offload.experts.miss_path import MISS_PATHS, MissPath, check_miss_path, make_miss_path
from moe_offload.offload.experts.step_tuning import StepClock, Turn
from moe_offload.offload.tiers.host_rows import HostRows, RowsPool

EXPERT_BYTES = 1000


class FakeLender:
    """Layer 0 has host slots, layer 1 has none."""

    def __init__(self, copy_s: float = 0.0) -> None:
        self.copy_s = copy_s
        self.pool = RowsPool(FakeDevice(eager=True))

    def rows(self, layer_idx: int) -> RowsPool:
        return self.pool

    def copy_s_per_byte(self, layer_idx: int) -> float:
        return self.copy_s / EXPERT_BYTES

    def lends(self, layer_idx: int) -> bool:
        return layer_idx == 0

    def expert_bytes(self, layer_idx: int) -> int:
        return EXPERT_BYTES


def path_of(name: str, *, copy_s: float = 0.0, cpu_s: float = 0.0) -> MissPath:
    """With what one expert takes on either end; 0: not known."""
    path = MissPath(name, FakeLender(copy_s))  # type: ignore[arg-type]
    if cpu_s:
        path.computed(0, 1, cpu_s)
    return path


# -- the division --


def test_fixed_paths_do_not_divide() -> None:
    assert [path_of("copy").num_copied(0, n) for n in (1, 4)] == [1, 4]
    assert [path_of("cpu", cpu_s=9.0).num_copied(0, n) for n in (1, 4)] == [0, 0]


@pytest.mark.parametrize(
    ("copy_s", "cpu_s", "copied"),
    [
        (1.0, 1.0, {2: 1, 4: 2}),
        (1.0, 3.0, {1: 1, 2: 2, 4: 3, 8: 6}),
        (4.0, 1.0, {1: 0, 4: 0, 5: 1, 10: 2}),
        (0.0, 1.0, {1: 1, 4: 4}),  # what is not known yet is tried first
        (1.0, 0.0, {1: 0, 4: 0}),
        (0.0, 0.0, {1: 0, 4: 0}),
    ],
)
def test_both_ends_finish_together(copy_s: float, cpu_s: float, copied: dict[int, int]) -> None:
    for num_missing, expected in copied.items():
        assert path_of("split", copy_s=copy_s, cpu_s=cpu_s).num_copied(0, num_missing) == expected


@pytest.mark.parametrize("seed", range(20))
def test_no_other_division_would_finish_sooner(seed: int) -> None:
    draw = random.Random(seed)
    copy_s, cpu_s, num_missing = draw.uniform(0.1, 5), draw.uniform(0.1, 5), draw.randint(1, 12)
    copied = path_of("split", copy_s=copy_s, cpu_s=cpu_s).num_copied(0, num_missing)
    took_s = max(copied * copy_s, (num_missing - copied) * cpu_s)
    assert all(took_s <= max(n * copy_s, (num_missing - n) * cpu_s) for n in range(num_missing + 1))


def test_a_slow_cpu_is_tried_again_some_time() -> None:
    path = path_of("split", copy_s=1.0, cpu_s=10.0)
    num_layers = next(n for n in range(10_000) if path.num_copied(0, 1) == 0)
    assert 500 < num_layers < 2000
    path.computed(0, 1, 10.0)
    path.computed(0, 1, 10.0)
    assert path.num_copied(0, 1) == 1


def test_one_hiccup_does_not_decide() -> None:
    path = path_of("split", copy_s=1.0, cpu_s=0.5)
    path.computed(0, 1, 0.5)
    path.computed(0, 1, 50.0)
    assert path.num_copied(0, 1) == 0


def test_what_was_computed_is_counted() -> None:
    path = path_of("cpu", cpu_s=1.0)
    path.computed(0, 3, 1.0)
    assert path.num_computed == 4


# -- what is accepted --


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_paths_that_are_accepted(device: str) -> None:
    for name in MISS_PATHS if device == "cuda" else ("auto", "copy"):
        check_miss_path(name, device)


@pytest.mark.parametrize("name", ["cpu", "split"])
def test_without_a_gpu_there_is_nothing_to_take_over(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--miss-path {name} is for a GPU.*leave the option out"):
        check_miss_path(name, "cpu")


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="miss_path is 'gpu'; use auto, copy, cpu, split"):
        check_miss_path("gpu", "cuda")


def test_only_few_rows_of_layers_that_lend_go_to_the_cpu() -> None:
    path, index = path_of("cpu"), torch.zeros(MAX_ROWS + 1, 2, dtype=torch.long)
    x = torch.randn(MAX_ROWS + 1, 4)
    parts: Any = SimpleNamespace()

    def begins(layer_idx: int, num_rows: int, parts: Any = parts) -> bool:
        return path.begin(layer_idx, x[:num_rows], index[:num_rows], torch.add, parts) is not None  # type: ignore[arg-type]

    assert begins(0, 1)
    assert begins(0, MAX_ROWS)
    assert not begins(0, MAX_ROWS + 1)
    assert not begins(1, 1)
    assert not begins(0, 1, None)
    path.lender.pool.close()  # type: ignore[attr-defined]


def test_auto_begins_with_both_ends_and_goes_on_with_what_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    step_s = {"split": 1.0, "copy": 1.2, "cpu": 0.9}
    now_s = [0.0]
    monkeypatch.setattr(step_tuning, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    missed = iter(range(100_000))
    model = torch.nn.Identity()
    clock = StepClock(model, lambda: False, lambda: next(missed))
    path = make_miss_path("auto", FakeLender(), clock, Turn())  # type: ignore[arg-type]
    assert path is not None
    seen = []
    for _ in range(100):
        model(torch.zeros(1))
        seen.append(path.path)
        now_s[0] += step_s[seen[-1]]
    assert list(dict.fromkeys(seen)) == ["split", "copy", "cpu"]
    assert seen[-1] == "cpu"
    assert make_miss_path("copy", FakeLender(), clock, Turn()) is None  # type: ignore[arg-type]


# -- the rows --


@pytest.mark.parametrize("seed", range(30))
def test_rows_go_to_the_host_and_back_on_a_late_device(seed: int) -> None:
    draw, device = random.Random(seed), FakeDevice(seed)
    rows = HostRows(device)
    sent: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(6):
        device.current = draw.choice(["compute", "another stream"])
        num_rows, hidden, top_k = draw.randint(1, 4), draw.choice([3, 8, 300]), draw.randint(1, 3)
        dtype = draw.choice([torch.float32, torch.bfloat16])
        x, index = torch.randn(num_rows, hidden).to(dtype), torch.randint(0, 9, (num_rows, top_k))
        rows.fetch(x, index)
        device.drift()
        here, chosen = rows.rows()
        assert torch.equal(here, x)
        assert torch.equal(chosen, index)
        num_left = num_rows * top_k
        while num_left:
            outputs = rows.outputs(draw.randint(1, num_left))
            num_left -= len(outputs)
            value = draw.random()
            outputs.fill_(value)
            sent.append((rows.send(outputs, x.device), torch.full_like(outputs, value)))
            device.drift()
    while device.step():
        pass
    assert not device.hazards
    for there, expected in sent:
        assert torch.equal(there, expected)
    rows.close()
    assert not device.page_lock.locked


def test_closing_waits_for_what_is_under_way() -> None:
    device = FakeDevice()
    rows = HostRows(device)
    rows.fetch(torch.randn(1, 8), torch.zeros(1, 2, dtype=torch.long))
    rows.close()
    assert rows._fetched.is_over()
    assert not device.page_lock.locked
    rows.close()


def test_rows_are_used_again_by_the_next_step() -> None:
    device = FakeDevice(eager=True)
    pool = RowsPool(device)
    one, other = pool.take(), pool.take()
    assert one is not other
    pool.give_back(one)
    assert pool.take() is one
    for rows in (one, other):
        rows.fetch(torch.randn(1, 8), torch.zeros(1, 2, dtype=torch.long))
    assert len(device.page_lock.locked) == 2
    pool.close()
    assert not device.page_lock.locked


# -- a step --


class Doubling:
    """Stands in for an expert's weights that kernels do not know."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def packed_mlp(self, parts: Any) -> None:
        return None


@pytest.fixture
def pool() -> Iterator[RowsPool]:
    pool = RowsPool(FakeDevice(eager=True))
    yield pool
    pool.close()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_each_expert_gets_the_rows_that_chose_it(pool: RowsPool, num_rows: int) -> None:
    x = torch.arange(num_rows * 4, dtype=torch.float32).view(num_rows, 4)
    index = torch.tensor([[5, 2], [2, 7], [5, 5]])[:num_rows]

    def expert(weights: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * weights.factor

    step = HostStep(pool, x, index, expert, SimpleNamespace())  # type: ignore[arg-type]
    assert step.compute([(5, Doubling(2.0))]) >= 0  # type: ignore[list-item]
    step.compute([(2, Doubling(3.0))])  # type: ignore[list-item]
    step.end()
    assert pool.take() is step._rows
    answers = dict(step.answers)
    assert list(answers) == [5, 2]
    for expert_idx, factor in ((5, 2.0), (2, 3.0)):
        chose = (index == expert_idx).any(1)
        assert torch.equal(answers[expert_idx], x[chose] * factor)
