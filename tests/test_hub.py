"""Packing from a hub: a local server stands for it, a child process is its client."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, commit_id
from families import make_config
from family_runs import save_random_model
from quantized_checkpoints import read_tensors, write_checkpoint

from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.pack.packer import pack_model

TIMEOUT_S = 120


class Client:
    """The child process."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "error",
        }
        environment = {k: v for k, v in environment.items() if not k.lower().endswith("_proxy")}
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("hub_client.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, model: str, **command: Any) -> None:
        self.process.stdin.write(
            json.dumps({"model": model} | {k: str(v) if isinstance(v, Path) else v for k, v in command.items()}) + "\n"
        )
        self.process.stdin.flush()

    def pack(self, model: str, **command: Any) -> dict[str, Any]:
        self.send(model, **command)
        line = self.process.stdout.readline()
        assert line, "the client died"
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Iterator[Client]:
    child = Client(hub.endpoint, tmp_path_factory.mktemp("client"))
    yield child
    child.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "mixtral"
    return save_random_model(make_config("mixtral", num_hidden_layers=4), folder, torch.bfloat16)


@pytest.fixture(scope="module")
def checksums(checkpoint, tmp_path_factory) -> list[Any]:
    """Of the pack made from the folder itself."""
    return pack_checksums(pack_model(str(checkpoint), tmp_path_factory.mktemp("expected") / "pack"))


@pytest.fixture(autouse=True)
def _clean(hub) -> None:
    hub.heal()
    hub.requests.clear()
    hub.on_get = lambda request: None


@pytest.fixture
def repo(hub, checkpoint, request) -> str:
    """The checkpoint under a name that no other test has."""
    name = "tiny/" + request.node.name.replace("[", "-").rstrip("]")
    hub.add(name, checkpoint)
    return name


def pack_checksums(pack: Path | str) -> list[Any]:
    manifest = read_manifest(Path(pack))
    return [*(layer.checksums for layer in manifest.layers), *(dense.checksum for dense in manifest.dense)]


def shard_names(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.glob("*.safetensors"))


def held(home: Path) -> list[str]:
    """Shards, whole or not, in the downloads folder."""
    return sorted(path.name for path in (home / "downloads").rglob("*.safetensors*"))


def test_a_checkpoint_is_packed_a_shard_at_a_time(hub, client, repo, checkpoint, checksums, tmp_path):
    most_held: list[int] = []
    hub.on_get = lambda request: most_held.append(len(held(tmp_path)))
    answer = client.pack(repo, home=tmp_path)
    manifest = read_manifest(Path(answer["path"]))
    assert Path(answer["path"]).is_relative_to(tmp_path / "packs")
    assert (manifest.source, manifest.revision) == (repo, commit_id(str(checkpoint)))
    assert pack_checksums(answer["path"]) == checksums
    names = shard_names(checkpoint)
    assert len(names) > 4
    assert sorted(request.file for request in hub.gets()) == names
    assert max(most_held) <= 2  # a layer may lie in two shards; the one being asked for is not there yet
    assert not any((tmp_path / "downloads").iterdir())
    progress = answer["progress"]
    assert progress["label"] == f"downloading and packing {repo} to nf4"
    assert progress["done_bytes"] == progress["total_bytes"] > sum((checkpoint / n).stat().st_size for n in names)
    hub.requests.clear()
    assert client.pack(repo, home=tmp_path)["path"] == answer["path"]
    assert not hub.gets()


def test_a_checkpoint_of_one_file_has_no_index(hub, client, tmp_path):
    folder = tmp_path / "single"
    save_random_model(make_config("mixtral", num_hidden_layers=1), tmp_path / "sharded", torch.bfloat16)
    write_checkpoint(tmp_path / "sharded", folder, read_tensors(tmp_path / "sharded"), None)
    hub.add("tiny/single", folder)
    answer = client.pack("tiny/single", home=tmp_path)
    assert pack_checksums(answer["path"]) == pack_checksums(pack_model(str(folder), tmp_path / "expected"))
    # its header, to know the keys, and later the whole of it
    assert [request.range for request in hub.gets()] == ["bytes=0-100000", None]
    assert answer["progress"]["done_bytes"] == answer["progress"]["total_bytes"]


def test_a_cut_connection_is_an_error_and_the_next_run_goes_on(hub, client, repo, checkpoint, checksums, tmp_path):
    names = shard_names(checkpoint)
    broken = names[-2]
    cut_bytes = (checkpoint / broken).stat().st_size // 2
    hub.cuts[broken] = cut_bytes
    answer = client.pack(repo, home=tmp_path)
    assert answer["error"] == "SourceError"
    assert broken in answer["text"]
    assert "run the same command again" in answer["text"]
    assert f"{broken}.partial" in held(tmp_path)
    partial_bytes = next((tmp_path / "downloads").rglob("*.partial")).stat().st_size
    assert cut_bytes - 1024 <= partial_bytes <= cut_bytes
    hub.heal()
    hub.requests.clear()
    answer = client.pack(repo, home=tmp_path)
    assert pack_checksums(answer["path"]) == checksums
    assert [request.range for request in hub.gets() if request.file == broken] == [f"bytes={partial_bytes}-"]
    assert names[0] not in [request.file for request in hub.gets()]  # what is packed is not downloaded again
    assert answer["progress"]["done_bytes"] == answer["progress"]["total_bytes"]


def test_a_damaged_part_is_downloaded_again(hub, client, repo, checkpoint, checksums, tmp_path):
    first = shard_names(checkpoint)[0]
    hub.cuts[first] = 4000
    assert client.pack(repo, home=tmp_path)["error"] == "SourceError"
    partial = next((tmp_path / "downloads").rglob("*.partial"))
    partial.write_bytes(bytes(partial.stat().st_size))
    hub.heal()
    hub.requests.clear()
    answer = client.pack(repo, home=tmp_path)
    assert pack_checksums(answer["path"]) == checksums
    assert [bool(request.range) for request in hub.gets() if request.file == first] == [True, False]
    assert answer["progress"]["done_bytes"] == answer["progress"]["total_bytes"]


def held_bytes(folder: Path, name: str) -> int:
    """Bytes of a file somewhere below a folder; 0 while it is not there, or is just being renamed."""
    try:
        return sum(path.stat().st_size for path in folder.rglob(name))
    except FileNotFoundError:
        return 0


def test_a_killed_download_goes_on(hub, client, repo, checkpoint, checksums, tmp_path):
    victim = Client(hub.endpoint, tmp_path)
    stalled = shard_names(checkpoint)[2]
    released = threading.Event()
    hub.stalls[stalled] = (20_000, released)
    try:
        victim.send(repo, home=tmp_path)
        deadline_s = time.monotonic() + TIMEOUT_S
        while not held_bytes(tmp_path / "downloads", f"{stalled}.partial"):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        # Meanwhile nobody else writes there.
        answer = client.pack(repo, home=tmp_path, output=tmp_path / "other")
        assert answer["error"] == "SourceError"
        assert f"another process is downloading {repo}" in answer["text"]
    finally:
        victim.close()
        released.set()
    (partial,) = (tmp_path / "downloads").rglob("*.partial")
    partial_bytes = partial.stat().st_size
    hub.requests.clear()
    answer = client.pack(repo, home=tmp_path)
    assert pack_checksums(answer["path"]) == checksums
    assert [request.range for request in hub.gets() if request.file == stalled] == [f"bytes={partial_bytes}-"]


def test_shards_in_the_users_cache_are_used_and_kept(hub, client, repo, checkpoint, checksums, tmp_path):
    name = shard_names(checkpoint)[1]
    cached = Path(client.pack(repo, cache=name)["path"])
    hub.requests.clear()
    answer = client.pack(repo, home=tmp_path)
    assert pack_checksums(answer["path"]) == checksums
    assert sorted(request.file for request in hub.gets()) == [n for n in shard_names(checkpoint) if n != name]
    assert cached.is_file()


def test_a_finished_pack_needs_no_hub(hub, client, repo, tmp_path):
    path = client.pack(repo, home=tmp_path)["path"]
    hub.requests.clear()
    assert client.pack(repo, home=tmp_path, offline=True)["path"] == path
    assert not hub.requests


def test_a_revision_is_pinned(hub, client, repo, tmp_path):
    other = save_random_model(make_config("mixtral", num_hidden_layers=1), tmp_path / "other", torch.float32)
    commit = hub.add(repo, other, branch="v2")
    packs = [client.pack(repo, home=tmp_path, revision=revision)["path"] for revision in ("v2", commit, "main")]
    assert packs[0] == packs[1] != packs[2]
    manifest = read_manifest(Path(packs[0]))
    assert manifest.revision == commit
    assert len(manifest.layers) == 1


def test_a_token_is_sent(hub, client, repo, tmp_path):
    client.pack(repo, home=tmp_path, token="hf_secret")
    assert {request.authorization for request in hub.requests} == {"Bearer hf_secret"}


def test_a_full_disk_is_refused_before_the_download(hub, client, repo, tmp_path):
    answer = client.pack(repo, home=tmp_path, free_bytes=12_000)
    assert answer["error"] == "DiskFullError"
    assert "11.7 KiB free" in answer["text"]
    assert "MOE_OFFLOAD_HOME" in answer["text"]
    assert not hub.gets()


def _without(checkpoint: Path, folder: Path, *names: str) -> Path:
    return Path(shutil.copytree(checkpoint, folder, ignore=lambda path, found: set(names) & set(found)))


def test_what_the_hub_refuses_is_said_with_a_remedy(hub, client, repo, checkpoint, tmp_path):
    names = shard_names(checkpoint)
    pickled = _without(checkpoint, tmp_path / "pickled", *names, "model.safetensors.index.json")
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add("tiny/gated", checkpoint, gated=True)
    hub.add("tiny/pickled", pickled)
    hub.add("tiny/lacking", _without(checkpoint, tmp_path / "lacking", names[3]))
    hub.add("tiny/no-config", _without(checkpoint, tmp_path / "no-config", "config.json"))
    cases: list[tuple[str, dict[str, Any], list[str]]] = [
        ("tiny/unknown", {}, ["no hub model is called 'tiny/unknown'", "check the spelling", "log in"]),
        ("tiny/gated", {}, ["tiny/gated is gated", "accept its terms", "token"]),
        (repo, {"revision": "v9"}, [repo, "has no revision 'v9'"]),
        ("tiny/pickled", {}, ["tiny/pickled holds no model.safetensors", "pytorch_model.bin", "pickled"]),
        ("tiny/lacking", {}, ["tiny/lacking lacks 1 of", names[3]]),
        ("tiny/no-config", {}, ["tiny/no-config has no config.json"]),
        ("broken/server", {}, ["broken/server could not be downloaded", "run the same command again"]),
        ("tiny/never-seen", {"offline": True}, ["there is no folder tiny/never-seen", "HF_HUB_OFFLINE"]),
        ("no/such/folder", {}, ["neither a folder nor a hub id"]),
    ]
    for model, arguments, texts in cases:
        answer = client.pack(model, home=tmp_path / "home", **arguments)
        assert answer["error"] == "SourceError", (model, answer)
        for text in texts:
            assert text in answer["text"], (model, answer)
    assert not list((tmp_path / "home").rglob("pack.json"))


def test_a_hub_that_is_gone_is_said(client, tmp_path):
    answer = client.pack("tiny/mixtral", home=tmp_path, endpoint="http://127.0.0.1:9")
    assert answer["error"] == "SourceError"
    assert "no folder is called 'tiny/mixtral', and the hub cannot be reached" in answer["text"]


def test_a_forecast_reads_headers_and_no_weights(hub, client, repo, checkpoint, tmp_path):
    client.send(repo, headers=True, home=tmp_path, token="hf_secret")
    answer = json.loads(client.process.stdout.readline())
    names = shard_names(checkpoint)
    header_bytes = [8 + int.from_bytes((checkpoint / name).read_bytes()[:8], "little") for name in names]
    assert answer["fetched_bytes"] == sum(header_bytes)
    assert answer["tensor_bytes"] == sum((checkpoint / name).stat().st_size for name in names) - sum(header_bytes)
    asked = {name: [] for name in names}
    for request in hub.gets():
        assert request.authorization == "Bearer hf_secret"
        asked[request.file].append(request.range)
    # Twice: the headers alone, and the shape made of them. The length, then the header, and never a byte of data.
    for name, size in zip(names, header_bytes, strict=True):
        assert asked[name] == 2 * ["bytes=0-7", f"bytes=8-{size - 1}"]
    assert {request.file for request in hub.requests if request.method == "GET"} - set(names) <= {
        "config.json",
        "model.safetensors.index.json",
    }
    assert not (tmp_path / "downloads").exists()
    manifest = read_manifest(pack_model(str(checkpoint), tmp_path / "expected"))
    assert answer["slot_bytes"] == [layer.slot_bytes for layer in manifest.layers]
    assert answer["dense_bytes"] == pytest.approx(manifest.dense_bytes, abs=1 << 20)
    assert (answer["revision"], answer["source_weights"]) == (commit_id(str(checkpoint)), "bf16")


def test_a_forecast_names_what_is_wrong_with_a_model(hub, client, checkpoint, tmp_path):
    hub.add("tiny/gated-plan", checkpoint, gated=True)
    hub.add("tiny/open-plan", checkpoint)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((checkpoint / "config.json").read_text())
    hub.add("tiny/no-weights", tmp_path / "empty")
    for model, command, text in (
        ("tiny/nobody", {}, "no folder and no hub model"),
        ("tiny/gated-plan", {}, "is gated"),
        ("tiny/open-plan", {"revision": "v9"}, "no revision 'v9'"),
        ("tiny/no-weights", {}, "lacks a file"),
    ):
        client.send(model, headers=True, home=tmp_path, **command)
        answer = json.loads(client.process.stdout.readline())
        assert answer["error"] == "SourceError"
        assert text in answer["text"]
