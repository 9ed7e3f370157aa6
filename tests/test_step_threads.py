"""Torch's threads during a decode step, and those of the kernels."""

import inspect
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_offload.offload.decode.step_threads import StepForward, between_steps_too
from moe_offload.quant.threads import num_threads, torch_on_all_threads, torch_on_one_thread


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Watched(nn.Module):
    """Notes the threads of torch and of the kernels."""

    def forward(self, input_ids=None, inputs_embeds=None, fail=None):
        self.seen = torch.get_num_threads(), num_threads()
        if fail is not None:
            raise fail
        return input_ids


def test_a_step_leaves_torch_one_thread_and_kernels_all():
    model = Watched()
    StepForward(model)
    for tokens, torch_threads in ((1, 1), (2, 1), (3, 3), (40, 3)):
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
        assert model.seen == (torch_threads, 3), tokens
        model(inputs_embeds=torch.zeros(1, tokens, 8))
        assert model.seen == (torch_threads, 3), tokens
        assert torch.get_num_threads() == num_threads() == 3
    model(input_ids=torch.zeros(3, 1, dtype=torch.long))
    assert model.seen == (3, 3)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failing_step_gives_the_threads_back(error: BaseException):
    model = Watched()
    StepForward(model)
    with pytest.raises(type(error)):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), fail=error)
    assert model.seen == (1, 3)
    assert torch.get_num_threads() == num_threads() == 3


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_an_answer_leaves_torch_one_thread_between_its_steps_and_all_for_its_prompt(is_encoder_decoder: bool):
    model = Watched()
    model.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
    with between_steps_too(model):
        assert torch.get_num_threads() == 3, "no step is known here"
    StepForward(model)
    between = 3 if is_encoder_decoder else 1
    with between_steps_too(model):
        for tokens, torch_threads in ((40, 3), (1, 1), (40, 3)):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
            assert model.seen == (torch_threads, 3)
            assert (torch.get_num_threads(), num_threads()) == (between, 3)
        with pytest.raises(ValueError, match="no"):
            model(input_ids=torch.zeros(1, 40, dtype=torch.long), fail=ValueError("no"))
        assert torch.get_num_threads() == between
    assert torch.get_num_threads() == num_threads() == 3


def test_transformers_still_finds_the_arguments_of_the_forward():
    model = Watched()
    before = inspect.signature(model.forward)
    StepForward(model)
    assert inspect.signature(model.forward) == before


def test_a_thread_that_begins_during_a_step_of_another_has_all_threads():
    seen = []

    def prompt():
        with torch_on_all_threads():
            seen.append((torch.get_num_threads(), num_threads()))

    def step():
        with torch_on_one_thread():
            seen.append((torch.get_num_threads(), num_threads()))
        seen.append((torch.get_num_threads(), num_threads()))

    with torch_on_one_thread(), torch_on_one_thread():
        for work in (prompt, step):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert seen == [(3, 3), (1, 3), (3, 3)]
    assert torch.get_num_threads() == 3


def test_one_thread_that_was_asked_for_stays_one():
    torch.set_num_threads(1)
    with torch_on_one_thread():
        assert num_threads() == 1
    with torch_on_all_threads():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1
