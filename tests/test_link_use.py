from types import SimpleNamespace

import pytest

from moe_offload.offload.reports import RunReport
from moe_offload.offload.tiers.cuda_tier import CudaTier


def test_the_share_of_the_link_that_was_used():
    report = RunReport(bytes_copied=30, copy_bytes_per_s=20.0, time_to_first_token_s=1.0, decode_s=2.0)
    assert report.link_use == pytest.approx(0.5)
    assert report.to_dict()["link_use"] == report.link_use
    assert RunReport(bytes_copied=30, decode_s=2.0).link_use == 0, "its rate is not known"


@pytest.mark.parametrize(("s_per_byte", "rate"), [([0.5], 2.0), ([0.5, 0.25], 6.0), ([0.5, 0.0], 0.0)])
def test_links_of_several_devices_add_up(s_per_byte: list[float], rate: float):
    tier = SimpleNamespace(queues=[SimpleNamespace(copy_s_per_byte=each) for each in s_per_byte])
    assert CudaTier.copy_bytes_per_s.fget(tier) == rate
