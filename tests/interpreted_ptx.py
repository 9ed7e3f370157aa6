"""Carries out the PTX of kernels where Triton's interpreter runs them: the few instructions that they use.

A register is a numpy array with a number for each instance of the text. What differs between the lanes of a warp, a
table that is spread over them, is kept aside under a key, which goes about in its place; a shuffle looks it up.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype, _interpreter

LANES = np.arange(32, dtype=np.uint64)
Register = np.ndarray[Any, Any]


def interpret_ptx() -> None:
    """For all kernels that are interpreted from now on."""
    InterpreterBuilder.create_inline_asm = _create_inline_asm


@dataclass(frozen=True)
class _Results:
    handles: list[Any]

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def _create_inline_asm(
    builder: Any, text: str, constraints: str, values: list[Any], types: list[Any], is_pure: bool, pack: int
) -> _Results:
    shape = np.shape(values[0].data)
    assert is_pure
    assert all(np.shape(value.data) == shape for value in values)
    assert np.prod(shape, dtype=int) % pack == 0
    num_results = constraints.split(",").count("=f") + constraints.split(",").count("=r")
    inputs = [register for value in values for register in _registers(value, pack)]
    assert num_results == len(types) * pack, "results of 32 bits each"
    assert num_results + len(inputs) == len(constraints.split(","))
    registers: dict[str, Register] = {f"${num_results + i}": register for i, register in enumerate(inputs)}
    for line in re.sub(r"[{}]\s*$|^\s*{", "", text).split(";"):
        _step(line.strip(), registers)
    results = [registers[f"${i}"].astype(np.uint32) for i in range(num_results)]
    handles = []
    for i, dtype in enumerate(types):
        data = np.stack(np.broadcast_arrays(*results[i * pack : (i + 1) * pack]), axis=-1)
        handles.append(TensorHandle(data.view(_get_np_dtype(dtype.scalar)).reshape(shape), dtype.scalar))
    return _Results(handles)


def _registers(value: Any, pack: int) -> list[Register]:
    """An operand of ``pack`` elements: numbers of 8 bits share a register."""
    data = np.ascontiguousarray(value.data)
    if data.itemsize == 1:
        return [data.reshape(-1, pack).view(f"u{pack}")[:, 0].astype(np.uint64)]
    unsigned = data.reshape(-1, pack).view(f"u{data.itemsize}").astype(np.uint64)
    return [unsigned[:, i] for i in range(pack)]


def _step(line: str, registers: dict[str, Register]) -> None:
    if not line or line.startswith(".reg"):
        return
    opcode, operands = line.split(None, 1)
    if opcode == "ld.global.nc.v4.b32":
        targets, place = re.fullmatch(r"\{(.*)\}, \[(.*)\]", operands).groups()
        assert not (registers[place] % 16).any(), "misaligned"
        for i, target in enumerate(targets.split(", ")):
            registers[target] = _load(registers[place] + 4 * i)
        return
    if opcode == "mov.b32":
        low, high, source = re.fullmatch(r"\{(.*), (.*)\}, (.*)", operands).groups()
        registers[low], registers[high] = registers[source] & np.uint64(0xFFFF), registers[source] >> np.uint64(16)
        return
    target, *sources = operands.replace("[", "").replace("]", "").split(", ")
    numbers = [registers[name] if name in registers else _immediate(name) for name in sources]
    registers[target] = _INSTRUCTIONS[opcode](*numbers)


def _immediate(name: str) -> Register:
    return LANES if name == "%laneid" else np.uint64(int(name, 0))


def _load(places: Register, dtype: Any = np.uint32) -> Register:
    assert not (places % np.dtype(dtype).itemsize).any(), "misaligned"
    mask, other = np.ones(places.shape, dtype=bool), np.zeros(places.shape, dtype=dtype)
    loaded = _interpreter.load(np.ascontiguousarray(places), mask, other, np.dtype(dtype)).astype(np.uint64)
    return _keep(loaded) if dtype == np.uint32 and places.shape == LANES.shape else loaded


_spread: dict[int, Register] = {}
_keys = itertools.count(1)


def _keep(lanes: Register) -> Register:
    """A key for what the lanes hold, which the same table has each time."""
    key = next((key for key, known in _spread.items() if np.array_equal(known, lanes)), None) or next(_keys)
    _spread[key] = lanes
    return np.array([key], dtype=np.uint64)


def _shuffle(values: Register, lane: Register, bounds: Register, mask: Register) -> Register:
    """``shfl.sync.idx``: ``bounds`` has the clamp in its low five bits and the mask of segments in bits 8 to 12."""
    assert mask == 0xFFFFFFFF
    (key,) = set(values.tolist())
    segment, clamp = (bounds >> np.uint64(8)) & np.uint64(31), bounds & np.uint64(31)
    results = []
    for own in (np.uint64(0), np.uint64(31)):
        first, last = own & segment, (own & segment) | (clamp & ~segment)
        source = first | (lane & np.uint64(31) & ~segment)
        assert (source <= last).all(), "a lane beyond the clamp gets its own value"
        results.append(_spread[key][source.astype(int)])
    assert np.array_equal(*results), "the same code must give all lanes the same number"
    return results[0]


def _permute(low: Register, high: Register, selectors: Register) -> Register:
    """``prmt``: of eight bytes the one that a selector's low three bits name; the fourth asks for its sign alone."""
    both, result = low & np.uint64(0xFFFFFFFF) | high << np.uint64(32), np.uint64(0)
    for i in range(4):
        selector = (selectors >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> (8 * (selector & np.uint64(7)))) & np.uint64(255)
        byte = np.where(selector & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        result = result | byte << np.uint64(8 * i)
    return result


def _half_to_float(half: Register) -> Register:
    return half.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32).astype(np.uint64)


_INSTRUCTIONS: dict[str, Callable[..., Register]] = {
    "mov.u32": lambda source: source,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, bits: (a & np.uint64(0xFFFFFFFF)) >> bits,
    "mad.wide.u32": lambda a, b, c: a * b + c,
    "ld.global.b32": _load,
    "ld.global.nc.b32": _load,
    "ld.global.u8": lambda places: _load(places, np.uint8),
    "shfl.sync.idx.b32": _shuffle,
    "prmt.b32": _permute,
    "cvt.f32.f16": _half_to_float,
}
