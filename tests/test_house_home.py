"""Where the cache folder is, for each way of saying it."""

from pathlib import Path

import pytest

from moe_offload.offload.home import home_dir, packs_dir


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("MOE_OFFLOAD_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_defaults_to_the_users_cache(environment: Path):
    assert home_dir() == environment / ".cache" / "moe-offload"
    assert packs_dir() == environment / ".cache" / "moe-offload" / "packs"


@pytest.mark.parametrize(("xdg", "counts"), [("/somewhere/else", True), ("not/absolute", False), ("", False)])
def test_xdg_cache_home_counts_if_absolute(environment: Path, monkeypatch: pytest.MonkeyPatch, xdg: str, counts: bool):
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert home_dir() == (Path(xdg) if counts else environment / ".cache") / "moe-offload"


@pytest.mark.parametrize(
    ("own", "expected"), [("/mnt/fast", Path("/mnt/fast")), ("~/packs-here", None), ("relative", None), ("", None)]
)
def test_own_variable_wins(environment: Path, monkeypatch: pytest.MonkeyPatch, own: str, expected: Path | None):
    monkeypatch.setenv("XDG_CACHE_HOME", "/never")
    monkeypatch.setenv("MOE_OFFLOAD_HOME", own)
    fallback = {
        "~/packs-here": environment / "packs-here",
        "relative": Path.cwd() / "relative",
        "": Path("/never/moe-offload"),
    }
    assert home_dir() == (expected or fallback[own])
