"""Whatever goes wrong under the reader of a whole model ends in a typed error or in the right tokens."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_disk import FaultyDisk
from loaded_models import PROMPT, check_health, loaded, make_pack

from moe_offload import OffloadedModel
from moe_offload.errors import (
    ExpertReadError,
    MoeOffloadError,
    PackCorruptError,
    PackError,
    PackIncompleteError,
    PackVersionError,
)
from moe_offload.offload.streaming import reader

pytestmark = pytest.mark.timeout(60)
SLOTS = [2, 3, 2]
FILE = "experts-00001.safetensors"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("faults"), "mixtral")


@pytest.fixture(scope="module")
def answer(pack: Path) -> str:
    with loaded(pack, [8, 8, 8]) as model:
        return model.generate(PROMPT, max_new_tokens=12)


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture(params=["off", 2], ids=["no prefetch", "prefetch"])
def model(request: pytest.FixtureRequest, pack: Path, disk: FaultyDisk, monkeypatch: Any) -> Iterator[OffloadedModel]:
    monkeypatch.setattr(reader, "BACKOFF_S", (0.0, 0.0))
    with loaded(pack, SLOTS, disk, prefetch=request.param) as model:
        yield model


def place_of(model: OffloadedModel, layer_idx: int, expert_idx: int) -> tuple[str, int, int]:
    """File, offset and size of an expert."""
    layer = model.manifest.layers[layer_idx]
    return layer.experts[expert_idx].file, layer.experts[expert_idx].offset_bytes, layer.slot_bytes


def streamed(model: OffloadedModel) -> str:
    return "".join(model.stream(PROMPT, max_new_tokens=12))


def generated(model: OffloadedModel) -> str:
    return model.generate(PROMPT, max_new_tokens=12)


def test_short_reads(model: OffloadedModel, disk: FaultyDisk, answer: str) -> None:
    disk.shorten_reads()
    assert generated(model) == answer
    check_health(model)


def test_an_error_once(model: OffloadedModel, disk: FaultyDisk, answer: str) -> None:
    for layer_idx in range(3):
        disk.fail_reads(place_of(model, layer_idx, 0)[0], times=1)
    assert generated(model) == answer
    assert model._residency._tier._reader.stats.retries == 3
    check_health(model)


@pytest.mark.parametrize("run", [generated, streamed])
def test_an_error_for_good(
    model: OffloadedModel, disk: FaultyDisk, answer: str, run: Callable[[OffloadedModel], str]
) -> None:
    for expert_idx in range(8):
        name, offset_bytes, size_bytes = place_of(model, 1, expert_idx)
        disk.fail_reads(name, offset_bytes=offset_bytes, size_bytes=size_bytes, number=errno.EIO)
    for _ in range(3):  # more often than there are staging slots
        with pytest.raises(ExpertReadError, match=rf"expert \d of layer 1 .*{FILE}.*Input/output error"):
            run(model)
        check_health(model)
    disk.heal()
    assert run(model) == answer
    check_health(model)


def test_a_damaged_byte(model: OffloadedModel, disk: FaultyDisk, answer: str) -> None:
    for expert_idx in range(8):
        name, offset_bytes, _ = place_of(model, 1, expert_idx)
        disk.flip_byte(name, offset_bytes + 100)
    for _ in range(3):
        with pytest.raises(PackCorruptError, match=rf"expert \d of layer 1 .*{FILE}.* is damaged"):
            generated(model)
        check_health(model)
    disk.heal()
    assert generated(model) == answer


def test_a_byte_damaged_on_the_way(model: OffloadedModel, disk: FaultyDisk, answer: str) -> None:
    for layer_idx in range(3):
        for expert_idx in range(8):
            name, offset_bytes, _ = place_of(model, layer_idx, expert_idx)
            disk.flip_byte(name, offset_bytes + 100, times=1)
    assert generated(model) == answer
    check_health(model)


def test_a_shard_cut_off(model: OffloadedModel, disk: FaultyDisk, answer: str) -> None:
    disk.truncate(FILE, place_of(model, 1, 0)[1] + 10)
    with pytest.raises(PackCorruptError, match=rf"{FILE} ends before expert \d of layer 1"):
        generated(model)
    check_health(model)
    disk.heal()
    assert generated(model) == answer


def test_a_shard_gone(model: OffloadedModel, disk: FaultyDisk, answer: str) -> None:
    disk.remove(FILE)
    with pytest.raises(PackCorruptError, match=rf"{FILE} with expert \d of layer 1 is missing"):
        generated(model)
    check_health(model)
    disk.heal()
    assert generated(model) == answer


def test_errors_everywhere_never_give_wrong_tokens(model: OffloadedModel, disk: FaultyDisk, answer: str) -> None:
    """Half of all reads fail in some way; the answers that come are right, and so is the one after that."""
    disk.shorten_reads(0.2)
    disk.delay_reads(0.001)
    calls = 0

    def sometimes(name: str, offset_bytes: int, size_bytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls % 7 < 3:
            raise OSError(errno.EIO, "Input/output error")

    disk.before_read = sometimes
    failures = 0
    for _ in range(12):
        try:
            assert generated(model) == answer
        except ExpertReadError:
            failures += 1
    assert failures
    check_health(model)
    disk.heal()
    assert generated(model) == answer


# -- faults on the disk before anything is loaded --


@pytest.fixture
def copy(pack: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pack, tmp_path / "copy"))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "pack.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refused(folder: Path) -> MoeOffloadError:
    with pytest.raises(PackError) as refusal:
        OffloadedModel.from_pretrained(folder, device="cpu", ram="1GiB", context_tokens=64)
    return refusal.value


def test_a_truncated_shard_is_refused(copy: Path) -> None:
    with (copy / FILE).open("r+b") as file:
        file.truncate(5000)
    error = refused(copy)
    assert isinstance(error, PackCorruptError)
    assert FILE in str(error)


def test_a_missing_shard_is_refused(copy: Path) -> None:
    (copy / FILE).unlink()
    error = refused(copy)
    assert isinstance(error, PackCorruptError)
    assert FILE in str(error)


def test_another_version_is_refused(copy: Path) -> None:
    edit_manifest(copy, lambda manifest: manifest.update(version=99))
    error = refused(copy)
    assert isinstance(error, PackVersionError)
    assert "99" in str(error)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd"])
def test_a_manifest_that_points_outside_is_refused(copy: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        text = json.dumps(manifest).replace(FILE, name)
        manifest.clear()
        manifest.update(json.loads(text))

    (copy.parent / "elsewhere.safetensors").write_bytes((copy / FILE).read_bytes())
    edit_manifest(copy, change)
    error = refused(copy)
    assert isinstance(error, PackCorruptError)
    assert name in str(error)


@pytest.mark.parametrize("place", [200, -5], ids=["header", "data"])
def test_damaged_dense_weights_are_refused(copy: Path, place: int) -> None:
    path = next(iter(sorted(copy.glob("dense-*.safetensors"))))
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    error = refused(copy)
    assert isinstance(error, PackCorruptError)
    assert path.name in str(error)


def test_a_pack_for_another_model_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_local_experts": 16}))
    assert "made for another model" in str(refused(copy))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # of as many bytes, since rows are padded: kernels would read more numbers than there are
        ("down_proj", lambda part: part.update(shape=[part["shape"][0], part["shape"][1] + 1])),
        ("gate_up_proj", lambda part: part.update(shape=[part["shape"][0], part["shape"][1] + 1])),
        ("other_proj", lambda part: part.update(name="other_proj")),
    ],
)
def test_experts_of_other_shapes_are_refused(copy: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    def change_one(manifest: dict[str, Any]) -> None:
        parts = manifest["layers"][1]["parts"]
        change(next((part for part in parts if part["name"] == name), parts[0]))

    edit_manifest(copy, change_one)
    error = refused(copy)
    assert isinstance(error, PackCorruptError)
    assert f"have {'gate_up_proj' if name == 'other_proj' else name} of shape (" in str(error)
    assert "in the pack: it was made for another model" in str(error)


def test_an_unfinished_pack_is_refused(copy: Path) -> None:
    (copy / "pack.json").rename(copy / "pack.journal")
    error = refused(copy)
    assert isinstance(error, PackIncompleteError)
    assert "packing was not finished" in str(error)
