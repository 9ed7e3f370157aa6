"""Checkpoints that are already quantised: which keys belong together, their values, and their own bits.

A codec makes a quantised tensor look like the plain one it stands for. ``decode`` gives its values; ``encode_exactly``
gives the same bits in one of our formats, for packs that keep a checkpoint's own numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moe_offload.errors import UnsupportedQuantizationError
from moe_offload.offload.shards import Shards
from moe_offload.quant import imported


@dataclass(frozen=True)
class Packed:
    """A weight ``[out, in]`` in one of our formats."""

    format: str
    shape: tuple[int, int]
    data: torch.Tensor


class Codec(Protocol):
    """How one quantisation method lays out a tensor over several keys."""

    def plain_key(self, key: str) -> str:
        """The name of the plain tensor that ``key`` is a part of (itself, if it is no part)."""

    def members(self, key: str) -> list[str]:
        """The keys in the checkpoint that make up the plain tensor ``key``; empty if it is stored plainly."""

    def decode(self, key: str, rows: slice | None) -> torch.Tensor:
        """The values of the plain tensor, or of some leading rows of it."""

    def encode_exactly(self, key: str, row: int | None) -> Packed | None:
        """The same bits in our format (of expert ``row`` of a fused tensor), or None where none holds them."""


class Fp8Codec:
    """Block FP8 as in DeepSeek-V3: ``X.weight`` in float8_e4m3fn, ``X.weight_scale_inv [ceil(N/bn), ceil(K/bk)]``."""

    SUFFIX = "_scale_inv"

    def __init__(self, shards: Shards, settings: Mapping[str, Any]) -> None:
        block = settings.get("weight_block_size") or (0, 0)
        self._block = (int(block[0]), int(block[1]))
        self._shards = shards

    def plain_key(self, key: str) -> str:
        """``X.weight_scale_inv`` belongs to ``X.weight``."""
        plain = key.removesuffix(self.SUFFIX)
        return plain if plain in self._shards.shard_of else key

    def members(self, key: str) -> list[str]:
        """The weight and its scales."""
        return [key, key + self.SUFFIX] if key + self.SUFFIX in self._shards.shard_of else []

    def _parts(self, key: str) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        codes, scales = self._shards.read(key), self._shards.read(key + self.SUFFIX)
        if codes.dim() != 2 or codes.dtype != torch.float8_e4m3fn:
            raise UnsupportedQuantizationError(
                f"{key} is {codes.dtype} with {codes.dim()} dimensions: only 2-D float8_e4m3fn blocks are read"
            )
        block = self._block if self._block[0] else (codes.shape[0], codes.shape[1])
        return codes, scales.float().reshape(-(-codes.shape[0] // block[0]), -(-codes.shape[1] // block[1])), block

    def decode(self, key: str, rows: slice | None) -> torch.Tensor:
        """Code times its block's scale, in fp32, rounded to bf16 as transformers does."""
        codes, scales, (block_rows, block_columns) = self._parts(key)
        full = scales.repeat_interleave(block_rows, 0)[: codes.shape[0]]
        full = full.repeat_interleave(block_columns, 1)[:, : codes.shape[1]]
        values = (codes.float() * full).to(torch.bfloat16)
        return values if rows is None else values[rows]

    def encode_exactly(self, key: str, row: int | None) -> Packed | None:
        """Codes and scales as they are."""
        if row is not None:
            return None
        codes, scales, block = self._parts(key)
        spec, data = imported.import_fp8(codes, scales, block)
        return Packed(spec, (codes.shape[0], codes.shape[1]), data)


class Mxfp4Codec:
    """MXFP4 as in gpt-oss: ``X_blocks [E, N, K/32, 16]`` and ``X_scales [E, N, K/32]`` for a plain ``X [E, K, N]``."""

    def __init__(self, shards: Shards, settings: Mapping[str, Any]) -> None:
        self._shards = shards

    def plain_key(self, key: str) -> str:
        """``X_blocks`` and ``X_scales`` belong to ``X``."""
        for suffix in ("_blocks", "_scales"):
            plain = key.removesuffix(suffix)
            if plain != key and plain + "_blocks" in self._shards.shard_of:
                return plain
        return key

    def members(self, key: str) -> list[str]:
        """Blocks and scales."""
        return [key + "_blocks", key + "_scales"] if key + "_blocks" in self._shards.shard_of else []

    def decode(self, key: str, rows: slice | None) -> torch.Tensor:
        """transformers' own conversion, to bf16, transposed as its model holds the experts."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks, scales = (self._shards.read(member, rows) for member in self.members(key))
        values: torch.Tensor = convert_moe_packed_tensors(blocks, scales)
        return values

    def encode_exactly(self, key: str, row: int | None) -> Packed | None:
        """Blocks and scales of one expert, as they are."""
        if row is None:
            return None
        blocks, scales = (self._shards.read(member, slice(row, row + 1))[0] for member in self.members(key))
        spec, data = imported.import_mxfp4(blocks, scales)
        return Packed(spec, (blocks.shape[0], blocks.shape[1] * 32), data)


class Bnb4Codec:
    """bitsandbytes 4-bit: ``X.weight`` packed, and beside it ``X.weight.absmax``, ``X.weight.quant_state...`` and others."""

    MARKS = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")

    def __init__(self, shards: Shards, settings: Mapping[str, Any]) -> None:
        self._shards = shards
        self._members: dict[str, list[str]] = {}
        for key in shards.shard_of:
            for mark in self.MARKS:
                if key.endswith(mark):
                    self._members[key.removesuffix(mark)] = []
        for key in shards.shard_of:
            plain = self.plain_key(key)
            if plain in self._members:
                self._members[plain].append(key)

    def plain_key(self, key: str) -> str:
        """``X.weight.anything`` belongs to ``X.weight``."""
        head, mark, _ = key.partition(".weight.")
        return head + ".weight" if mark and head + ".weight" in self._members else key

    def members(self, key: str) -> list[str]:
        """The packed weight and its statistics."""
        return self._members.get(key, [])

    def _state(self, key: str) -> Any:
        from bitsandbytes.functional import QuantState

        statistics = {member: self._shards.read(member) for member in self.members(key) if member != key}
        return QuantState.from_dict(statistics, device=torch.device("cpu"))

    def decode(self, key: str, rows: slice | None) -> torch.Tensor:
        """bitsandbytes' own dequantisation, in the dtype its state names."""
        from bitsandbytes.functional import dequantize_4bit

        values: torch.Tensor = dequantize_4bit(self._shards.read(key), self._state(key))
        return values if rows is None else values[rows]

    def encode_exactly(self, key: str, row: int | None) -> Packed | None:
        """The same codes with fp32 scales (a doubly quantised absmax is expanded, which loses nothing)."""
        from bitsandbytes.functional import dequantize_blockwise

        state = self._state(key)
        if row is not None or len(state.shape) != 2 or state.shape[1] % state.blocksize:
            return None
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        shape = (int(state.shape[0]), int(state.shape[1]))
        spec, data = imported.import_bnb4(
            self._shards.read(key).reshape(-1), absmax.float(), state.blocksize, state.quant_type, shape
        )
        return Packed(spec, shape, data)


_CODECS: dict[str, type[Fp8Codec] | type[Mxfp4Codec] | type[Bnb4Codec]] = {
    "fp8": Fp8Codec,
    "mxfp4": Mxfp4Codec,
    "bitsandbytes": Bnb4Codec,
}


def codec_for(shards: Shards, settings: Mapping[str, Any] | None) -> Codec | None:
    """The codec of a config's ``quantization_config``; `UnsupportedQuantizationError` for a method not read here."""
    if not settings:
        return None
    method = str(settings.get("quant_method", "bitsandbytes" if settings.get("load_in_4bit") else "unknown"))
    if method in _CODECS and not settings.get("load_in_8bit"):
        return _CODECS[method](shards, settings)
    raise UnsupportedQuantizationError(
        f"the checkpoint is quantised with {method}{' 8-bit' if settings.get('load_in_8bit') else ''}, which is not "
        f"read here (read are: {', '.join(_CODECS)}); use the unquantised checkpoint it was made from"
    )
