"""Groups of processes: how they come together, what they must have in common, and how they end."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from expert_ranks import SETTINGS, Child, children, free_port, rank_environment
from family_runs import example_inputs, run_logits
from loaded_models import PROMPT, make_pack

from moe_offload import OffloadedModel
from moe_offload.cli.main import cli
from moe_offload.errors import ConfigError, GroupMismatchError, PeerLostError
from moe_offload.offload.pack.share import Share
from moe_offload.offload.parallel.environment import Place, in_a_group, serves_experts
from moe_offload.offload.parallel.group import ExpertGroup
from moe_offload.offload.parallel.network import chosen_interface, interface_to

NEW_TOKENS = 6


@contextmanager
def group_of(num_ranks: int, **environment: str) -> Iterator[tuple[ExpertGroup, list[Child]]]:
    """This process as rank 0, and children."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (rank_environment(0, num_ranks, port) | environment).items():
            patch.setenv(name, value)
        with children(num_ranks, port) as others, ExpertGroup.from_environment("cpu") as group:
            yield group, others
            for child in others:
                child.input.close()


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return make_pack(tmp_path_factory.mktemp("mixtral"), "mixtral", hidden_size=64, intermediate_size=64)


def test_three_ranks_and_one_that_falls_silent(pack):
    with OffloadedModel.from_pretrained(pack, **SETTINGS) as model:
        inputs = example_inputs(model.model.config, num_tokens=20)
        tokens, logits = run_logits(model.model, inputs)
    with group_of(3, MOE_OFFLOAD_PEER_TIMEOUT="5") as (group, (second, third)):
        for child in (second, third):
            child.serve(pack, num_slots=1)
        with OffloadedModel.from_pretrained(pack, group=group, **SETTINGS) as model:
            shared_tokens, shared_logits = run_logits(model.model, inputs)
            assert torch.equal(shared_logits, logits)
            assert torch.equal(shared_tokens, tokens)
            assert model.plan.num_experts == (3, 3, 3)
            assert "3 on this machine" in group.note
            os.kill(third.process.pid, signal.SIGSTOP)
            with pytest.raises(PeerLostError, match="rank 2 has given no sign of life for 5 s"):
                model.generate(PROMPT, max_new_tokens=56)
        status, said = second.end()
        assert status == 1
        assert "PeerLostError: rank 2 has given no sign of life" in said


def test_ranks_that_do_not_fit_together(pack, tmp_path):
    other = make_pack(tmp_path, "mixtral", "int8", hidden_size=64, intermediate_size=64)
    mismatch = "format of the experts is nf4 at rank 0 and int8 at rank 1; pack them in the same format"
    with group_of(2) as (group, (child,)):
        child.serve(other)
        with pytest.raises(GroupMismatchError, match=mismatch):
            OffloadedModel.from_pretrained(pack, group=group, **SETTINGS)
        status, said = child.end()
        assert status == 1
        assert f"GroupMismatchError: the ranks do not fit together: {mismatch}" in said


def torchrun(*arguments: str, num_ranks: int = 2, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    command += [f"--master-port={free_port()}", "-m", "moe_offload", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
    )


def test_the_command_under_torchrun(pack):
    with OffloadedModel.from_pretrained(pack, **SETTINGS) as model:
        expected = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, temperature=0)
    options = ["--ram", "1GiB", "--device", "cpu", "--context", "64", "--no-warm-start"]
    length = ["--max-new-tokens", str(NEW_TOKENS), "--temperature", "0"]
    done = torchrun("generate", str(pack), "-p", PROMPT, *length, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + "\n"
    assert "for other ranks" in done.stderr
    assert done.stderr.count("expert slots") == 1, "rank 0 alone has the terminal"


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, on one cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's ip")
    names = tuple(f"moe-{os.getpid()}-{side}" for side in "ab")
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
    for number, name in enumerate(names, 1):
        commands += [f"-n {name} addr add 10.77.0.{number}/24 dev eth0", f"-n {name} link set eth0 up"]
        commands.append(f"-n {name} link set lo up")
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"ip {command}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_by_network_namespaces(pack, namespaces, tmp_path):
    """Each rank with an interface of its own, a pack of its own share, and a network that is cut in the end."""
    with OffloadedModel.from_pretrained(pack, **SETTINGS) as model:
        expected = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, temperature=0)
    port = free_port()
    script = "expert_rank_zero.py"
    first, second = (
        Child(
            rank_environment(rank, 2, port, host="10.77.0.1", local=False)
            | {"MOE_OFFLOAD_PEER_TIMEOUT": "5", "MOE_OFFLOAD_HOME": str(tmp_path / f"home-{rank}")},
            "ip",
            "netns",
            "exec",
            name,
            program=script if rank == 0 else "expert_ranks.py",
        )
        for rank, name in enumerate(namespaces)
    )
    with first.watched(), second.watched():
        for child in (first, second):
            child.serve(pack.parent / "checkpoint", format="nf4")
        first.write_line(PROMPT)
        assert first.read_line() == expected, first.end()
        assert len(list((tmp_path / "home-1/packs").glob("*-share-1-of-2/pack.json"))) == 1
        subprocess.run(["ip", "-n", namespaces[1], "link", "set", "eth0", "down"], check=True)
        first.write_line(PROMPT)
        assert "PeerLostError" in first.end()[1]
        assert "PeerLostError" in second.end()[1]


# -- without any other process --


def test_the_environment():
    assert not in_a_group({})
    assert not in_a_group(rank_environment(0, 1, 1))
    assert in_a_group(rank_environment(0, 2, 1))
    assert [serves_experts(rank_environment(rank, 2, 1)) for rank in range(2)] == [False, True]
    place = Place.from_environment(rank_environment(1, 2, 1234))
    assert (place.rank, place.num_ranks, place.local_rank, place.is_one_machine) == (1, 2, 1, True)
    assert not Place.from_environment(rank_environment(1, 2, 1234, local=False)).is_one_machine
    with pytest.raises(ConfigError, match="MASTER_ADDR not set: start the ranks with torchrun"):
        Place.from_environment({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"})
    with pytest.raises(ConfigError, match="RANK=2 of WORLD_SIZE=2"):
        Place.from_environment(rank_environment(2, 2, 1))
    with pytest.raises(ConfigError, match="RANK=x is no number"):
        Place.from_environment(rank_environment(0, 2, 1) | {"RANK": "x"})


@pytest.mark.parametrize("command", [["profile", "x"], ["bench", "--like", "mixtral-8x7b"]])
def test_commands_that_are_of_one_process_refuse_ranks(command, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_OFFLOAD_HOME", str(tmp_path))
    for name, value in rank_environment(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 1
    assert "without torchrun" in result.stderr or "name its folder" in result.stderr


def test_shares():
    shares = [Share(rank, 3) for rank in range(3)]
    assert [share.held(8) for share in shares] == [(0, 3, 6), (1, 4, 7), (2, 5)]
    assert all(shares[shares[0].rank_of(expert_idx)].has(expert_idx) for expert_idx in range(8))
    assert Share.parse("1/4") == Share(1, 4)
    assert str(Share(1, 4)) == "1/4"
    for wrong in ("4/4", "1", "a/b", "-1/4"):
        with pytest.raises(ConfigError, match="share"):
            Share.parse(wrong)
    with pytest.raises(ConfigError, match="a layer has 4 experts, too few for 5 ranks"):
        Share(0, 5).held(4)


def test_the_interface_to_this_machine():
    assert interface_to("127.0.0.1", 80) == "lo"
    assert interface_to("no.such.host.invalid", 80) is None


def test_the_interface_is_gloos_for_a_while_only(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with chosen_interface("127.0.0.1", 80) as name:
        assert os.environ["GLOO_SOCKET_IFNAME"] == name == "lo"
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    with chosen_interface("127.0.0.1", 80) as name:
        assert os.environ["GLOO_SOCKET_IFNAME"] == name == "eth7"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_lost_rank_aborts_what_is_on_its_way_between_gpus():
    """NCCL's part of the end, without it: the connections of gloo first, then the communicator of the device."""
    ended: list[str] = []

    class Failing:
        def abort(self) -> None:
            ended.append("nccl")
            raise RuntimeError("aborted already")

    group = object.__new__(ExpertGroup)
    group.links = {1: SimpleNamespace(abort=lambda: ended.append("gloo"))}
    group._messages = SimpleNamespace(_get_backend=lambda device: Failing())
    for use_nccl in (False, True):
        group._use_nccl = use_nccl
        group._abort()
    assert ended == ["gloo", "gloo", "nccl"]


def test_messages_go_between_gpus_where_every_rank_has_its_own(monkeypatch):
    store: dict[str, str] = {"cuda/1": "1"}
    group = object.__new__(ExpertGroup)
    group.place = Place(0, 2, 0, 2, "127.0.0.1", 1)
    group._store = SimpleNamespace(set=store.__setitem__, get=lambda key: store[key].encode())
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    for count, device, expected in [(0, "auto", False), (1, "auto", True), (1, "cpu", False)]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert group._all_on_gpus(device) == expected
