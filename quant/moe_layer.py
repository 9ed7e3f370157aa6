"""An MLP of packed experts in one call: all experts of a decode step that are there, or one expert for many rows."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_offload.quant import kernels
from moe_offload.quant.activation import Activation
from moe_offload.quant.base import Format
from moe_offload.quant.blocked import FEW_ROWS, BlockedFormat
from moe_offload.quant.expert_rows import ExpertRows
from moe_offload.quant.raw import RawFormat

PackedPart = tuple[Format, tuple[int, ...], Tensor]
"""A weight's format, its shape, and its packed bytes."""

_MAX_PIECES = 2


class _ExpertMlp(ctypes.Structure):
    _fields_ = (
        ("up", kernels.PackedWeight * _MAX_PIECES),
        ("down", kernels.PackedWeight),
        ("up_bias", ctypes.c_void_p),
        ("down_bias", ctypes.c_void_p),
        ("num_up", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
    )


class PackedMlp:
    """One expert's MLP, described once for all steps that find it in its slot; holds on to the memory."""

    __slots__ = ("_struct", "_takes_many", "_tensors", "address", "down_rows", "up_rows")

    def __init__(
        self,
        up: Sequence[PackedPart],
        down: PackedPart,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """``up``: the first product's weight, or two whose rows follow one another. For parts that are `supported`."""
        bias = up_bias if up_bias is not None else down_bias
        self._struct = _ExpertMlp(
            (kernels.PackedWeight * _MAX_PIECES)(*map(_described, up)),
            _described(down),
            None if up_bias is None else up_bias.data_ptr(),
            None if down_bias is None else down_bias.data_ptr(),
            len(up),
            0 if bias is None else kernels.DTYPES[bias.dtype],
        )
        self.up_rows = sum(shape[0] for _, shape, _ in up)
        self.down_rows = down[1][0]
        self._tensors = [*(packed for _, _, packed in (*up, down)), up_bias, down_bias]
        # torch takes weights that are held as they are without a detour
        self._takes_many = all(isinstance(fmt, BlockedFormat) for fmt, _, _ in (*up, down))
        self.address = ctypes.addressof(self._struct)

    def compute_rows(self, activation: Activation, x: Tensor, x_rows: Tensor, out: Tensor, out_rows: Tensor) -> None:
        """Rows ``out_rows`` of ``out [.., H]`` from rows ``x_rows`` of ``x [.., H]``, where `takes_rows`.

        The lists of rows are int64 ``[n]``; activations between the products are rounded to bf16, as are weights.
        """
        kernels.expert_many(activation.struct, self.address, x, x_rows.contiguous(), out, out_rows.contiguous())

    def takes_rows(self, x: Tensor, num_rows: int) -> bool:
        """Whether so many rows of ``x`` had better be computed by `compute_rows`."""
        if x.dtype != torch.bfloat16 or x.stride(1) != 1 or not self._takes_many:
            return False
        return num_rows > FEW_ROWS[x.dtype] and kernels.multiplies_many(x)

    @staticmethod
    def supported(
        activation: Activation,
        up: Sequence[PackedPart],
        down: Sequence[PackedPart],
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> bool:
        """Whether kernels were built, can read these parts, and the shapes are an MLP's from x's width to it."""
        parts, biases = [*up, *down], [bias for bias in (up_bias, down_bias) if bias is not None]
        if not (kernels.usable(*(packed for _, _, packed in parts), *biases) and len(down) == 1):
            return False
        if len(up) > _MAX_PIECES or not all(_is_described(part[0]) for part in parts):
            return False
        (_, (hidden, inner), _) = down[0]
        rows = sum(shape[0] for _, shape, _ in up)
        return (
            all(shape[1] == hidden for _, shape, _ in up)
            and rows == (inner if activation.gating == "none" else 2 * inner)
            and all(bias.dtype in kernels.DTYPES and bias.dtype == biases[0].dtype for bias in biases)
            and (up_bias is None or up_bias.shape == (rows,))
            and (down_bias is None or down_bias.shape == (hidden,))
        )


def _is_described(weight_format: Format) -> bool:
    return isinstance(weight_format, BlockedFormat | RawFormat) and weight_format.code is not None


def _described(part: PackedPart) -> kernels.PackedWeight:
    weight_format, shape, packed = part
    assert isinstance(weight_format, BlockedFormat | RawFormat)
    assert weight_format.code is not None
    return kernels.packed_weight(packed, weight_format.layout(shape), weight_format.code)


def expert_outputs(activation: Activation, x: Tensor, experts: Sequence[PackedMlp], outputs: Tensor) -> None:
    """Each expert's output for a token ``x [1, H]``, by one call into the rows of ``outputs``, fp32 ``[n, H]``."""
    tasks = [value for row, mlp in enumerate(experts) for value in (mlp.address, row)]
    x = x if x.is_contiguous() else x.contiguous()
    kernels.moe_layer(activation.struct, x, tasks, outputs, [], [], outputs)


class MoeStep:
    """One token's way through the experts of a layer, some of them at a time as their weights arrive.

    The experts' outputs are kept apart in fp32 until all are there, and then summed in router order; which experts
    were computed together changes no bit.
    """

    __slots__ = ("_activation", "_ahead", "_missing", "_order", "_outputs", "_weights", "_x", "result", "row_of")

    def __init__(self, activation: Activation, x: Tensor, order: Sequence[int], weights: Sequence[float]) -> None:
        """``x [1, H]``; ``order``: the experts in router order, which may name one twice, with their ``weights``."""
        self._activation, self._x = activation, x if x.is_contiguous() else x.contiguous()
        self._order, self._weights = order, weights
        self.row_of = {expert_idx: row for row, expert_idx in enumerate(dict.fromkeys(order))}
        self._ahead: dict[int, ExpertRows] = {}
        self._missing = len(self.row_of)
        self._outputs = torch.empty(self._missing, x.shape[1])
        self.result = torch.empty_like(self._x)
        """``[1, H]`` in the dtype of x, once every expert was computed."""

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether kernels were built and can take this ``x``."""
        return kernels.usable(x) and x.dtype in kernels.DTYPES

    @property
    def outputs(self) -> Tensor:
        """``fp32 [n, H]``: each expert's own, in the order in which they were first named, once it was computed."""
        return self._outputs

    def compute_ahead(self, expert_idx: int, mlp: PackedMlp, up_rows: int, down_rows: int) -> None:
        """The first rows of an expert whose others are not there yet; see `ExpertRows`. It counts when it is whole."""
        rows = self._ahead.get(expert_idx)
        if rows is None:
            out = self._outputs[self.row_of[expert_idx]]
            rows = self._ahead[expert_idx] = ExpertRows(self._activation, self._x, mlp, out)
        rows.advance(up_rows, down_rows)

    def forget_ahead(self, expert_idx: int) -> None:
        """What was computed of it so far is worth nothing: its bytes have changed."""
        self._ahead.pop(expert_idx, None)

    def compute(self, experts: Sequence[tuple[int, PackedMlp]]) -> None:
        """Some of the experts, each of which comes once."""
        row_of, begun = self.row_of, 0
        for expert_idx, _ in experts if self._ahead else ():
            if (rows := self._ahead.get(expert_idx)) is not None:
                rows.finish()
                begun += 1
        tasks = [
            value
            for expert_idx, mlp in experts
            if expert_idx not in self._ahead
            for value in (mlp.address, row_of[expert_idx])
        ]
        self._call(tasks, num_others=begun)

    def put(self, expert_idx: int, output: Tensor) -> None:
        """An expert's output ``[1, H]`` that was computed elsewhere."""
        self._outputs[self.row_of[expert_idx]] = output[0]
        self._call([], num_others=1)

    def _call(self, tasks: list[int], *, num_others: int = 0) -> None:
        self._missing -= num_others + len(tasks) // 2
        num_terms = 0 if self._missing else len(self._order)
        if not tasks and not num_terms:
            return
        rows = [self.row_of[expert_idx] for expert_idx in self._order] if num_terms else []
        kernels.moe_layer(self._activation.struct, self._x, tasks, self._outputs, rows, self._weights, self.result)
