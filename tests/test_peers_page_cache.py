"""The page cache is dropped as far as it can be."""

from pathlib import Path

from peer_runs import page_cache
from peer_runs.page_cache import drop_page_cache


def test_page_cache_of_files_is_dropped_without_root(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    file = tmp_path / "weights"
    file.write_bytes(b"x" * 8192)
    dropped = []
    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(page_cache.os, "sync", lambda: None)
    monkeypatch.setattr(page_cache.os, "posix_fadvise", lambda *call: dropped.append(call[3]))
    drop_page_cache([file])
    assert dropped == [page_cache.os.POSIX_FADV_DONTNEED]
