"""The packer on whole checkpoints: every format, interrupts, full disks, what is wrong with a checkpoint, the cache."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_config
from family_runs import example_inputs, load_smallest, save_random_model
from quantized_checkpoints import read_tensors, write_checkpoint
from transformers import AutoModelForCausalLM

from moe_offload import OffloadedModel
from moe_offload.errors import (
    ConfigError,
    DiskFullError,
    FormatError,
    PackCorruptError,
    PackIncompleteError,
    SourceError,
    UnsupportedModelError,
)
from moe_offload.offload.dense_linears import PackedLinear
from moe_offload.offload.experts.warm_start import HOT_SET_NAME
from moe_offload.offload.pack import packer, room
from moe_offload.offload.pack.manifest import is_pack, read_manifest
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.pack.writer import LayerWriter
from moe_offload.quant import format_names, get_format

INPUTS = example_inputs(make_config("mixtral"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packer") / "mixtral"
    config = make_config("mixtral", hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    return save_random_model(config, folder, torch.bfloat16)


@torch.no_grad()
def plain_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    return model(**INPUTS).logits


@torch.no_grad()
def pack_logits(pack: Path) -> torch.Tensor:
    with load_smallest(pack) as offloaded:
        return offloaded.model(**INPUTS).logits.clone()


def through(spec: str, checkpoint: Path, folder: Path, keys: tuple[str, ...]) -> Path:
    """The checkpoint with its weights of these names quantised and dequantised, in fp32."""
    tensors = {key: value.float() for key, value in read_tensors(checkpoint).items()}
    for key in tensors:
        if key.endswith(keys):
            weight_format, value = get_format(spec), tensors[key].to(torch.bfloat16)
            tensors[key] = weight_format.dequantize(weight_format.quantize(value), value.shape, torch.float32)
    return write_checkpoint(checkpoint, folder, tensors, None)


def error_of(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference, relative to the logits."""
    assert torch.isfinite(logits).all()
    return float((logits - expected).norm() / expected.norm())


EXPERTS = ("w1.weight", "w2.weight", "w3.weight")
PACKED_DENSE = ("q_proj.weight", "o_proj.weight", "lm_head.weight")  # k_proj and v_proj are too narrow


@pytest.mark.parametrize("spec", ["source", *format_names()])
def test_every_format(spec, checkpoint, tmp_path):
    pack = pack_model(str(checkpoint), tmp_path / "pack", format=spec)
    manifest = read_manifest(pack)
    assert manifest.expert_format == spec
    written = "bf16" if spec == "source" else spec
    assert {part.format for layer in manifest.layers for part in layer.parts} == {written}
    logits = pack_logits(pack)
    assert error_of(logits, plain_logits(through(written, checkpoint, tmp_path / "through", EXPERTS))) <= 1e-5
    # A random model amplifies what is rounded: a wrong weight gives 1.4, which is what two unrelated vectors have.
    assert error_of(logits, plain_logits(checkpoint)) <= (1e-5 if written == "bf16" else 0.7)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spec", ["int8", "nf4"])
def test_dense_linears_can_be_packed(spec, tied, tmp_path):
    config = make_config("mixtral", hidden_size=64, intermediate_size=64, tie_word_embeddings=tied)
    folder = save_random_model(config, tmp_path / "checkpoint", torch.bfloat16)
    plain = pack_model(str(folder), tmp_path / "plain", format="source")
    pack = pack_model(str(folder), tmp_path / "pack", format="source", dense_format=spec)
    manifest = read_manifest(pack)
    assert manifest.dense_format == spec
    assert manifest.dense_bytes < read_manifest(plain).dense_bytes
    expected = plain_logits(through(spec, folder, tmp_path / "through", PACKED_DENSE))
    with load_smallest(pack) as offloaded, torch.no_grad():
        model = offloaded.model
        packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        heads = set() if tied else {"lm_head"}
        assert packed == heads | {f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qo"}
        if tied:
            assert model.lm_head.weight is model.model.embed_tokens.weight
        assert error_of(model(**INPUTS).logits, expected) <= 1e-5
        resident_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        ram_bytes = offloaded.plan.ram_bytes
    with load_smallest(plain) as offloaded:
        model = offloaded.model
        assert resident_bytes < sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        assert ram_bytes < offloaded.plan.ram_bytes


def test_a_bad_format_is_refused_before_anything_is_read(tmp_path):
    for arguments, text in [
        ({"format": "int3"}, "no format 'int3'; there are: auto, source, bf16"),
        ({"dense_format": "int3"}, "no dense format 'int3'; there are: source, bf16"),
    ]:
        with pytest.raises(ConfigError, match=text):
            pack_model("/nowhere", tmp_path / "pack", **arguments)


# -- interrupts --

_KILLED_WHILE_PACKING = """
import os, signal, sys
from pathlib import Path
from moe_offload.offload.pack import packer, room
from moe_offload.offload.pack import writer as pack_writer

last_layer = int(sys.argv[3])
write_expert = pack_writer.LayerWriter.write_expert

def die_at(self, expert_idx, data):
    write_expert(self, expert_idx, data)
    if self._file.path.name == f"experts-{last_layer:05d}.safetensors" and expert_idx == 3:
        os.kill(os.getpid(), signal.SIGKILL)

pack_writer.LayerWriter.write_expert = die_at
packer.pack_model(sys.argv[1], Path(sys.argv[2]), format="nf4")
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def count_experts(monkeypatch) -> list[tuple[str, int]]:
    """The experts that are written from now on."""
    written: list[tuple[str, int]] = []
    write_expert = LayerWriter.write_expert

    def noted(self: Any, expert_idx: int, data: Any) -> None:
        written.append((self._file.path.name, expert_idx))
        write_expert(self, expert_idx, data)

    monkeypatch.setattr(LayerWriter, "write_expert", noted)
    return written


def test_a_killed_packer_resumes_to_the_same_bytes(checkpoint, tmp_path, monkeypatch):
    pack = tmp_path / "pack"
    child = subprocess.run(
        [sys.executable, "-c", _KILLED_WHILE_PACKING, checkpoint, pack, "1"], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert child.returncode == -signal.SIGKILL
    assert not is_pack(pack)
    with pytest.raises(PackIncompleteError):
        read_manifest(pack)
    first_layer = (pack / "experts-00000.safetensors").stat()
    assert (pack / "experts-00001.safetensors.partial").stat().st_size > 0
    written = count_experts(monkeypatch)
    pack_model(str(checkpoint), pack, format="nf4")
    assert written == [(f"experts-{layer_idx:05d}.safetensors", e) for layer_idx in (1, 2) for e in range(8)]
    resumed = (pack / "experts-00000.safetensors").stat()
    assert (resumed.st_ino, resumed.st_mtime_ns) == (first_layer.st_ino, first_layer.st_mtime_ns)
    whole = pack_model(str(checkpoint), tmp_path / "whole", format="nf4")
    assert tree(pack) == tree(whole)


def test_a_pack_of_other_settings_starts_anew(checkpoint, tmp_path, monkeypatch):
    pack = tmp_path / "pack"
    with monkeypatch.context() as patch:
        patch.setattr("moe_offload.offload.pack.packer._write_dense", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack_model(str(checkpoint), pack, format="nf4")
    assert (pack / "pack.journal").is_file()
    pack_model(str(checkpoint), pack, format="int8")
    assert read_manifest(pack).expert_format == "int8"
    assert tree(pack) == tree(pack_model(str(checkpoint), tmp_path / "fresh", format="int8"))


@pytest.mark.parametrize("after_bytes", [0, 30_000, 100_000])
def test_a_full_disk_ends_in_an_error_and_no_pack(after_bytes, checkpoint, tmp_path, monkeypatch):
    pack = tmp_path / "pack"
    left_bytes = after_bytes

    def write_all(fd: int, data: Any) -> None:
        nonlocal left_bytes
        left_bytes -= len(data)
        if left_bytes < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.write(fd, data)

    with monkeypatch.context() as patch:
        for module in ("pack.partial_file", "pack.journal"):
            patch.setattr(f"moe_offload.offload.{module}.write_all", write_all)
        with pytest.raises(DiskFullError, match=r"the disk is full: .* needs .* free"):
            pack_model(str(checkpoint), pack)
    assert not list(pack.glob("*.partial"))
    with pytest.raises(PackIncompleteError):
        read_manifest(pack)
    pack_model(str(checkpoint), pack)  # there is room now
    assert tree(pack) == tree(pack_model(str(checkpoint), tmp_path / "fresh"))


def test_a_disk_too_small_is_refused_before_anything_is_read(checkpoint, tmp_path, monkeypatch):
    whole = pack_model(str(checkpoint), tmp_path / "whole", format="int8")
    size_bytes = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    asked: list[Any] = []

    def attempt(room_bytes: int) -> Path:
        monkeypatch.setattr(room, "free_bytes", lambda folder: asked.append(folder) or room_bytes)
        return pack_model(str(checkpoint), tmp_path / "pack", format="int8")

    monkeypatch.setattr(packer, "_pack", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(DiskFullError, match=r"the pack needs .* of disk, .* has 50\.0 KiB free.*MOE_OFFLOAD_HOME"):
        attempt(50 << 10)
    assert asked == [tmp_path / "pack"]
    assert not (tmp_path / "pack").exists()
    monkeypatch.undo()
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "experts-00000.safetensors").write_bytes(bytes(size_bytes))  # what is there needs no room
    with pytest.raises(ConfigError, match="pack"):  # a folder of somebody else's, which is met after the room
        attempt(0)


def test_the_room_of_a_folder_that_is_not_there_is_that_of_the_one_above(tmp_path):
    assert 0 < room.free_bytes(tmp_path / "a" / "b") <= shutil.disk_usage(tmp_path).free


# -- checkpoints that are not right --


def test_a_changed_checkpoint_does_not_reuse_its_old_pack(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_HOME", str(tmp_path / "home"))
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    before = pack_model(str(folder))
    assert pack_model(str(folder)) == before
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] = -tensors["lm_head.weight"]
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write_checkpoint(checkpoint, tmp_path / "rewritten", tensors, None)
    shutil.copy(tmp_path / "rewritten" / "model.safetensors", folder)
    after = pack_model(str(folder))
    assert after != before
    assert torch.equal(pack_logits(after), -pack_logits(before))
    with pytest.raises(ConfigError, match="already holds a finished pack"):
        pack_model(str(folder), before)


def broken(checkpoint: Path, folder: Path, change: Any) -> Path:
    """A copy in one file whose tensors went through ``change``."""
    tensors = read_tensors(checkpoint)
    change(tensors)
    return write_checkpoint(checkpoint, folder, tensors, None)


def expert_key(checkpoint: Path, layer_idx: int = 1, expert_idx: int = 3) -> str:
    """The checkpoint's name of one expert's second projection."""
    return next(k for k in read_tensors(checkpoint) if f"layers.{layer_idx}." in k and f"experts.{expert_idx}.w2" in k)


def test_a_missing_expert_is_said(checkpoint, tmp_path):
    folder = broken(checkpoint, tmp_path / "checkpoint", lambda tensors: tensors.pop(expert_key(checkpoint)))
    with pytest.raises(SourceError, match=r"7 tensors for the 8 experts of model\.layers\.1\."):
        pack_model(str(folder), tmp_path / "pack")
    assert not is_pack(tmp_path / "pack")


def test_missing_experts_of_a_whole_layer_are_said_before_packing(checkpoint, tmp_path):
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "layers.2." in key and ".w2" in key]:
            del tensors[key]

    with pytest.raises(SourceError, match=r"no weights for 1 expert parameters of .*layers\.2\..*down_proj"):
        pack_model(str(broken(checkpoint, tmp_path / "checkpoint", drop)), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_a_missing_dense_weight_is_said_before_packing(checkpoint, tmp_path):
    folder = broken(checkpoint, tmp_path / "checkpoint", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(SourceError, match=r"lacks 1 weights of MixtralForCausalLM, first model\.norm\.weight"):
        pack_model(str(folder), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_an_expert_of_another_shape_is_said(checkpoint, tmp_path):
    key = expert_key(checkpoint)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key][:-1]

    with pytest.raises(SourceError, match=r"expert 3 of .*down_proj has shape \(63, 128\) in the checkpoint"):
        pack_model(str(broken(checkpoint, tmp_path / "checkpoint", cut)), tmp_path / "pack")


def test_a_dense_weight_of_another_shape_is_said(checkpoint, tmp_path):
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]

    with pytest.raises(SourceError, match=r"model\.norm\.weight has shape \(63,\) in the checkpoint, \(64,\)"):
        pack_model(str(broken(checkpoint, tmp_path / "checkpoint", cut)), tmp_path / "pack")


def test_a_truncated_shard_is_said(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    shard = sorted(folder.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(SourceError, match=rf"{shard.name} is truncated"):
        pack_model(str(folder), tmp_path / "pack")
    os.truncate(shard, 5)
    with pytest.raises(SourceError, match=rf"{shard.name} is not a safetensors file, or is truncated"):
        pack_model(str(folder), tmp_path / "pack2")


def test_a_missing_shard_and_pickled_weights_are_said(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(SourceError, match=rf"lacks 1 of {len(shards)} shards, first {shards[1].name}"):
        pack_model(str(folder), tmp_path / "pack")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(SourceError, match=r"only pytorch_model\.bin: pickled weights are not read"):
        pack_model(str(folder), tmp_path / "pack")
    (folder / "config.json").write_text("{")
    with pytest.raises(SourceError, match="no readable config"):
        pack_model(str(folder), tmp_path / "pack")
    with pytest.raises(SourceError, match="neither a folder nor a hub id"):
        pack_model(str(tmp_path / "nowhere"), tmp_path / "pack")


def test_an_unknown_architecture_is_said(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(UnsupportedModelError, match=r"transformers cannot build the model of .*unheard_of"):
        pack_model(str(folder), tmp_path / "pack")


def test_weights_that_are_not_numbers_are_said(checkpoint, tmp_path):
    key = expert_key(checkpoint)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][2, 3] = float("nan")

    with pytest.raises(FormatError, match=r"expert 3 of .*down_proj.*NaN"):
        pack_model(str(broken(checkpoint, tmp_path / "checkpoint", spoil)), tmp_path / "pack")


# -- packing on first use --


class Events:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def start(self, label: str, total_bytes: int | None) -> None:
        self.events.append((label, total_bytes))

    def advance(self, num_bytes: int) -> None:
        self.events.append(("advance", num_bytes))

    def finish(self) -> None:
        self.events.append(("finish", None))


def packed(pack: Path) -> dict[str, bytes]:
    """What packing has written: not what was hot in the last run, which every run writes anew."""
    return {name: data for name, data in tree(pack).items() if name != HOT_SET_NAME}


def test_loading_a_checkpoint_packs_it_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_HOME", str(tmp_path))
    settings = {"device": "cpu", "ram": "1GiB", "context_tokens": 64}
    progress = Events()
    with OffloadedModel.from_pretrained(checkpoint, on_progress=progress, **settings) as offloaded:
        tokens = offloaded.model.generate(**INPUTS, max_new_tokens=4, do_sample=False)
    (label, total_bytes), *advances, last = progress.events
    assert label == f"packing {checkpoint} to nf4"
    assert last == ("finish", None)
    assert sum(num_bytes for _, num_bytes in advances) == total_bytes
    (pack,) = (tmp_path / "packs").iterdir()
    written = packed(pack)
    again = Events()
    with OffloadedModel.from_pretrained(checkpoint, on_progress=again, **settings) as offloaded:
        assert torch.equal(offloaded.model.generate(**INPUTS, max_new_tokens=4, do_sample=False), tokens)
    assert again.events == []
    assert list((tmp_path / "packs").iterdir()) == [pack]
    assert packed(pack) == written
    with OffloadedModel.from_pretrained(pack, **settings) as offloaded:
        assert offloaded.manifest.source == str(checkpoint)


def test_a_pack_calls_its_source_by_the_name_given(checkpoint, tmp_path):
    progress = Events()
    pack = pack_model(str(checkpoint), tmp_path / "pack", name="a small Mixtral", progress=progress)
    assert read_manifest(pack).source == "a small Mixtral"
    assert progress.events[0][0] == "packing a small Mixtral to nf4"
    assert str(checkpoint) not in (pack / "pack.json").read_text()


def test_a_pack_is_not_packed_again(checkpoint, tmp_path):
    pack = pack_model(str(checkpoint), tmp_path / "pack")
    with pytest.raises(SourceError, match="is a pack already; run it"):
        pack_model(str(pack), tmp_path / "another")


def test_the_remedy_for_a_damaged_pack_works(checkpoint, tmp_path):
    pack = pack_model(str(checkpoint), tmp_path / "pack")
    (pack / "experts-00000.safetensors").write_bytes(b"cut off")
    with pytest.raises(PackCorruptError, match="truncated; delete its folder and make the pack again"):
        pack_model(str(checkpoint), pack)
    shutil.rmtree(pack)
    read_manifest(pack_model(str(checkpoint), pack))


def test_the_home_of_nobody_is_no_folder():
    with pytest.raises(SourceError, match="neither a folder nor a hub id"):
        pack_model("~nobody-of-that-name/model")


@pytest.mark.parametrize("family", ["switch_transformers", "deepseek_v4", "jamba"])
def test_progress_adds_up_where_weights_are_tied_or_kept_in_buffers(tmp_path, family):
    save_random_model(make_config(family), tmp_path / "checkpoint", torch.bfloat16)
    progress = Events()
    pack_model(str(tmp_path / "checkpoint"), tmp_path / "pack", progress=progress)
    (_, total_bytes), *advances, _ = progress.events
    assert sum(num_bytes for _, num_bytes in advances) == total_bytes


def test_progress_adds_up_after_an_interrupt(checkpoint, tmp_path, monkeypatch):
    write_layer = packer._write_layer

    def stop_at_last(plan: Any, layer_idx: int, *rest: Any) -> None:
        if layer_idx == 2:
            raise KeyboardInterrupt
        write_layer(plan, layer_idx, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(packer, "_write_layer", stop_at_last)
        with pytest.raises(KeyboardInterrupt):
            pack_model(str(checkpoint), tmp_path / "pack")
    progress = Events()
    pack_model(str(checkpoint), tmp_path / "pack", progress=progress)
    (_, total_bytes), *advances, _ = progress.events
    assert sum(num_bytes for _, num_bytes in advances) == total_bytes
