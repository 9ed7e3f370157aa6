"""How the demo's pack comes about and is kept, with stand-ins for the two slow steps."""

import shutil
import threading
from collections import Counter, namedtuple
from pathlib import Path

import pytest

from moe_offload.errors import ConfigError, DiskFullError
from moe_offload.offload.demo import build as demo
from moe_offload.offload.pack.manifest import is_pack


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

    def pack(model: str, output: Path, *, format: str, progress: object) -> Path:
        assert Path(model, "config.json").is_file()
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
    threads = [threading.Thread(target=lambda: folders.append(demo.ensure_demo())) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    may_end.set()
    for thread in threads:
        thread.join(30)
    assert folders == [home / "packs" / demo.PACK_NAME] * 2
    assert steps == {"build": 1, f"pack {demo.FORMAT}": 1}


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
