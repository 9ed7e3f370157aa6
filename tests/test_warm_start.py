"""A warm start: the experts that were hot when a model was closed are read back, and never does it get in the way."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faulty_disk import FaultyDisk
from loaded_models import PROMPT, check_health, loaded, make_pack, wait_for

from moe_offload.cache import ExpertCache
from moe_offload.offload.experts.warm_start import HOT_SET_NAME, HotSetFile

NUM_LAYERS, NUM_SLOTS, NUM_EXPERTS = 3, 4, 8


@pytest.fixture(scope="module")
def made_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("warm"), "mixtral")


@pytest.fixture
def pack(made_pack: Path) -> Iterator[Path]:
    yield made_pack
    (made_pack / HOT_SET_NAME).unlink(missing_ok=True)


def answer_of(pack: Path, **options: object) -> str:
    with loaded(pack, [NUM_SLOTS] * NUM_LAYERS, warm_start=True, **options) as model:
        return model.generate(PROMPT, max_new_tokens=12)


def test_what_was_hot_is_read_back(pack: Path) -> None:
    with loaded(pack, [NUM_SLOTS] * NUM_LAYERS, warm_start=True) as model:
        answer = model.generate(PROMPT, max_new_tokens=12)
        hot = model._residency.cache.hot_set()
    with loaded(pack, [NUM_SLOTS] * NUM_LAYERS, warm_start=True) as model:
        residency = model._residency
        wait_for(lambda: residency.num_warmed == NUM_LAYERS * NUM_SLOTS)
        assert [set(experts) for experts in residency.cache.hot_set()] == [set(experts) for experts in hot]
        assert model.stats.warmed == NUM_LAYERS * NUM_SLOTS
        assert model.generate(PROMPT, max_new_tokens=12) == answer
        check_health(model)


def test_it_can_be_turned_off(pack: Path) -> None:
    answer_of(pack)
    with loaded(pack, [NUM_SLOTS] * NUM_LAYERS, FaultyDisk(), warm_start=False) as model:
        assert model.stats.warmed == 0
        assert model._residency.cache.hot_set() == [[]] * NUM_LAYERS
    saved = (pack / HOT_SET_NAME).read_text()
    with loaded(pack, [NUM_SLOTS] * NUM_LAYERS, warm_start=False):
        pass
    assert (pack / HOT_SET_NAME).read_text() == saved


def test_steps_do_not_wait_for_it(pack: Path) -> None:
    """On a slow disk a step is served first, and the same whatever has come."""
    answer = answer_of(pack)
    disk = FaultyDisk()
    disk.delay_reads(0.003)
    with loaded(pack, [NUM_SLOTS] * NUM_LAYERS, disk, warm_start=True, prefetch=1) as model:
        assert model.generate(PROMPT, max_new_tokens=12) == answer
        check_health(model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "null",
        "[]",
        '{"pack": "another", "experts": [[0], [0], [0]]}',
        '{"pack": "PACK", "experts": [[0], [0]]}',
        '{"pack": "PACK", "experts": [[0], [8], [0]]}',
        '{"pack": "PACK", "experts": [[0], [-1], [0]]}',
        '{"pack": "PACK", "experts": [[0, 0], [1], [0]]}',
        '{"pack": "PACK", "experts": [[true], [1], [0]]}',
        '{"pack": "PACK", "experts": [0, 1, 2]}',
        "[" * 100_000,
    ],
)
def test_a_file_that_makes_no_sense_is_ignored(pack: Path, text: str) -> None:
    file = HotSetFile(pack, [NUM_EXPERTS] * NUM_LAYERS)
    (pack / HOT_SET_NAME).write_text(text.replace("PACK", file._pack_id))
    assert file.load() == [[]] * NUM_LAYERS
    file.save([[1], [2, 0], []])
    assert file.load() == [[1], [2, 0], []]


def test_a_pack_that_cannot_be_written_to_keeps_it_at_home(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_OFFLOAD_HOME", str(tmp_path))
    file = HotSetFile(pack, [NUM_EXPERTS] * NUM_LAYERS)
    file._paths[0] = pack / "pack.json" / HOT_SET_NAME  # no folder: writable by nobody, whoever runs the test
    file.save([[1], [2], [3]])
    assert file.load() == [[1], [2], [3]]
    (saved,) = (tmp_path / "hot-sets").iterdir()
    assert json.loads(saved.read_text())["experts"] == [[1], [2], [3]]


def test_nowhere_to_write_is_no_failure(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_OFFLOAD_HOME", str(pack / "pack.json" / "home"))
    file = HotSetFile(pack, [NUM_EXPERTS] * NUM_LAYERS)
    file._paths[0] = pack / "pack.json" / HOT_SET_NAME
    file.save([[1], [2], [3]])
    assert file.load() == [[]] * NUM_LAYERS


def test_a_failed_read_ends_it_quietly(pack: Path) -> None:
    answer = answer_of(pack)
    disk = FaultyDisk()
    with loaded(pack, [NUM_SLOTS] * NUM_LAYERS, disk, warm_start=True) as model:
        assert model.generate(PROMPT, max_new_tokens=12) == answer
    with loaded(pack, [NUM_SLOTS] * NUM_LAYERS, warm_start=False) as model:
        residency, ended = model._residency, []
        residency._tier.begin = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no disk"))  # type: ignore
        assert residency.warm(0, 1, ended.append)
        assert len(ended) == 1
        assert isinstance(ended[0], OSError)
        residency.cache.check_integrity()
        assert residency.num_warmed == 0


def test_policies_remember_the_order() -> None:
    for policy in ("lru", "decay"):
        cache = ExpertCache([6], [3], policy)
        cache.remember(0, [4, 0, 2])
        for placement in cache.admit_warm(0, [4, 0, 2]):
            cache.mark_loaded(0, placement.expert_idx)
        assert cache.hot_set() == [[4, 0, 2]]


@torch.inference_mode()
def test_a_prompt_reads_the_next_layer_ahead(pack: Path) -> None:
    """While a layer is computed, staging fills with what the next one has not."""
    ids = torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(0))
    logits, ahead = {}, {}
    for prefetch in ("off", "auto"):
        with loaded(pack, [2] * NUM_LAYERS, prefetch=prefetch) as model:
            model.model(input_ids=ids[:, :9])
            logits[prefetch] = model.model(input_ids=ids).logits
            ahead[prefetch] = model.stats.prefetch_used
            check_health(model)
    assert torch.equal(logits["off"], logits["auto"])
    assert ahead["off"] == 0
    assert ahead["auto"] > 0
