"""A model that nobody closes, and one that does not come to be: no threads stay behind."""

import gc
import threading
from pathlib import Path

import pytest
from loaded_models import PROMPT, loaded, make_pack, wait_for

from moe_offload import OffloadedModel
from moe_offload.offload import model as model_module


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("lifetime"), "mixtral")


def load(pack: Path) -> OffloadedModel:
    return OffloadedModel.from_pretrained(pack, device="cpu", ram="1GiB", context_tokens=64, prefetch=1)


def readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("expert-reader")}


def test_a_model_that_is_dropped_closes_itself(pack: Path) -> None:
    before = readers()
    for _ in range(2):
        model = load(pack)
        model.generate(PROMPT, max_new_tokens=3)
        assert readers() > before
        del model
        gc.collect()
        wait_for(lambda: readers() == before)


def test_the_transformers_model_alone_is_enough(pack: Path) -> None:
    inner = load(pack).model
    gc.collect()
    tokens = inner.generate(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape[1] == 4


def test_a_tokenizer_that_fails_leaves_nothing(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = readers()

    def fail(folder: Path) -> None:
        raise OSError("no tokenizer")

    monkeypatch.setattr(model_module, "_tokenizer", fail)
    with pytest.raises(OSError, match="no tokenizer"):
        load(pack)
    assert readers() == before


def test_closing_twice(pack: Path) -> None:
    with loaded(pack, [2, 2, 2]) as model:
        model.close()
    model.close()
