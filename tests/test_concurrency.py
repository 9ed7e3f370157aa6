"""Several generations at once, and generations that end before their time."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import example_inputs
from faulty_disk import FaultyDisk
from loaded_models import PROMPT, check_health, loaded, make_pack, wait_for

from moe_offload import OffloadedModel
from moe_offload.errors import MoeOffloadError
from moe_offload.offload.experts import layer as expert_layer
from moe_offload.offload.experts import lookahead, residency
from moe_offload.offload.experts.interrupts import InterruptShield
from moe_offload.offload.streaming import read_queue, reader
from moe_offload.offload.tiers import cpu_tier

pytestmark = pytest.mark.timeout(120)
PROMPTS = [PROMPT, "w44 w4 w100", "w77 w78 w12 " * 7]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("concurrency"), "mixtral")


@pytest.fixture(scope="module")
def answers(pack: Path) -> list[str]:
    with loaded(pack, [8, 8, 8]) as model:
        return [model.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def model(pack: Path, disk: FaultyDisk) -> Iterator[OffloadedModel]:
    with loaded(pack, [2, 3, 2], disk, prefetch=1) as model:
        yield model


def generated(model: OffloadedModel, prompt: str) -> str:
    return model.generate(prompt, max_new_tokens=12)


def streamed(model: OffloadedModel, prompt: str) -> str:
    return "".join(model.stream(prompt, max_new_tokens=12))


# -- several at once --


@pytest.mark.parametrize("num_slots", [1, 2, 8])
@pytest.mark.parametrize("run", [generated, streamed])
def test_threads_give_the_tokens_they_give_alone(
    pack: Path, answers: list[str], num_slots: int, run: Callable[[OffloadedModel, str], str]
) -> None:
    disk = FaultyDisk()
    disk.delay_reads(0.001)
    with loaded(pack, [num_slots] * 3, disk, prefetch=1) as model:
        for _ in range(2):
            together = threading.Barrier(len(PROMPTS))

            def work(prompt: str, together: threading.Barrier = together) -> str:
                together.wait()
                return run(model, prompt)

            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                assert list(pool.map(work, PROMPTS)) == answers
            check_health(model)


def test_an_error_in_one_thread_leaves_the_other_alone(
    model: OffloadedModel, disk: FaultyDisk, answers: list[str]
) -> None:
    """One thread's answers fail now and then, by its own fault; the other's are right."""
    done = threading.Event()

    def fail() -> int:
        failures = 0
        while not done.is_set():
            with pytest.raises(ZeroDivisionError), torch.no_grad():
                model._residency.run(failures % 3, [failures % 8, (failures + 3) % 8], lambda *_: 1 // 0)
            failures += 1
        return failures

    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(fail)
        try:
            for _ in range(3):
                assert [generated(model, prompt) for prompt in PROMPTS] == answers
        finally:
            done.set()
        assert failing.result() > 0
    check_health(model)


# -- interrupted --


def test_an_interrupt_while_an_expert_is_computed(
    model: OffloadedModel, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = model.model.get_submodule(model.manifest.layers[1].module)
    apply_gate = type(experts)._apply_gate
    for calls_before in range(0, 12, 3):
        calls = 0

        def interrupt(self: Any, hidden: torch.Tensor, last: int = calls_before) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls > last:
                raise KeyboardInterrupt
            return apply_gate(self, hidden)

        with monkeypatch.context() as patch:
            patch.setattr(type(experts), "_apply_gate", interrupt)
            with pytest.raises(KeyboardInterrupt):
                generated(model, PROMPT)
        check_health(model)
        assert generated(model, PROMPT) == answers[0]


TRACED = {module.__file__ for module in (cpu_tier, expert_layer, lookahead, read_queue, reader, residency)}


def lines_run(work: Callable[[], Any], interrupt_at: int | None = None) -> int:
    """Run ``work`` and count the lines of the runtime's way to an expert; press Ctrl-C at one of them."""
    count = 0

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == interrupt_at:
                signal.raise_signal(signal.SIGINT)
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename in TRACED else None)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_an_interrupt_at_any_line(model: OffloadedModel, answers: list[str]) -> None:
    def work() -> None:
        generated(model, PROMPT)

    work()
    num_lines = lines_run(work)
    for step in range(60):
        with pytest.raises(KeyboardInterrupt):
            lines_run(work, 1 + step * (num_lines // 2) // 60)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(generated, model, PROMPT).result(timeout=30) == answers[0]
        check_health(model)


CHILD = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
from faulty_disk import FaultyDisk
from loaded_models import PROMPT, loaded
disk = FaultyDisk()
disk.delay_reads(0.002)
with loaded(sys.argv[2], [2, 3, 2], disk, prefetch=1) as model:
    answer = model.generate(PROMPT, max_new_tokens=12)
    interrupted = 0
    for delay_s in (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07):
        timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while True:
                model.generate(PROMPT, max_new_tokens=12)
        except KeyboardInterrupt:
            interrupted += 1
        assert model.generate(PROMPT, max_new_tokens=12) == answer
print(interrupted, answer)
"""


def test_ctrl_c_of_a_process(pack: Path, answers: list[str]) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(pack)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == f"8 {answers[0]}"


def test_ctrl_c_while_the_disk_hangs(model: OffloadedModel, disk: FaultyDisk, answers: list[str]) -> None:
    """The wait for an expert can be interrupted, and what it was for arrives later without harm."""
    healed = threading.Event()
    asked = threading.Event()

    def hang(*read: Any) -> None:
        asked.set()
        healed.wait()

    disk.before_read = hang

    def press() -> None:
        asked.wait()
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        generated(model, PROMPT)
    thread.join()
    healed.set()
    disk.heal()
    check_health(model)
    assert generated(model, PROMPT) == answers[0]


def test_a_shield_keeps_the_handler() -> None:
    calls: list[int] = []

    def note(number: int, frame: Any) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        with InterruptShield() as shield:
            signal.raise_signal(signal.SIGINT)
            assert not calls
            shield.check()
            assert len(calls) == 1
            signal.raise_signal(signal.SIGINT)
        assert len(calls) == 2
        assert signal.getsignal(signal.SIGINT) is note
    finally:
        signal.signal(signal.SIGINT, before)


# -- stopped, left, closed --


def test_stop_ends_a_stream(model: OffloadedModel, answers: list[str]) -> None:
    pieces = model.stream(PROMPT, max_new_tokens=50)
    first = next(pieces)
    model.stop()
    rest = "".join(pieces)
    assert len((first + rest).split()) < 50
    assert generated(model, PROMPT) == answers[0]
    check_health(model)


def test_leaving_a_stream_ends_its_generation(model: OffloadedModel, answers: list[str]) -> None:
    for _piece in model.stream(PROMPT, max_new_tokens=50):
        break
    del _piece
    wait_for(lambda: not any(thread.name == "moe-offload-generate" for thread in threading.enumerate()))
    assert model.last_run is not None
    assert model.last_run.new_tokens < 50
    assert generated(model, PROMPT) == answers[0]
    check_health(model)


def test_a_stream_that_is_not_begun_costs_nothing(model: OffloadedModel, answers: list[str]) -> None:
    stream = model.stream(PROMPT)
    del stream
    assert generated(model, PROMPT) == answers[0]


@pytest.mark.parametrize("run", [generated, streamed])
def test_closing_ends_a_generation(
    pack: Path, disk: FaultyDisk, run: Callable[[OffloadedModel, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever way it ends, by a stop or by an error of ours, it ends, and the model refuses from then on."""
    disk.delay_reads(0.005)
    asked = threading.Event()
    disk.before_read = lambda *read: asked.set()
    with loaded(pack, [2, 3, 2], disk, prefetch=1) as model, ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, model, PROMPT)
        asked.wait()
        model.close()
        with contextlib.suppress(MoeOffloadError):
            running.result(timeout=30)
        with pytest.raises(MoeOffloadError, match="closed"):
            run(model, PROMPT)
        model.close()


def test_closing_under_a_forward_pass(pack: Path) -> None:
    """Passes of the transformers model itself, which `close` does not wait for, end in an error of ours."""
    for delay_s in (0.0, 0.01, 0.02, 0.03):
        with loaded(pack, [2, 2, 2], prefetch=1) as model, ThreadPoolExecutor(1) as pool:
            begun = threading.Event()

            def work(model: Any = model.model, begun: threading.Event = begun) -> None:
                inputs = example_inputs(model.config, 2, 40)
                with torch.inference_mode():
                    while True:
                        model(**inputs)
                        begun.set()

            running = pool.submit(work)
            begun.wait()
            time.sleep(delay_s)
            model.close()
            with pytest.raises(MoeOffloadError):
                running.result(timeout=30)
