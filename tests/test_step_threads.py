"""Torch's threads during a decode step, and those of the kernels."""

import inspect
import threading

import pytest
import torch
from torch import nn

from moe_offload.offload.decode.step_threads import StepForward
from moe_offload.quant.threads import num_threads, torch_on_its_threads, torch_on_one_thread


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


def test_transformers_still_finds_the_arguments_of_the_forward():
    model = Watched()
    before = inspect.signature(model.forward)
    StepForward(model)
    assert inspect.signature(model.forward) == before


def test_a_thread_that_begins_during_a_step_of_another_has_all_threads():
    seen = []

    def prompt():
        torch_on_its_threads()
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
    torch_on_its_threads()
    assert torch.get_num_threads() == 1
