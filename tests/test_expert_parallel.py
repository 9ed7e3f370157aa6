"""Experts shared out between two processes: the logits are those of one process, bit for bit."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from expert_ranks import SETTINGS, Child, children, free_port, rank_environment
from family_runs import example_inputs, run_logits
from loaded_models import PROMPT, check_health, loaded, make_pack

from moe_offload import OffloadedModel
from moe_offload.errors import ConfigError, GroupError, PackShareError, PeerLostError
from moe_offload.offload.experts.peers import Call
from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.pack.share import Share
from moe_offload.offload.parallel.group import ExpertGroup

# One of each kind of container, gates and biases of all sorts, a norm of the experts' own.
FAMILIES = {
    "mixtral": {"hidden_size": 64, "intermediate_size": 64},
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts_per_tok": 3},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64},
    "dbrx": {},
    "inkling2_text": {},
    "jetmoe": {},
    "llama4_text": {},
    "longcat_flash": {},
    "nllb_moe": {},
    "switch_transformers": {},
}
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[ExpertGroup, Child]]:
    """This process and a child."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, children(2, port) as (child,):
        for name, value in rank_environment(0, 2, port).items():
            patch.setenv(name, value)
        with ExpertGroup.from_environment("cpu") as group:
            yield group, child
            child.input.close()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return make_pack(tmp_path_factory.mktemp("mixtral"), "mixtral", **FAMILIES["mixtral"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_one_process(two, tmp_path, family):
    group, child = two
    pack = make_pack(tmp_path, family, "nf4" if FAMILIES[family] else "bf16", **FAMILIES[family])
    with OffloadedModel.from_pretrained(pack, **SETTINGS) as model:
        inputs = example_inputs(model.model.config, num_tokens=20)
        tokens, logits = run_logits(model.model, inputs)
        num_layers = len(model.manifest.layers)
    child.serve(pack, num_slots=1)
    with loaded(pack, [2] * num_layers, group=group, prefetch=1) as model:
        shared_tokens, shared_logits = run_logits(model.model, inputs)
        assert torch.equal(shared_logits, logits)
        assert torch.equal(shared_tokens, tokens)
        resident = [expert for layer_idx in range(num_layers) for expert in model._residency.cache.resident(layer_idx)]
        assert resident
        assert all(expert % 2 == 0 for expert in resident)
        check_health(model)


def test_figures_are_of_both_processes(two, mixtral):
    group, child = two
    with OffloadedModel.from_pretrained(mixtral, prefetch="off", **SETTINGS) as model:
        text = model.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        alone = model.last_run
    child.serve(mixtral, prefetch="off")
    with OffloadedModel.from_pretrained(mixtral, prefetch="off", group=group, **SETTINGS) as model:
        assert model.generate(PROMPT, max_new_tokens=NEW_TOKENS) == text
        both, total = model.last_run, model.stats
    assert (both.hits, both.misses, both.bytes_read) == (alone.hits, alone.misses, alone.bytes_read)
    assert total.bytes_read == both.bytes_read
    assert (both.num_ranks, alone.num_ranks) == (2, 1)
    assert both.peer_bytes > 0
    assert both.peer_wait_s > 0
    assert (alone.peer_bytes, alone.peer_wait_s) == (0, 0)


def test_prefetches_reach_the_other_process(two, mixtral):
    group, child = two
    child.serve(mixtral, num_slots=1, prefetch=1)
    with loaded(mixtral, [4, 4, 4], group=group, prefetch=1) as model:
        model.generate(PROMPT, max_new_tokens=24)
        (there,) = model._residency.peers.reports()
    assert there.prefetch_issued > 0
    assert there.prefetch_used > 0
    assert there.hits + there.misses > 0


def test_answers_that_nobody_waits_for_do_no_harm(two, mixtral):
    group, child = two
    with OffloadedModel.from_pretrained(mixtral, **SETTINGS) as model:
        text = model.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    child.serve(mixtral)
    with OffloadedModel.from_pretrained(mixtral, group=group, **SETTINGS) as model:
        peers = model._residency.peers
        rows = {1: torch.arange(3), 3: torch.tensor([2])}
        wanted = peers.ask(0, Call.ROWS, torch.ones(3, 64, dtype=torch.bfloat16), rows, prefill=True)
        for _ in range(3):
            peers.ask(1, Call.EACH, torch.zeros(3, 64, dtype=torch.bfloat16), rows, prefill=False)
        assert model.generate(PROMPT, max_new_tokens=NEW_TOKENS) == text
        outputs = dict(wanted)
        assert [outputs[1].shape, outputs[3].shape] == [(3, 64), (1, 64)]
        assert torch.equal(outputs[1][0], outputs[1][2])


def test_what_fails_there_is_an_error_here_and_the_next_answer_is_right(two, mixtral, tmp_path):
    group, child = two
    damaged = tmp_path / "pack"
    shutil.copytree(mixtral, damaged)
    spec = read_manifest(damaged).layers[1].experts[3]
    path, good = damaged / spec.file, (damaged / spec.file).read_bytes()
    path.write_bytes(good[: spec.offset_bytes] + b"wrong" + good[spec.offset_bytes + 5 :])
    child.serve(damaged)
    with OffloadedModel.from_pretrained(mixtral, group=group, **SETTINGS) as model:
        with pytest.raises(GroupError, match=r"rank 1: .*damaged.*checksum"):
            model.model(torch.arange(3, 120)[None])
        path.write_bytes(good)
        text = model.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    with OffloadedModel.from_pretrained(mixtral, **SETTINGS) as model:
        assert model.generate(PROMPT, max_new_tokens=NEW_TOKENS) == text


def test_each_rank_on_a_pack_of_its_own_share(two, tmp_path):
    group, child = two
    whole = make_pack(tmp_path, "deepseek_v3", "int8", moe_intermediate_size=64, hidden_size=64)
    shares = [
        pack_model(str(tmp_path / "checkpoint"), tmp_path / f"share-{rank}", format="int8", share=Share(rank, 2))
        for rank in range(2)
    ]
    first, second = map(read_manifest, shares)
    assert [layer.held for layer in second.layers] == [(1, 3, 5, 7)] * len(second.layers)
    assert second.dense_bytes < 1000 < first.dense_bytes, "the dense part is rank 0's alone"
    assert first.expert_bytes + second.expert_bytes == read_manifest(whole).expert_bytes
    with OffloadedModel.from_pretrained(whole, **SETTINGS) as model:
        text = model.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    child.serve(shares[1])
    with OffloadedModel.from_pretrained(shares[0], group=group, **SETTINGS) as model:
        assert model.generate(PROMPT, max_new_tokens=NEW_TOKENS) == text
    with pytest.raises(PackShareError, match=r"holds 4 \(1, 3, 5, \.\.\.\) of 8 .* rank 0 of 2 needs 4 \(0, 2, 4"):
        OffloadedModel.from_pretrained(shares[1], group=group, **SETTINGS)
    with pytest.raises(PackShareError, match="one rank's share; start all ranks with torchrun"):
        OffloadedModel.from_pretrained(shares[0], **SETTINGS)


def test_traces_are_of_one_process(two, mixtral, tmp_path):
    with pytest.raises(ConfigError, match="without torchrun"):
        OffloadedModel.from_pretrained(mixtral, group=two[0], trace=tmp_path / "trace.npz", **SETTINGS)


def test_a_killed_rank_ends_the_run(two, mixtral):
    """The last test of the group: it is broken from here on."""
    group, child = two
    child.serve(mixtral)
    with OffloadedModel.from_pretrained(mixtral, group=group, **SETTINGS) as model:
        answer = model.stream(PROMPT, max_new_tokens=56)
        next(answer)
        os.kill(child.process.pid, signal.SIGKILL)
        begin_s = time.monotonic()
        with pytest.raises(PeerLostError, match="rank 1 is gone"):
            list(answer)
        with pytest.raises(PeerLostError, match="rank 1 is gone"):
            model.generate(PROMPT, max_new_tokens=2)
    assert time.monotonic() - begin_s < 60, "seconds, on a machine that does other things"
