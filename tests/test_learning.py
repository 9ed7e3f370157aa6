"""Fitting a predictor: what it is fitted on, its file, the policy it makes, the command."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from loaded_models import PROMPT, check_health, loaded, make_pack
from safetensors import safe_open
from safetensors.numpy import save

from moe_offload.cache import RoutingTrace, kernels, write_trace
from moe_offload.cache.learned import LearnedPolicy, LearnedWeights, NativeLearnedPolicy
from moe_offload.cli.main import cli
from moe_offload.errors import ConfigError
from moe_offload.offload.learning.examples import DISCOUNT, decode_tokens, examples_of, split
from moe_offload.offload.learning.learn import learn
from moe_offload.offload.learning.network import Network
from moe_offload.offload.learning.predictor_file import PREDICTOR_NAME, load_predictor, save_predictor
from moe_offload.offload.model import OffloadedModel
from moe_offload.offload.pack.manifest import read_manifest

SIZES = [16, 16, 12]


def random_weights(seed: int, sizes: list[int], width: int = 5) -> LearnedWeights:
    rng = np.random.default_rng(seed)

    def arrays(*shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)

    tables = [(n, width) for n in sizes]
    return LearnedWeights(
        *arrays((width,)),
        arrays(*tables),
        arrays(*tables),
        arrays(*[(width, n) for n in sizes]),
        arrays(*[(n,) for n in sizes]),
    )


def grammar_trace(seed: int, num_tokens: int, num_texts: int = 4) -> RoutingTrace:
    """Words that follow each other by fixed rules which no single text shows whole; each has routing of its own."""
    words = np.random.default_rng(7)
    routing = np.stack([np.stack([words.permutation(n)[:3] for n in SIZES]) for _ in range(60)])
    after = words.integers(60, size=(60, 2))
    rng = np.random.default_rng(seed)
    word, chosen = 0, []
    for _ in range(num_tokens):
        word = after[word, rng.integers(2)] if rng.random() < 0.9 else rng.integers(60)
        chosen.append(routing[word])
    return RoutingTrace(
        experts=np.array(chosen, np.int16),
        sequence=np.repeat(np.arange(num_texts), -(-num_tokens // num_texts))[:num_tokens].astype(np.int32),
        phase=np.ones(num_tokens, np.uint8),
        num_experts=np.array(SIZES, np.int32),
    )


def test_targets_tell_how_soon_an_expert_is_used_again():
    trace = RoutingTrace(
        experts=np.array([[[0]], [[1]], [[0]], [[2]]], np.int16), sequence=np.zeros(4, np.int32), phase=None
    )
    examples = examples_of([trace], [4])
    np.testing.assert_allclose(
        examples.targets[:, 0],
        [[DISCOUNT, 1, DISCOUNT**2, 0], [1, 0, DISCOUNT, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
        rtol=1e-3,
    )
    assert examples.follows.tolist() == [False, True, True, True]


def test_whole_texts_are_kept_apart():
    kept, apart = split([grammar_trace(1, 400)], 0.15)
    assert [len(np.unique(part[0].sequence)) for part in (kept, apart)] == [3, 1]
    one_text = [grammar_trace(1, 400, num_texts=1)]
    assert [part[0].num_tokens for part in split(one_text, 0.15)] == [340, 60]


def test_a_prompt_is_not_learnt_from():
    trace = grammar_trace(1, 600)
    mixed = RoutingTrace(experts=trace.experts, sequence=trace.sequence, phase=(np.arange(600) % 2).astype(np.uint8))
    assert decode_tokens([mixed], SIZES)[0].num_tokens == 300


@pytest.mark.parametrize(
    ("trace", "sizes", "message"),
    [
        (grammar_trace(1, 400), [16, 16], "a trace of 3 MoE layers for a model that has 2"),
        (grammar_trace(1, 400), [16, 16, 16], "12 experts in layer 2, where the model has 16"),
        (grammar_trace(1, 100), SIZES, "100 decode tokens are too few to learn from, 200 the least"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(trace: RoutingTrace, sizes: list[int], message: str):
    with pytest.raises(ConfigError, match=message):
        learn([trace], sizes)


def test_the_policy_computes_what_the_network_does():
    torch.manual_seed(0)
    network = Network(SIZES, 3).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.recall_scale.data.fill_(2.0)
    network.now.data[-1] = network.before.data[-1] = 0
    trace = grammar_trace(3, 30, num_texts=1)
    examples = examples_of([trace], SIZES)
    rows = network.rows(torch.from_numpy(examples.experts))
    before = torch.cat([torch.full_like(rows[:1], 3 * 16), rows[:-1]])
    with torch.no_grad():
        expected = network(rows, before, torch.from_numpy(examples.recalled).float()) / 2
    policy = LearnedPolicy(network.weights(SIZES))
    for token in range(30):
        for layer_idx, num_experts in enumerate(SIZES):
            policy.touch(layer_idx, trace.experts[token, layer_idx].tolist(), None)
            scores = np.array(policy.scores(layer_idx))
            used = scores > 0
            np.testing.assert_allclose(scores[used] - 64, expected[token, layer_idx, :num_experts][used], atol=0.05)


@pytest.mark.skipif(kernels.library() is None, reason="the library was not built")
def test_the_library_gives_the_scores_of_the_reference():
    weights = random_weights(2, SIZES)
    native, reference = NativeLearnedPolicy(weights), LearnedPolicy(weights)
    rng = np.random.default_rng(3)
    for token in range(120):
        if token % 40 == 30:
            native.new_sequence()
            reference.new_sequence()
        for layer_idx, num_experts in enumerate(SIZES):
            num = num_experts - 1 if token % 50 == 49 else 3
            experts = rng.permutation(num_experts)[:num].tolist()
            for policy in (native, reference):
                policy.touch(layer_idx, experts, None)
            assert list(native.scores(layer_idx)) == list(reference.scores(layer_idx))


def test_what_was_learnt_is_better_than_recall():
    lesson = learn([grammar_trace(1, 1500)], SIZES)
    assert lesson.num_tokens + lesson.num_apart == 1500
    assert all(gain.learned > gain.recall > gain.lru for gain in lesson.gains)


PACK_SIZES = [8, 8, 8]


@pytest.fixture(scope="module")
def made_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("learning"), "mixtral")


@pytest.fixture
def pack(made_pack: Path) -> Iterator[Path]:
    yield made_pack
    (made_pack / PREDICTOR_NAME).unlink(missing_ok=True)


def test_a_predictor_is_read_as_it_was_written(pack: Path):
    weights, manifest = random_weights(1, PACK_SIZES), read_manifest(pack)
    assert save_predictor(pack, manifest, weights) == pack / PREDICTOR_NAME
    read = load_predictor(pack, manifest)
    np.testing.assert_array_equal(read.start, weights.start)
    for name in ("now", "before", "out", "bias"):
        for mine, theirs in zip(getattr(read, name), getattr(weights, name), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_without_a_predictor_the_command_is_told(pack: Path):
    with pytest.raises(ConfigError, match=r"is not there; fit one with: moe-offload learn .* TRACE\.\.\."):
        OffloadedModel.from_pretrained(pack, policy="learned", ram="1GiB")


def test_a_predictor_of_another_model_is_refused(pack: Path):
    manifest = read_manifest(pack)
    layers = (replace(manifest.layers[0], module="elsewhere"), *manifest.layers[1:])
    save_predictor(pack, replace(manifest, layers=layers), random_weights(1, PACK_SIZES))
    with pytest.raises(ConfigError, match="was fitted to a model of other layers"):
        load_predictor(pack, manifest)


@pytest.mark.parametrize("damage", ["cut", "number", "shape", "missing", "version", "foreign"])
def test_a_damaged_predictor_is_refused(pack: Path, damage: str):
    manifest, path = read_manifest(pack), pack / PREDICTOR_NAME
    weights = random_weights(1, PACK_SIZES)
    if damage == "number":
        weights.out[1][0, 0] = np.nan
    if damage == "shape":
        weights = replace(weights, bias=(*weights.bias[:2], weights.bias[2][:7]))
    save_predictor(pack, manifest, weights)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "foreign":
        path.write_bytes(b"{}")
    elif damage in ("missing", "version"):
        with safe_open(path, "numpy") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        if damage == "missing":
            del tensors["layers.1.bias"]
        else:
            metadata["version"] = "2"
        path.write_bytes(save(tensors, metadata))
    with pytest.raises(ConfigError, match=r"(damaged|cannot be read|of version 2).*moe-offload learn"):
        load_predictor(pack, manifest)


def test_learning_and_using_it_changes_no_answer(pack: Path, tmp_path: Path):
    with loaded(pack, [3] * 3) as model:
        answer = model.generate(PROMPT, max_new_tokens=12)
    rng = np.random.default_rng(1)
    experts = np.argsort(rng.random((400, 3, 8)), axis=2)[:, :, :2].astype(np.int16)
    trace = RoutingTrace(experts=experts, sequence=np.zeros(400, np.int32), phase=np.ones(400, np.uint8))
    write_trace(tmp_path / "run.npz", trace)
    result = CliRunner().invoke(cli, ["learn", str(pack), str(tmp_path / "run.npz")])
    assert result.exit_code == 0, result.output
    assert str(pack / PREDICTOR_NAME) in result.output
    assert "fitted to 340 tokens; on 60 others" in result.output
    with loaded(pack, [3] * 3, policy="learned") as model:
        assert model.generate(PROMPT, max_new_tokens=12) == answer
        check_health(model)
