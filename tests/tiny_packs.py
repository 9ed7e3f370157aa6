"""Packs of a few kilobytes with known bytes."""

import random
from pathlib import Path

from moe_offload.offload.pack.manifest import LayerLayout, PackManifest
from moe_offload.offload.pack.writer import PackWriter

IDENTITY = {"source": "tiny", "revision": "r1", "expert_format": "int8"}


def layout(layer_idx: int, num_experts: int = 4, slot_bytes: int = 8192) -> LayerLayout:
    part = ("weight", (slot_bytes // 64, 32), "int8", slot_bytes - 4096 + 64)
    return LayerLayout.of(f"model.layers.{layer_idx}.mlp.experts", num_experts, [part])


def expert_bytes(layer_idx: int, expert_idx: int, slot_bytes: int = 8192) -> bytes:
    return random.Random(layer_idx * 1000 + expert_idx).randbytes(slot_bytes)


def write_layer(writer: PackWriter, layer_idx: int, num_experts: int = 4, slot_bytes: int = 8192) -> None:
    with writer.layer(layer_idx, layout(layer_idx, num_experts, slot_bytes)) as layer:
        for expert_idx in range(num_experts):
            layer.write_expert(expert_idx, expert_bytes(layer_idx, expert_idx, slot_bytes))


def finish(writer: PackWriter) -> PackManifest:
    return writer.finish(source="tiny", revision="r1", expert_format="int8", dense_format="source")


def write_pack(folder: Path, num_layers: int = 2, num_experts: int = 4, slot_bytes: int = 8192) -> PackManifest:
    with PackWriter(folder, identity=IDENTITY) as writer:
        for layer_idx in range(num_layers):
            write_layer(writer, layer_idx, num_experts, slot_bytes)
        writer.dense_file("dense-00000.safetensors", [("norm", "F32", (4,), bytes(16))])
        return finish(writer)


def resume_pack(folder: str) -> None:
    """What a child does that is killed: six layers and a dense file, those that are not there yet."""
    print("begun", flush=True)
    with PackWriter(folder, identity=IDENTITY) as writer:
        for layer_idx in sorted(set(range(6)) - writer.done_layers()):
            write_layer(writer, layer_idx, num_experts=8)
        if not writer.done_dense():
            writer.dense_file("dense-00000.safetensors", [("norm", "F32", (4,), bytes(16))])
        finish(writer)
