"""How the demo's pack comes about and is kept, with stand-ins for the two slow steps."""

import shutil
import threading
from collections import Counter, namedtuple
from pathlib import Path

import pytest
import torch

from moe_offload.errors import ConfigError, DiskFullError
from moe_offload.offload.demo import build as demo
from moe_offload.offload.pack.manifest import is_pack
from moe_offload.offload.progress import NULL_PROGRESS


class Announcements:
    """A progress sink that remembers what began."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.begun = threading.Event()

    def start(self, label: str, total_bytes: int | None) -> None:
        self.labels.append(label)
        self.begun.set()

    def advance(self, num_bytes: int) -> None: ...

    def finish(self) -> None: ...


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MOE_OFFLOAD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the steps that were taken."""
    taken: Counter[str] = Counter()

    def build(folder: Path, *, progress: object) -> None:
        taken["build"] += 1
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    def pack(model: str, output: Path, *, name: str, format: str, progress: object) -> Path:
        assert Path(model, "config.json").is_file()
        assert name == "demo: SmolLM2-135M-Instruct upcycled to 8 experts"
        taken[f"pack {format}"] += 1
        output.mkdir()
        (output / "pack.json").write_text("{}")
        return output

    monkeypatch.setattr(demo, "build_demo_checkpoint", build)
    monkeypatch.setattr(demo, "pack_model", pack)
    return taken


def test_first_use_builds_and_later_ones_do_not(home: Path, steps: Counter[str]):
    folder = demo.ensure_demo()
    assert folder == home / "packs" / demo.PACK_NAME
    assert is_pack(folder)
    assert demo.ensure_demo() == folder
    assert steps == {"build": 1, f"pack {demo.FORMAT}": 1}
    assert {path.name for path in home.iterdir()} == {"packs", "demo.lock"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_leaves_nothing(home, steps, monkeypatch, error):
    def interrupted(model: str, output: Path, **_: object) -> Path:
        output.mkdir()
        (output / "pack.json").write_text("{}")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(demo, "pack_model", interrupted)
        with pytest.raises(error):
            demo.ensure_demo()
    assert not list((home / "packs").iterdir())
    assert not (home / "demo.partial").exists()
    assert is_pack(demo.ensure_demo())


def test_what_a_killed_build_left_is_removed(home: Path, steps: Counter[str]):
    left = home / "demo.partial" / demo.CHECKPOINT_NAME
    left.mkdir(parents=True)
    (left / "model-00001-of-00031.safetensors").write_text("half")
    (home / "packs" / demo.PACK_NAME).mkdir(parents=True)
    assert is_pack(demo.ensure_demo())
    assert not (home / "demo.partial").exists()


def test_of_two_builds_at_once_the_second_waits(home: Path, steps: Counter[str], monkeypatch: pytest.MonkeyPatch):
    begun, may_end = threading.Event(), threading.Event()
    build = demo.build_demo_checkpoint

    def slow(folder: Path, *, progress: object) -> None:
        begun.set()
        assert may_end.wait(30)
        build(folder, progress=progress)

    monkeypatch.setattr(demo, "build_demo_checkpoint", slow)
    folders: list[Path] = []
    waiting = Announcements()
    threads = [
        threading.Thread(target=lambda progress=progress: folders.append(demo.ensure_demo(progress)))
        for progress in (NULL_PROGRESS, waiting)
    ]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    assert waiting.begun.wait(30)
    may_end.set()
    for thread in threads:
        thread.join(30)
    assert folders == [home / "packs" / demo.PACK_NAME] * 2
    assert steps == {"build": 1, f"pack {demo.FORMAT}": 1}
    assert waiting.labels == ["Waiting for another process that builds the demo"]


@pytest.mark.parametrize(
    ("device", "has_gpu", "expected"),
    [
        ("auto", False, {"ram": demo.DEMO_RAM}),
        ("auto", True, {"vram": demo.DEMO_VRAM}),
        ("cpu", True, {"ram": demo.DEMO_RAM}),
        ("cuda:1", True, {"vram": demo.DEMO_VRAM}),
    ],
)
def test_the_memory_that_is_scarce_is_the_one_that_computes(monkeypatch, device, has_gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert demo.demo_budget(device) == expected


def test_a_full_disk_is_told_before_anything_is_built(home, steps, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 10**10 - 10**9, 10**9))
    with pytest.raises(DiskFullError, match="MOE_OFFLOAD_HOME"):
        demo.ensure_demo()
    assert not steps


def test_missing_weights_are_told_before_anything_is_made(home, steps, monkeypatch):
    def missing() -> Path:
        raise ConfigError("not installed")

    monkeypatch.setattr(demo, "find_weights", missing)
    with pytest.raises(ConfigError, match="not installed"):
        demo.ensure_demo()
    assert not home.exists()
