"""Tiny models packed and loaded, with as many slots as a test wants and a disk of its choice."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_config
from family_runs import save_random_model
from faulty_disk import FaultyDisk
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from moe_offload import OffloadedModel
from moe_offload.offload import model as model_module
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.streaming import reader

PROMPT = "w5 w17 w80 w33 w61 w9"


def save_tokenizer(folder: Path) -> None:
    """Words ``w0`` to ``w127`` are the tokens 0 to 127."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
        folder
    )


def make_pack(folder: Path, family: str, expert_format: str = "nf4", **overrides: Any) -> Path:
    """A pack of a random bf16 model with a tokenizer; it seldom ends an answer by itself."""
    config = make_config(family, **overrides)
    save_random_model(config, folder / "checkpoint", torch.bfloat16)
    save_tokenizer(folder / "checkpoint")
    return pack_model(str(folder / "checkpoint"), folder / "pack", format=expert_format)


@contextmanager
def loaded(
    folder: Path, num_slots: list[int], disk: FaultyDisk | None = None, **kwargs: Any
) -> Iterator[OffloadedModel]:
    """A model with so many slots in each layer, be they fewer than a token's experts, that reads from ``disk``."""
    make_plan = model_module.make_plan

    def plan_with_slots(*args: Any, **options: Any) -> Any:
        return replace(make_plan(*args, **options), num_slots=tuple(num_slots))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "make_plan", plan_with_slots)
        patch.setattr(reader, "DirectDisk", lambda: disk or FaultyDisk())
        model = OffloadedModel.from_pretrained(
            folder, **({"device": "cpu", "ram": "1GiB", "context_tokens": 64, "warm_start": False} | kwargs)
        )
    with model:
        yield model


def check_health(model: OffloadedModel) -> None:
    """Nothing is stuck: threads live, slots and staging slots are all given back, the books add up."""
    residency = model._residency
    for thread in residency._tier._reader._threads:
        assert thread.is_alive()
    residency.cache.check_integrity()
    wait_for_loads(model)
    num_staging_slots = residency._tier.num_staging_slots
    wait_for(lambda: residency._free_staging.qsize() + len(residency.guesses) == num_staging_slots)


def wait_for_loads(model: OffloadedModel) -> None:
    """Until what steps did not wait for is there too."""
    wait_for(lambda: not model._residency._loads)


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Poll until it holds; what is in flight when a step fails comes to its end by itself."""
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, "it never happened"
        time.sleep(0.001)
