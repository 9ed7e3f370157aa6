"""Attention of prompts by the kernels: against plain torch, and when it stays out of the way."""

from typing import Any

import pytest
import torch
from decode_runs import decode, pack_of
from family_runs import load_smallest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_offload.offload.decode import prompt_attention
from moe_offload.quant.prompt_attention import attend_prompt, attends_prompts

pytestmark = pytest.mark.skipif(
    not attends_prompts(*(torch.zeros(1, 1, 1, 32, dtype=torch.bfloat16) for _ in range(3))),
    reason="no kernels for products of bf16",
)


def heads(num: int, tokens: int, dim: int, seed: int) -> torch.Tensor:
    """``[1, num, tokens, dim]`` in bf16, as projections leave them: tokens first in memory."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, num, dim, generator=generator).bfloat16().transpose(1, 2)


def plain(query, key, value, begin, end, scaling) -> torch.Tensor:
    """In fp32."""
    group = query.shape[1] // key.shape[1]
    keys, values = (t.float().repeat_interleave(group, 1) for t in (key, value))
    at = torch.arange(key.shape[2])
    shown = (at >= begin.unsqueeze(1)) & (at < end.unsqueeze(1))
    scores = (query.float() @ keys.transpose(-1, -2) * scaling).masked_fill(~shown, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize(
    ("tokens", "keys", "num_heads", "kv_heads", "key_dim", "value_dim", "window"),
    [
        (130, 130, 4, 2, 64, 64, 1000),
        (37, 101, 4, 1, 32, 32, 1000),
        (70, 70, 3, 3, 192, 128, 20),
        (33, 200, 2, 2, 40, 96, 3),
        (1, 65, 2, 1, 80, 256, 64),
        (64, 64, 1, 1, 2, 32, 1),
    ],
)
def test_against_plain_torch(tokens, keys, num_heads, kv_heads, key_dim, value_dim, window):
    query, key = heads(num_heads, tokens, key_dim, 1), heads(kv_heads, keys, key_dim, 2)
    value = heads(kv_heads, keys, value_dim, 3)
    end = torch.arange(keys - tokens + 1, keys + 1, dtype=torch.int32)
    begin = (end - window).clamp(min=0)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(attend_prompt(query, key, value, begin, end, 0.3))
    finally:
        torch.set_num_threads(before)
    expected = plain(query, key, value, begin, end, 0.3)
    assert torch.equal(*results)
    assert results[0].shape == expected.shape == (1, tokens, num_heads, value_dim)
    # a share and a result are each rounded to bf16, 2^-9
    assert float((results[0].float() - expected).norm() / expected.norm()) < 2**-8


def test_scores_that_would_overflow_an_exponential_do_not():
    query, key, value = heads(1, 80, 32, 1) * 100, heads(1, 80, 32, 2) * 100, heads(1, 80, 32, 3)
    end = torch.arange(1, 81, dtype=torch.int32)
    found = attend_prompt(query, key, value, torch.zeros_like(end), end, 1.0)
    expected = plain(query, key, value, torch.zeros_like(end), end, 1.0)
    assert float((found.float() - expected).norm() / expected.norm()) < 2**-8


def test_what_a_query_does_not_attend_to_changes_nothing():
    query, key, value = heads(2, 90, 32, 1), heads(1, 90, 32, 2), heads(1, 90, 32, 3)
    end = torch.arange(1, 91, dtype=torch.int32)
    begin = (end - 7).clamp(min=0)
    found = attend_prompt(query, key, value, begin, end, 0.2)
    for hidden in (slice(0, 30), slice(50, 90)):
        for tensor in (key, value):
            tensor[:, :, hidden] = 5.0
    assert torch.equal(attend_prompt(query, key, value, begin, end, 0.2)[:, 36:50], found[:, 36:50])


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda t: t, True),
        (lambda t: t.float(), False),
        (lambda t: t.expand(2, -1, -1, -1), False),
        (lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), False),
        (lambda t: t[..., :31], False),
    ],
)
def test_what_the_kernel_takes(change, fits):
    assert attends_prompts(*(change(heads(1, 4, 32, seed)) for seed in range(3))) is fits


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Queries and keys of every prompt that the kernel attends to."""
    seen: list[tuple[int, int]] = []

    def counted(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((query.shape[2], key.shape[2]))
        return attend_prompt(query, key, *rest)

    monkeypatch.setattr(prompt_attention, "attend_prompt", counted)
    return seen


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Any:
    options: dict[str, Any] = {"num_hidden_layers": 2, "head_dim": 32, "sliding_window": 6}
    return pack_of("mixtral", tmp_path_factory.mktemp("mixtral"), **options)


@pytest.mark.parametrize("options", [{}, {"attention_mask": torch.tensor([[1] * 11])}])
def test_a_model_computes_what_it_does_without(options, pack, calls, monkeypatch):
    with load_smallest(pack, dtype="bfloat16") as model:
        found = decode(model.model, **options)
        assert calls == [(11, 11)] * 2
        long = torch.arange(1, 41).unsqueeze(0)
        whole = model.model(long).logits[0, -1].float()
        cache = model.model(long[:, :25]).past_key_values
        calls.clear()
        parted = model.model(long[:, 25:], past_key_values=cache).logits[0, -1].float()
        assert all(queries == 15 and keys >= 15 for queries, keys in calls)
    assert float((parted - whole).norm() / whole.norm()) < 0.03
    calls.clear()
    monkeypatch.setattr(prompt_attention, "_modules", set())
    with load_smallest(pack, dtype="bfloat16") as model:
        prompt_attention._modules.clear()
        expected = decode(model.model, **options)
    assert not calls
    assert float((found[0].float() - expected[0].float()).norm() / expected[0].float().norm()) < 0.03


def test_everything_else_goes_to_the_function_that_was_there(pack, calls):
    with load_smallest(pack, dtype="bfloat16") as model:
        own = model.model
        decode(own, batch_size=2)
        decode(own, attention_mask=torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]]))  # with nothing, and with gaps
        assert not calls
        attend, query = ALL_ATTENTION_FUNCTIONS["sdpa"], heads(4, 8, 32, 1)
        attention, others = own.model.layers[0].self_attn, heads(2, 8, 32, 2)

        def runs(module: Any, query: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> bool:
            calls.clear()
            result, _ = attend(module, query, others, others, mask, scaling=0.2, **options)
            assert result.shape == (1, query.shape[2], 4, 32)
            return bool(calls)

        assert runs(attention, query)
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        assert runs(attention, query, mask)
        calls.clear()
        with pytest.raises(RuntimeError):
            attend(attention, query, others[:, :, :6], others[:, :, :6], mask, scaling=0.2)
        assert not calls, "a mask that was seen fits its own keys alone"
        stranger = torch.nn.Module()
        stranger.num_key_value_groups = 2
        assert not runs(stranger, query), "another's module"
        assert not runs(attention, query.detach().requires_grad_())
        assert not runs(attention, query, torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)), "a mask of numbers"
        assert not runs(attention, query, position_bias=torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16))
        assert not runs(attention, query[:, :, :2]), "a decode step"
