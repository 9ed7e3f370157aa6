"""What the link to a device carries: counted copy by copy, and told for an answer and each of its steps."""

import threading
from typing import Any

import pytest
import torch
from fake_device import FakeDevice

from moe_offload.offload import meter
from moe_offload.offload.answer_clock import AnswerClock
from moe_offload.offload.reports import RunReport
from moe_offload.offload.tiers import link_meter
from moe_offload.offload.tiers.link_meter import LinkMeter, LinkTotals


class Heard:
    def __init__(self) -> None:
        self.copies: list[tuple[int, int, bool, int]] = []

    def copied(self, device: int, begin_ns: int, num_bytes: int, is_ahead: bool, took_ns: int) -> None:
        assert begin_ns > 0
        self.copies.append((device, num_bytes, is_ahead, took_ns))


def copy(device: FakeDevice, num_bytes: int, *, is_ahead: bool = False) -> None:
    source, target = torch.zeros(num_bytes, dtype=torch.uint8), device.allocate(num_bytes)
    device.copy(source, target, after=(), event=device.new_event(), is_ahead=is_ahead)


def finish(device: FakeDevice) -> None:
    while device.step():
        pass


def test_copies_are_counted_at_once_and_their_time_when_it_is_known():
    device, heard = FakeDevice(), Heard()
    device.link.observe(heard, 3)
    copy(device, 100)
    copy(device, 20, is_ahead=True)
    assert device.link.totals() == LinkTotals(100, 20, 0)
    assert not heard.copies
    finish(device)
    assert device.link.totals() == LinkTotals(100, 20, 120)  # the fake's nanosecond a byte
    assert heard.copies == [(3, 100, False, 100), (3, 20, True, 20)]
    assert device.link.peak_bytes_per_s == 0, "too small to tell"


def test_waiting_for_a_kernel_is_no_time_of_the_links():
    device = FakeDevice()
    event = device.new_event()
    device.record(event)
    device.clock_ns = 0
    device.copy(torch.zeros(10, dtype=torch.uint8), device.allocate(10), after=[event], event=device.new_event())
    device._enqueue("compute", iter([]))
    device.clock_ns += 1000
    finish(device)
    assert device.link.totals().busy_ns == 10


def test_the_peak_is_the_fastest_copy_and_the_rate_that_of_late(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link_meter, "LEAST_BYTES", 10)
    took_ns = iter([20, 10, 40])

    class Stamp:
        def set(self) -> None: ...
        def is_over(self) -> bool:
            return True

        def ns_until(self, later: Any) -> int:
            return next(took_ns)

    meter = LinkMeter(Stamp)
    for _ in range(3):
        with meter.copying(10, is_ahead=False):
            pass
    assert meter.totals().busy_ns == 70
    assert meter.peak_bytes_per_s == pytest.approx(1e9)
    assert meter.s_per_byte == pytest.approx((2 * 0.8 + 1 * 0.2) * 0.8e-9 + 4e-9 * 0.2)


def test_a_recording_hears_of_its_own_copies_only():
    device, first, second = FakeDevice(), Heard(), Heard()
    copy(device, 1)
    device.link.observe(first, 0)
    copy(device, 2)
    device.link.observe(second, 0)
    copy(device, 3)
    finish(device)
    device.link.observe(None, 0)
    copy(device, 4)
    finish(device)
    assert first.copies == [(0, 2, False, 0)], "not over when it ended"
    assert second.copies == [(0, 3, False, 3)]
    assert device.link.totals().busy_ns == 10


def test_a_copy_that_fails_does_not_count():
    meter = LinkMeter(lambda: FakeDevice().link._new_stamp())
    with pytest.raises(RuntimeError), meter.copying(5, is_ahead=False):
        raise RuntimeError
    assert meter.totals() == LinkTotals()
    with meter.copying(5, is_ahead=False):
        pass
    assert meter.totals().num_bytes == 5


def test_a_device_that_has_failed_is_not_asked_again():
    class Stamp:
        asked = 0

        def set(self) -> None: ...
        def is_over(self) -> bool:
            Stamp.asked += 1
            raise RuntimeError("CUDA error: unspecified launch failure")

        def ns_until(self, later: Any) -> int:
            raise AssertionError

    meter = LinkMeter(Stamp)
    with meter.copying(5, is_ahead=False):
        pass
    assert meter.totals() == meter.totals() == LinkTotals(5)
    assert Stamp.asked == 1


def test_threads_enqueue_one_copy_at_a_time():
    """Stamps of two copies do not interleave, or each would have the time of both."""
    device = FakeDevice()
    device.run_in_background()

    def work() -> None:
        for _ in range(50):
            copy(device, 8)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    device.close()
    assert device.link.totals() == LinkTotals(4 * 50 * 8, 0, 4 * 50 * 8)


# -- an answer --


def test_the_share_of_the_link_that_was_used():
    report = RunReport(bytes_copied=30, link_peak_bytes_per_s=20.0, time_to_first_token_s=1.0, decode_s=2.0)
    assert report.link_use == pytest.approx(0.5)
    assert report.to_dict()["link_use"] == report.link_use
    assert RunReport(bytes_copied=30, decode_s=2.0).link_use == 0, "its rate is not known"


@pytest.mark.parametrize(("peaks", "rate"), [([2.0], 2.0), ([2.0, 4.0], 6.0), ([2.0, 0.0], 0.0), ([], 0.0)])
def test_links_of_several_devices_add_up(peaks: list[float], rate: float):
    assert meter._together(peaks) == rate


def test_each_step_has_its_share(monkeypatch: pytest.MonkeyPatch):
    times, copied = iter([0.0, 1.0, 3.0, 3.5]), iter([50, 90, 90])
    monkeypatch.setattr("moe_offload.offload.answer_clock.time.perf_counter", lambda: next(times))
    clock = AnswerClock()
    clock.copied = lambda: next(copied)
    for _ in range(3):
        clock(torch.zeros(1, 1, dtype=torch.long), None)
    assert clock.link_use(0.0) == ()
    assert clock.link_use(40.0) == pytest.approx((0.5, 0.0))
