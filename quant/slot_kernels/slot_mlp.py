"""Where the weights of an expert's MLP lie in its slot, the same for all slots of a slab."""

from dataclasses import dataclass

from torch import Tensor

from moe_offload.errors import FormatError
from moe_offload.quant.activation import Activation
from moe_offload.quant.base import Format
from moe_offload.quant.raw import RawFormat


@dataclass(frozen=True)
class SlotPart:
    """One weight: a matrix [N, K] in any format, or a raw vector."""

    format: Format
    shape: tuple[int, ...]
    offset_bytes: int

    def packed(self, slot: Tensor) -> Tensor:
        """Its packed bytes, a view of those of a slot."""
        return slot[self.offset_bytes : self.offset_bytes + self.format.nbytes(self.shape)]

    def vector(self, slot: Tensor) -> Tensor:
        """A raw part as the numbers that it is, a view."""
        assert isinstance(self.format, RawFormat)
        return self.format.view(self.packed(slot), self.shape)


@dataclass(frozen=True)
class SlotMlp:
    """``down @ activation(up @ x + up_bias) + down_bias``; the rows of ``up`` are its pieces', one after another.

    ``FormatError`` if the shapes do not fit together. Hashable, since kernels are built once for each.
    """

    up: tuple[SlotPart, ...]
    down: SlotPart
    activation: Activation
    up_bias: SlotPart | None = None
    down_bias: SlotPart | None = None

    def __post_init__(self) -> None:
        shapes = [part.shape for part in (*self.up, self.down)]
        num_rows = sum(shape[0] for shape in shapes[:-1])
        inner_rows = self.inner_size if self.activation.gating == "none" else 2 * self.inner_size
        if (
            any(len(shape) != 2 for shape in shapes)
            or any(shape[1] != self.input_size for shape in shapes[:-1])
            or num_rows != inner_rows
            or (self.up_bias is not None and self.up_bias.shape != (num_rows,))
            or (self.down_bias is not None and self.down_bias.shape != (self.output_size,))
            or not all(bias is None or bias.format.is_raw for bias in (self.up_bias, self.down_bias))
        ):
            raise FormatError(
                f"weights {', '.join(map(str, shapes))} with gating {self.activation.gating!r} and biases "
                f"{self.up_bias and self.up_bias.shape}, {self.down_bias and self.down_bias.shape} are no MLP"
            )

    @property
    def input_size(self) -> int:
        return self.up[0].shape[1]

    @property
    def inner_size(self) -> int:
        return self.down.shape[1]

    @property
    def output_size(self) -> int:
        return self.down.shape[0]
