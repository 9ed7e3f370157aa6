"""Checkpoints that are already quantised: which keys belong together, their values, and their own bits.

A codec makes a quantised tensor look like the plain one it stands for. ``decode`` gives its values; ``encode_exactly``
gives the same bits in one of our formats, for packs that keep a checkpoint's own numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moe_offload.errors import SourceError, UnsupportedQuantizationError
from moe_offload.offload.checkpoint.shards import Shards
from moe_offload.quant import get_format, imported


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

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that `decode` gives."""

    def encode_exactly(self, key: str, row: int | None, *, transposed: bool) -> Packed | None:
        """The same bits in our format (of expert ``row`` of a fused tensor), or None where none holds them.

        ``transposed``: the plain tensor is ``[in, out]``; what is returned is always ``[out, in]``.
        """


class Fp8Codec:
    """Block FP8 as in DeepSeek-V3: ``X.weight`` in float8_e4m3fn, ``X.weight_scale_inv [ceil(N/bn), ceil(K/bk)]``.

    Scales are floats of any width, or e8m0 exponents as bytes (MXFP8); DeepSeek-V4 calls them ``X.scale`` and holds
    its experts as MXFP4, two codes to an int8. A tensor with all experts of a layer, and its scales, have a leading
    dimension more.
    """

    def __init__(self, shards: Shards, settings: Mapping[str, Any]) -> None:
        self._block = tuple(int(size) for size in settings.get("weight_block_size") or ())
        self._shards = shards
        self._scale_of: dict[str, str] = {}
        for key in shards.shard_of:
            plain = key.removesuffix("_scale_inv")
            if plain == key and key.endswith(".scale"):
                plain = key.removesuffix("scale") + "weight"
            if plain != key and plain in shards.shard_of:
                self._scale_of[plain] = key
        self._plain_of = {scale: plain for plain, scale in self._scale_of.items()}

    def plain_key(self, key: str) -> str:
        """The scales belong to their weight."""
        return self._plain_of.get(key, key)

    def members(self, key: str) -> list[str]:
        """The weight and its scales."""
        return [key, self._scale_of[key]] if key in self._scale_of else []

    def dtype(self, key: str) -> torch.dtype:
        """What transformers rounds to unless it is told otherwise."""
        return torch.bfloat16

    def _parts(self, key: str, rows: slice | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[..., N, K]`` and their scales; of some experts, if the tensor holds several."""
        codes, scales = self._shards.entry(key), self._shards.entry(self._scale_of[key])
        if codes.dtype not in (torch.float8_e4m3fn, torch.int8) or len(codes.shape) not in (2, 3):
            raise UnsupportedQuantizationError(
                f"{key} is {codes.dtype} {list(codes.shape)}: fp8 checkpoints are read where their weights are "
                f"matrices of float8_e4m3fn, or of int8 that hold MXFP4"
            )
        values = self._shards.read(key, rows if len(codes.shape) == 3 else None)
        scale_values = self._shards.read(self._scale_of[key], rows if len(scales.shape) == 3 else None)
        if scale_values.dtype == torch.uint8:
            scale_values = scale_values.view(torch.float8_e8m0fnu)
        return values, scale_values

    def _packed(self, key: str, codes: torch.Tensor, scales: torch.Tensor) -> Packed:
        """One matrix in our format."""
        grid = (int(scales.shape[0]), int(scales.shape[1])) if scales.dim() == 2 else (1, 1)
        num_rows, num_columns = codes.shape
        if codes.dtype == torch.int8:
            if scales.dtype != torch.float8_e8m0fnu or grid != (num_rows, num_columns // 16):
                raise UnsupportedQuantizationError(f"{key} has 4-bit codes with {scales.dtype} {list(grid)} scales")
            blocks = codes.view(torch.uint8).reshape(num_rows, -1, 16)
            spec, data = imported.import_mxfp4(blocks, scales.view(torch.uint8))
            return Packed(spec, (num_rows, 2 * num_columns), data)
        spec, data = imported.import_fp8(
            codes, scales.reshape(grid), self._block_of(key, (num_rows, num_columns), grid)
        )
        return Packed(spec, (num_rows, num_columns), data)

    def _block_of(self, key: str, shape: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        """The configured block if the grid of scales fits it, else the one that divides the weight evenly."""
        even = (shape[0] // max(grid[0], 1), shape[1] // max(grid[1], 1))
        for block in (self._block, even):
            if len(block) == 2 and min(block) > 0:
                rows, columns = block
                if grid == (-(-shape[0] // rows), -(-shape[1] // columns)):
                    return rows, columns
        raise SourceError(
            f"{key} is {list(shape)} with {list(grid)} scales: they fit neither the configured block "
            f"{list(self._block)} nor an even one"
        )

    def decode(self, key: str, rows: slice | None) -> torch.Tensor:
        """Code times its block's scale, in fp32, rounded to bf16 as transformers does."""
        codes, scales = self._parts(key, rows)
        if codes.dim() == 3:
            stacked = scales if scales.dim() > 1 else scales[:, None]
            return torch.stack([self._decoded(key, *pair) for pair in zip(codes, stacked, strict=True)])
        values = self._decoded(key, codes, scales)
        return values if rows is None else values[rows]

    def _decoded(self, key: str, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        packed = self._packed(key, codes, scales)
        return get_format(packed.format).dequantize(packed.data, packed.shape, torch.bfloat16)

    def encode_exactly(self, key: str, row: int | None, *, transposed: bool) -> Packed | None:
        """Codes and scales as they are."""
        codes, scales = self._parts(key, None if row is None else slice(row, row + 1))
        if transposed or (row is None) != (codes.dim() == 2):
            return None
        if row is not None:
            codes, scales = codes[0], scales[0]
        return self._packed(key, codes, scales)


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

    def dtype(self, key: str) -> torch.dtype:
        """That of transformers' conversion."""
        return torch.bfloat16

    def encode_exactly(self, key: str, row: int | None, *, transposed: bool) -> Packed | None:
        """Blocks and scales of one expert, as they are."""
        if row is None or not transposed:
            return None
        blocks, scales = (self._shards.read(member, slice(row, row + 1))[0] for member in self.members(key))
        spec, data = imported.import_mxfp4(blocks, scales)
        return Packed(spec, (blocks.shape[0], blocks.shape[1] * 32), data)


class Bnb4Codec:
    """bitsandbytes 4-bit: ``X.weight`` packed, and beside it ``X.weight.absmax``, ``X.weight.quant_state...``."""

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

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that was quantised."""
        dtype: torch.dtype = self._state(key).dtype
        return dtype

    def encode_exactly(self, key: str, row: int | None, *, transposed: bool) -> Packed | None:
        """The same codes with fp32 scales (a doubly quantised absmax is expanded, which loses nothing)."""
        from bitsandbytes.functional import dequantize_blockwise

        state = self._state(key)
        if row is not None or transposed or len(state.shape) != 2 or state.shape[1] % state.blocksize:
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
    "mxfp8": Fp8Codec,
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
