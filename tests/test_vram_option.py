import click
import pytest
import torch

from moe_offload.cli.param_types import VramType
from moe_offload.errors import ConfigError
from moe_offload.offload import model as model_module
from moe_offload.offload.devices import pick_device
from moe_offload.offload.model import OffloadedModel
from moe_offload.offload.planning import memory
from moe_offload.offload.planning.memory import Memory, vram_budgets_bytes
from moe_offload.offload.planning.vram_option import vram_by_device

GIB = 1 << 30


@pytest.mark.parametrize("single", ["auto", "10GiB", "80%", 1 << 30])
def test_one_amount_is_for_one_device(single):
    assert vram_by_device(single) is None


def test_amounts_by_device():
    assert vram_by_device("0=10GiB, 1=80%") == {0: "10GiB", 1: "80%"}
    assert vram_by_device({1: GIB, 0: "auto"}) == {1: GIB, 0: "auto"}


@pytest.mark.parametrize("wrong", ["0=", "=1GiB", "0=1GiB,0=2GiB", "a=1GiB", "0=1GiB,", {}, {-1: GIB}, {True: GIB}])
def test_what_is_no_such_thing(wrong):
    with pytest.raises(ConfigError, match="GPU"):
        vram_by_device(wrong)


def test_budgets_of_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(memory, "vram_memory", lambda index: Memory((index + 1) * 10 * GIB, 8 * GIB))
    assert vram_budgets_bytes({0: "50%", 1: "50%"}) == {0: 5 * GIB, 1: 10 * GIB}
    with pytest.raises(ConfigError, match="no GPU 2 here, but 2, counted from 0"):
        vram_budgets_bytes({2: "1GiB"})


def test_the_device_is_named_once(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="leave out --device cuda:1"):
        OffloadedModel.from_pretrained(tmp_path, device="cuda:1", vram={0: "1GiB"})


def test_devices_are_counted_from_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    assert model_module._first_device("auto", {1: "auto", 0: "auto"}) == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="no device cuda:2, but 2"):
        pick_device("cuda:2")


def test_on_the_command_line():
    vram = VramType()
    assert vram.convert("0=10GiB,1=80%", None, None) == "0=10GiB,1=80%"
    assert vram.convert("auto", None, None) == "auto"
    for wrong in ("0=10Gib,0=1GiB", "0=much", "much"):
        with pytest.raises(click.BadParameter):
            vram.convert(wrong, None, None)
