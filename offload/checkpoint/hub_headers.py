"""The headers of a hub model's shards, by HTTP range requests: a few hundred kilobytes of a hundred gigabytes.

A shard in the user's hub cache is read there. Of any other two ranges are asked for: the eight bytes that hold the
header's length, and the header (https://huggingface.co/docs/safetensors/metadata_parsing).
"""

import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

from moe_offload.errors import SourceError
from moe_offload.offload.checkpoint.headers import CheckpointHeaders, file_header
from moe_offload.offload.checkpoint.hub import asking
from moe_offload.offload.checkpoint.hub_download import silent_bar
from moe_offload.offload.checkpoint.shard_file import MAX_HEADER_BYTES, TensorEntry, parse_header
from moe_offload.offload.checkpoint.shards import INDEX_FILE, SINGLE_FILE, read_index

_AT_ONCE = 8
_LENGTH_BYTES = 8
_TIMEOUT_S = 30.0
_PARTIAL_CONTENT = 206


def hub_headers(name: str, *, revision: str | None, token: str | None) -> CheckpointHeaders:
    """Config and headers of the model ``name``; `SourceError` says what went wrong and what to do."""

    def small_file(file: str) -> Path:
        bar = silent_bar()
        return Path(hf_hub_download(name, file, revision=revision, token=token, tqdm_class=bar))

    config = asking(name, revision, lambda: small_file("config.json"))
    commit = config.parent.name
    index = asking(name, revision, lambda: _or_none(lambda: small_file(INDEX_FILE)))
    names = [SINGLE_FILE] if index is None else read_index(index)[0]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(lambda shard: _shard_header(name, shard, commit, token), names))
    shards: Mapping[str, Mapping[str, TensorEntry]] = dict(zip(names, (entries for entries, _ in answers), strict=True))
    return CheckpointHeaders(name, commit, config.parent, shards, sum(num_bytes for _, num_bytes in answers))


def _or_none(download: Callable[[], Path]) -> Path | None:
    """A file that a repository need not have; one that is merely not in the cache of an offline machine is missed."""
    try:
        return download()
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _shard_header(name: str, shard: str, commit: str, token: str | None) -> tuple[Mapping[str, TensorEntry], int]:
    """The tensors of one shard, and the bytes that were asked for to know them."""
    cached = try_to_load_from_cache(name, shard, revision=commit)
    if isinstance(cached, str):
        return file_header(Path(cached)), 0

    def ask() -> tuple[Mapping[str, TensorEntry], int]:
        url = hf_hub_url(name, shard, revision=commit)
        (header_bytes,) = struct.unpack("<Q", _range(url, 0, _LENGTH_BYTES, token))
        if not 2 <= header_bytes <= MAX_HEADER_BYTES:
            raise SourceError(f"{name}/{shard} is not a safetensors file: its header would have {header_bytes} bytes")
        header = _range(url, _LENGTH_BYTES, header_bytes, token)
        return parse_header(header, f"{name}/{shard}"), _LENGTH_BYTES + header_bytes

    return asking(f"{name}/{shard}", commit, ask)


def _range(url: str, offset_bytes: int, num_bytes: int, token: str | None) -> bytes:
    """So many bytes of a file from an offset on; a server that sends all of it is cut off."""
    headers = build_hf_headers(token=token) | {
        "Range": f"bytes={offset_bytes}-{offset_bytes + num_bytes - 1}",
        "Accept-Encoding": "identity",  # a range of a compressed answer would be no range of the file
    }
    received = bytearray()
    with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        skipped_bytes = 0 if response.status_code == _PARTIAL_CONTENT else offset_bytes
        for piece in response.iter_bytes():
            received += piece
            if len(received) >= skipped_bytes + num_bytes:
                break
    wanted = bytes(received[skipped_bytes : skipped_bytes + num_bytes])
    if len(wanted) < num_bytes:
        raise SourceError(f"{url} ended after {len(received)} bytes; the file is truncated, or the connection was cut")
    return wanted
