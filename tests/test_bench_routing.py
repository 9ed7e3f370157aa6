"""Forced routing: what is drawn repeats as asked, what is recorded fits, and the model follows it."""

import json

import numpy as np
import pytest
import torch

from moe_offload.errors import ConfigError
from moe_offload.offload.bench import Setting, Shape, Workload, run, synthetic_pack
from moe_offload.offload.bench.forced_routing import ForcedRouting
from moe_offload.offload.bench.routing import Routing, Target, repetition
from moe_offload.offload.bench.routing_syntax import make_routing
from moe_offload.offload.bench.synthetic_routing import mixtral_routing, synthetic_layer
from moe_offload.offload.bench.trace_routing import load_trace
from moe_offload.offload.model import OffloadedModel

NUM_TOKENS = 8000
# Three standard deviations of a share of so many tokens, at worst.
TOLERANCE = 3 * (0.25 / NUM_TOKENS) ** 0.5


@pytest.mark.parametrize(
    ("num_experts", "top_k", "first", "share", "skew"),
    [
        (8, 2, 0.141, 0.480, 0.0),
        (8, 2, 0.264, 0.637, 1.0),
        (8, 2, 0.0, 1.0, 0.0),
        (8, 2, 1.0, 1.0, 0.5),
        (32, 4, 0.3, 0.9, 0.7),
        (128, 8, 0.1, 0.2, 1.2),
        (16, 1, 0.4, 0.4, 0.5),
    ],
)
def test_synthetic_routing_repeats_as_asked(num_experts, top_k, first, share, skew):
    experts = synthetic_layer(NUM_TOKENS, num_experts, top_k, first=first, share=share, skew=skew)
    assert experts.shape == (NUM_TOKENS, top_k)
    assert all(len(set(row)) == top_k for row in experts.tolist())
    assert 0 <= experts.min() <= experts.max() < num_experts
    assert repetition(experts) == pytest.approx((first, share), abs=TOLERANCE)


def test_repetition_is_counted_as_the_mixtral_paper_counts_it():
    """Uniform choices of 2 of 8: the first repeats in 1/8, one of both in 1 - 6/8 * 5/7 of the cases."""
    rng = np.random.default_rng(0)
    uniform = np.stack([rng.permutation(8)[:2] for _ in range(NUM_TOKENS)])
    assert repetition(uniform) == pytest.approx((1 / 8, 1 - 6 / 8 * 5 / 7), abs=TOLERANCE)
    assert repetition(np.array([[0, 1], [1, 0], [1, 2], [3, 4]])) == pytest.approx((1 / 3, 2 / 3))


def test_mixtral_routing_lies_within_the_ranges_of_table_5():
    routing = mixtral_routing(Target(NUM_TOKENS, 3, 8, 2), seed=1)  # the first layer, the middle and the last
    ranges = {0: (13.6, 14.9, 44.9, 49.9), 1: (23.6, 28.4, 61.6, 67.0), 2: (19.7, 26.3, 44.5, 53.6)}
    for layer_idx, (first_low, first_high, any_low, any_high) in ranges.items():
        first, share = repetition(routing.experts[:, layer_idx])
        assert first_low / 100 - TOLERANCE <= first <= first_high / 100 + TOLERANCE
        assert any_low / 100 - TOLERANCE <= share <= any_high / 100 + TOLERANCE


def test_skew_makes_some_experts_popular():
    alike, skewed = (synthetic_layer(NUM_TOKENS, 16, 2, first=0.1, share=0.3, skew=skew) for skew in (0.0, 1.0))
    assert np.bincount(alike[:, 0]).max() < 1.5 * NUM_TOKENS / 16
    assert np.bincount(skewed[:, 0]).max() > 2 * NUM_TOKENS / 16


def test_a_seed_gives_the_same_routing_and_another_a_different_one():
    one, again, other = (mixtral_routing(Target(50, 4, 8, 2), seed=seed).experts for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()
    assert (one[:, 0] != one[:, 1]).any(), "layers differ"


# -- traces --

TRACE = {
    "experts": np.array(
        [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 8, 1]], [[1, -1, 0], [2, 3, 4]], [[5, 4, 3], [2, 1, 0]]]
    ),
    "phase": np.array([0, 1, 1, 1]),
    "sequence": np.array([0, 0, 0, 1]),
}


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_a_trace_is_made_to_fit(tmp_path):
    path = save(tmp_path / "some.npz", **TRACE)
    routing = load_trace(path, Target(3, 3, 8, 2))
    # Tokens 1 and 3 are decoded and known, layer 2 is layer 0 again, and experts 8 and 9 are 0 and 1.
    assert routing.experts.tolist() == [
        [[6, 7], [1, 0], [6, 7]],
        [[5, 4], [2, 1], [5, 4]],
        [[6, 7], [1, 0], [6, 7]],
    ]
    assert routing.note == (
        "trace some, its 2 tokens again and again, layers modulo 2, its first 2 of 3 choices, experts modulo 8"
    )
    assert load_trace(path, Target(1, 1, 10, 3), sequence=1).experts.tolist() == [[[5, 4, 3]]]


def test_experts_that_fall_together_are_told_apart(tmp_path):
    path = save(tmp_path / "some.npz", experts=np.array([[[0, 4, 8, 1]]]))
    assert load_trace(path, Target(1, 1, 4, 4)).experts.tolist() == [[[0, 1, 2, 3]]]


def test_probabilities_come_along(tmp_path):
    probs = np.random.default_rng(0).random((4, 2, 3)).astype(np.float16)
    path = save(tmp_path / "some.npz", **TRACE, probs=probs)
    assert load_trace(path, Target(1, 2, 10, 2)).probs.tolist() == [probs[1, :, :2].tolist()]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, "has no array 'experts'"),
        ({"experts": np.zeros((2, 2, 2))}, "'experts' of a trace is float64, not int16"),
        ({"experts": np.full((2, 2, 2), -1)}, "no decode tokens with all experts known"),
        ({"experts": np.zeros((2, 2, 1), dtype=int)}, "1 experts a token, the model 2"),
        ({"experts": np.zeros((2, 2, 2), dtype=int), "phase": np.zeros(3, dtype=int)}, "'phase' of a trace is"),
        ({"experts": np.zeros((2, 2, 2), dtype=int), "probs": np.zeros((2, 2, 1))}, "'probs' of a trace is"),
    ],
)
def test_traces_that_cannot_be_used_are_refused(tmp_path, arrays, message):
    with pytest.raises(ConfigError, match=message):
        load_trace(save(tmp_path / "bad.npz", **arrays), Target(2, 2, 8, 2))


def test_files_that_are_no_traces_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_trace(tmp_path / "none.npz", Target(2, 2, 8, 2))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npz").write_bytes((tmp_path / "array.npy").read_bytes())
    for name, data in (("text.npz", b"hello"), ("zip.npz", b"PK\x03\x04nothing"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match="is not an"):
            load_trace(tmp_path / name, Target(2, 2, 8, 2))
    with pytest.raises(ConfigError, match="is not an"):
        load_trace(tmp_path / "array.npz", Target(2, 2, 8, 2))
    pickled = tmp_path / "pickle.npz"
    np.savez(pickled, experts=np.array([{}], dtype=object))
    with pytest.raises(ConfigError, match="is not an"):
        load_trace(pickled, Target(2, 2, 8, 2))


@pytest.mark.parametrize(
    "text",
    [
        "random",
        "trace:",
        "trace:x.npz,sequence=one",
        "synthetic:",
        "synthetic:first=0.5",
        "synthetic:first=0.5,any=0.2",
        "synthetic:first=a,any=0.2",
        "synthetic:first=0.1,any=0.2,luck=1",
        "synthetic:first=0.1,any=0.2,skew=-1",
    ],
)
def test_routing_that_is_not_understood_is_refused(text):
    with pytest.raises(ConfigError):
        make_routing(text, Target(10, 2, 8, 2))


def test_impossible_repetition_is_refused():
    with pytest.raises(ConfigError, match="cannot all be others"):
        synthetic_layer(10, 3, 2, first=0.1, share=0.5)
    with pytest.raises(ConfigError, match="with one expert a token"):
        synthetic_layer(10, 8, 1, first=0.1, share=0.5)


# -- a model --


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    values = {"model_type": "mixtral", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128}
    values |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}
    (folder / "config.json").write_text(json.dumps(values | {"num_experts_per_tok": 2}))
    return synthetic_pack(Shape(folder, format="int4"), folder / "pack")


def decode(model, num_tokens):
    """Greedy steps; what each layer was asked for in each, and the last logits."""
    asked, run_together = [], model._residency.cache.acquire

    def acquire(layer_idx, expert_ids, **kwargs):
        asked.append((layer_idx, list(expert_ids)))
        return run_together(layer_idx, expert_ids, **kwargs)

    model._residency.cache.acquire = acquire
    report = model._generator.replay(torch.tensor([[5, 6, 7]]), [9] * (num_tokens + 1), lambda count: None)
    steps = asked[-3 * num_tokens :]
    assert [layer_idx for layer_idx, _ in steps] == [0, 1, 2] * num_tokens
    return [[ids for _, ids in steps[at : at + 3]] for at in range(0, len(steps), 3)], report


@pytest.mark.parametrize("recall", [1.0, 0.0])
def test_a_model_follows_a_forced_routing_and_lookahead_foresees_as_told(pack, recall):
    experts = mixtral_routing(Target(6, 3, 8, 2), seed=3).experts
    with OffloadedModel.from_pretrained(pack, device="cpu", ram="400MiB", context_tokens=32, prefetch=2) as model:
        modules = [layer.module for layer in model.manifest.layers]
        forced = ForcedRouting(model.model, modules, 8, Routing(experts, None, ""), recall=recall, seed=0)
        model._step.predictor.replace_guesses(forced.guess)
        steps, report = decode(model, 6)
    assert steps == experts.tolist()
    assert report.prefetch_recall == pytest.approx(recall)


def test_forcing_the_routers_own_choice_changes_nothing(pack):
    with OffloadedModel.from_pretrained(pack, device="cpu", ram="400MiB", context_tokens=32) as model:
        prompt, token = torch.tensor([[5, 6, 7]]), torch.tensor([[9]])
        with torch.inference_mode():
            cache = model.model(prompt, use_cache=True).past_key_values
            chosen = []
            hooks = [
                model.model.get_submodule(layer.module).register_forward_pre_hook(
                    lambda _, args: chosen.append(args[1][0].tolist())
                )
                for layer in model.manifest.layers
            ]
            free = model.model(token, past_key_values=cache).logits
            for hook in hooks:
                hook.remove()
            modules = [layer.module for layer in model.manifest.layers]
            ForcedRouting(model.model, modules, 8, Routing(np.array([chosen]), None, ""), recall=1, seed=0)
            cache = model.model(prompt, use_cache=True).past_key_values
            assert torch.equal(model.model(token, past_key_values=cache).logits, free)
            other = Routing(np.array([chosen])[:, :, ::-1].copy(), np.full((1, 3, 2), 0.5), "")
            ForcedRouting(model.model, modules, 8, other, recall=1, seed=0)
            cache = model.model(prompt, use_cache=True).past_key_values
            assert not torch.equal(model.model(token, past_key_values=cache).logits, free)


def test_a_run_along_a_trace_counts_its_misses(pack, tmp_path):
    """A trace that asks for the same two experts for ever misses nothing once they are there."""
    path = save(tmp_path / "same.npz", experts=np.full((4, 3, 2), [6, 7]))
    workload = Workload(prompt_tokens=4, new_tokens=5, warmup_tokens=3, threads=1, routing=f"trace:{path}", recall=0.5)
    report = run(pack, [Setting(resident=0.25, prefetch="off")], workload, isolated=False)
    assert report.rows[0].best.bytes_read == 0
    assert report.rows[0].best.routing == "trace same, its 4 tokens again and again"
