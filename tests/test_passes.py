"""What the layers are told about the forward pass they are in: whose it is, and whether it is a prompt."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import example_inputs
from loaded_models import PROMPT, check_health, loaded, make_pack

from moe_offload import OffloadedModel
from moe_offload.cache import StatsSnapshot
from moe_offload.errors import ConfigError
from moe_offload.offload.pack.manifest import read_manifest

NUM_LAYERS = 3
PROMPT_TOKENS = 24  # enough to count as a prompt


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("passes"), "mixtral")


@pytest.fixture
def model(pack: Path) -> Iterator[OffloadedModel]:
    with loaded(pack, [4] * NUM_LAYERS, prefetch=1) as model:
        yield model


def counts_of(model: OffloadedModel) -> StatsSnapshot:
    return model._residency.cache.stats.snapshot()


def test_a_prompt_beside_an_answer_that_is_stopped(model: OffloadedModel) -> None:
    """An answer that is stopped in a decode step keeps its tokens, though another thread is at a prompt."""
    prompt = example_inputs(model.model.config, 1, PROMPT_TOKENS)
    num_steps = 0

    def disturb(*_: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 4:
            hook.remove()
            with torch.inference_mode():
                other = threading.Thread(target=model.model, kwargs=prompt)
                other.start()
                other.join()
            model.stop()

    hook = model.model.model.layers[1].register_forward_pre_hook(disturb)
    with torch.inference_mode():
        answer = model.generate(PROMPT, max_new_tokens=20)
    assert model.last_run is not None
    assert len(answer.split()) == model.last_run.new_tokens == num_steps == 4
    check_health(model)


@torch.inference_mode()
def test_a_prompt_of_embeddings_is_a_prompt(model: OffloadedModel) -> None:
    inner = model.model
    embeddings = inner.get_input_embeddings()(example_inputs(inner.config, 1, PROMPT_TOKENS)["input_ids"])
    for kwargs in ({"inputs_embeds": embeddings}, {"input_ids": None, "inputs_embeds": embeddings}):
        before = counts_of(model)
        inner(**kwargs)
        counts = counts_of(model).diff(before)
        assert counts.prefill.requests > 0
        assert counts.decode.requests == 0


@torch.inference_mode()
def test_lookahead_keeps_no_more_than_a_step(model: OffloadedModel) -> None:
    """The hidden states of a large batch would be kept alive, once in each layer."""
    lookahead = model._meter._lookahead
    model.model(**example_inputs(model.model.config, 1, 1))
    for batch_size, is_step in ((2, True), (60, False)):
        before = lookahead.counts.predicted
        model.model(**example_inputs(model.model.config, batch_size, 1))
        assert not lookahead._pass.residuals
        assert (lookahead.counts.predicted > before) == is_step


def test_the_source_of_an_encoder_is_a_prompt(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, "switch_transformers")
    with loaded(pack, [2] * len(read_manifest(pack).layers), prefetch="off") as model:
        inputs = {"input_ids": example_inputs(model.model.config, 1, PROMPT_TOKENS)["input_ids"]}
        model.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        counts = counts_of(model)
        in_encoder = [layer.module.startswith("encoder") for layer in model.manifest.layers]
        assert 0 < sum(in_encoder) < len(in_encoder)
        for is_encoder, layer in zip(in_encoder, counts.layers, strict=True):
            assert (layer.prefill.requests > 0) == is_encoder
            assert (layer.decode.requests > 0) != is_encoder


def test_gradients_are_refused(model: OffloadedModel) -> None:
    """Not computed from slots that hold other experts by then, and not silently left out."""
    inputs = example_inputs(model.model.config, 1, 3)
    assert not model.model(**inputs).logits.requires_grad
    embeddings = model.model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
    with pytest.raises(ConfigError, match="cannot be trained"):
        model.model(inputs_embeds=embeddings)
    with torch.no_grad():
        model.model(inputs_embeds=embeddings)


def test_a_stop_without_a_key_value_cache(model: OffloadedModel) -> None:
    """Every step is then at all of the text, as a prompt is: a stop in the middle of one keeps the tokens before."""
    model.model.generation_config.use_cache = False
    prompt = " ".join(["w9 w44"] * 10)
    num_steps = 0

    def stop(*_: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 4:
            model.stop()

    hook = model.model.model.layers[1].register_forward_pre_hook(stop)
    answer = model.generate(prompt, max_new_tokens=20)
    hook.remove()
    assert len(answer.split()) == 3
    num_steps = 10
    assert model.generate(prompt, max_new_tokens=3) == answer
    check_health(model)
