"""Room to grow for transformers' own cache of keys and values, so that a token is written and nothing is copied.

The cache stays transformers': its layers hold views of the room, and whatever else changes them (a prompt, a crop, a
reordering) puts other tensors there, which are copied into a new room at the next token.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# A layer has room for at most so many tokens more than it holds.
SPARE_TOKENS = 64
_ROOM = "_moe_offload_room"


class KvRoom:
    """The buffers ``[1, kv heads, capacity, head_dim]`` behind one cache layer, which holds tokens [begin, end)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.begin, self.end = 0, keys.shape[2]
        self.keys, self.values = _with_room(keys), _with_room(values)
        self.keys_view, self.values_view = keys, values

    @property
    def is_full(self) -> bool:
        """Whether there is no place for another token."""
        return self.end == self.keys.shape[2]

    def append_to(self, layer: DynamicLayer) -> None:
        """A token was written at ``end``: the layer holds it too, and forgets one that left its window."""
        self.end += 1
        if isinstance(layer, DynamicSlidingWindowLayer):
            self.begin = max(0, self.end - layer.sliding_window + 1)
            layer.cumulative_length += 1
        layer.keys = self.keys_view = self.keys[:, :, self.begin : self.end]
        layer.values = self.values_view = self.values[:, :, self.begin : self.end]


def growing_layer(cache: Any, layer_idx: int) -> DynamicLayer | None:
    """The cache's layer if it is of a kind that room can be made in, and holds tokens of one sequence already."""
    if type(cache) is not DynamicCache or cache.offloading or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    if type(layer) is DynamicSlidingWindowLayer:
        # With a window of one token a layer would keep none; one that records its past keeps more than its window.
        if layer.record_past or layer.sliding_window < 2:
            return None
    elif type(layer) is not DynamicLayer:
        return None
    keys = layer.keys
    is_usable = layer.is_initialized and keys is not None and keys.dim() == 4 and keys.shape[0] == 1 and keys.shape[2]
    return layer if is_usable else None


def room_of(layer: DynamicLayer) -> KvRoom:
    """The layer's room, with place for a token; made anew where there is none, or the layer's tensors are others."""
    room: KvRoom | None = layer.__dict__.get(_ROOM)
    if room is None or room.is_full or layer.keys is not room.keys_view or layer.values is not room.values_view:
        room = layer.__dict__[_ROOM] = KvRoom(layer.keys, layer.values)
    return room


def _with_room(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of ``[1, heads, tokens, dim]`` with place for `SPARE_TOKENS` more."""
    _, heads, tokens, dim = tensor.shape
    room = tensor.new_empty(1, heads, tokens + SPARE_TOKENS, dim)
    room[:, :, :tokens] = tensor
    return room
