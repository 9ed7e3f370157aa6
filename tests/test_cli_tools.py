"""pack and doctor, which need no model."""

import json
import sys
import types

import cli_fake
import pytest
from click.testing import CliRunner
from transformers.utils import logging

from moe_offload.cli.checkup import sentences
from moe_offload.cli.main import cli
from moe_offload.errors import DiskFullError


@pytest.fixture
def packed(monkeypatch, tmp_path):
    """Calls of the packer; an exception put in ``error`` ends them."""
    calls = types.SimpleNamespace(made=[], error=None)

    def pack_model(model, output, *, progress, **formats):
        calls.made.append((model, output, formats))
        progress.start("packing", 2 << 20)
        progress.advance(1 << 20)
        if calls.error is not None:
            raise calls.error
        progress.advance(1 << 20)
        progress.finish()
        return output or tmp_path / "home"

    for name, attributes in {
        "moe_offload.offload.pack.packer": {"pack_model": pack_model},
        "moe_offload.offload.pack.manifest": {"read_manifest": lambda folder: cli_fake.FakeManifest()},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_pack_tells_where_the_pack_is(packed, tmp_path):
    args = ["pack", "some/model", "-o", str(tmp_path / "out"), "--format", "int8", "--revision", "main"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    assert packed.made == [
        (
            "some/model",
            tmp_path / "out",
            {"format": "int8", "dense_format": "source", "revision": "main", "share": None},
        )
    ]
    assert result.stdout == f"{tmp_path / 'out'}\n"
    assert "packing (2.0 MiB) ...\npacking: 2.0 MiB in " in result.stderr
    assert "experts 4.0 MiB in nf4, the rest 1.0 MiB in source" in result.stderr


def test_pack_keeps_the_libraries_quiet(packed):
    logging.set_verbosity_info()
    assert CliRunner().invoke(cli, ["pack", "some/model"]).exit_code == 0
    assert logging.get_verbosity() == logging.ERROR


def test_pack_without_output_uses_the_cache_folder(packed, tmp_path):
    result = CliRunner().invoke(cli, ["pack", "some/model"])
    assert packed.made == [
        ("some/model", None, {"format": "auto", "dense_format": "source", "revision": None, "share": None})
    ]
    assert result.stdout == f"{tmp_path / 'home'}\n"


def test_a_full_disk_is_one_message(packed):
    packed.error = DiskFullError("needs 4.0 GiB in /packs, 1.0 GiB free")
    result = CliRunner().invoke(cli, ["pack", "some/model"])
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: needs 4.0 GiB in /packs, 1.0 GiB free\n")
    assert result.stdout == ""


def test_a_folder_that_cannot_be_written_is_one_message(packed):
    packed.error = PermissionError(13, "Permission denied", "/packs/pack.json")
    result = CliRunner().invoke(cli, ["pack", "some/model"])
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: /packs/pack.json: Permission denied\n")


def test_doctor_measures_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_OFFLOAD_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    checkup = json.loads(result.stdout)
    assert set(checkup["versions"]) == {"moe-offload", "python", "torch", "transformers", "bitsandbytes"}
    assert 0 < checkup["ram"]["free_bytes"] <= checkup["ram"]["total_bytes"]
    assert checkup["ram"]["read_bytes_per_s"] > 0
    assert checkup["disk"]["folder"] == str(tmp_path / "home")
    assert checkup["disk"]["read_bytes_per_s"] > 0
    assert list((tmp_path / "home").iterdir()) == []
    assert dict(sentences(checkup))["kernels"] == checkup["kernels"]


CHECKUP = {
    "versions": {"moe-offload": "1", "python": "3.12", "torch": "2", "transformers": "5", "bitsandbytes": None},
    "cpu": {"cores": 8, "threads": 4},
    "ram": {"total_bytes": 64 << 30, "free_bytes": 32 << 30, "read_bytes_per_s": 4.5e10},
    "gpus": [{"name": "RTX 3060", "total_bytes": 12 << 30, "free_bytes": 11 << 30, "kernels": "Triton"}],
    "host_to_device_bytes_per_s": 2.5e10,
    "disk": {"folder": "/h", "free_bytes": 1 << 40, "read_bytes_per_s": 7e9, "read_bytes": 4 << 20, "direct": False},
    "kernels": "torch",
}


def test_what_doctor_says():
    said = [f"{label}: {text}" for label, text in sentences(CHECKUP)]
    assert said[0] == "versions: moe-offload 1, python 3.12, torch 2, transformers 5, bitsandbytes missing"
    assert said[1:4] == [
        "cpu: 8 cores, 4 threads compute",
        "ram: 32.0 GiB free of 64.0 GiB, read at 45.0 GB/s",
        "gpu: RTX 3060: 11.0 GiB free of 12.0 GiB, kernels: Triton",
    ]
    assert said[4:6] == [
        "copy: RAM to GPU at 25.0 GB/s",
        "disk: /h: 1.0 TiB free, read at 7.0 GB/s in pieces of 4.0 MiB",
    ]
    assert said[6].startswith("O_DIRECT: refused by this file system")


def test_without_a_gpu_doctor_says_so():
    checkup = CHECKUP | {"gpus": [], "host_to_device_bytes_per_s": None}
    assert ("gpu", "none that torch can use; models run on the CPU") in sentences(checkup)
