"""The worked example of ``docs/pack-format.md``, read by code that shares nothing with the package."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open

from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.pack.safetensors_file import check_dense_file
from moe_offload.offload.pack.writer import LayerLayout, PackWriter
from moe_offload.quant import get_format

DOC = (Path(__file__).parent.parent / "docs" / "pack-format.md").read_text()
EXAMPLE = DOC[DOC.index("## Worked example") :]
# From the paper, to four places: enough to tell the codes apart.
NF4 = [
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
]
UP_PROJ = [
    [[NF4[k // 4] * 1.0 for k in range(64)], [NF4[15 - k // 4] * 0.5 for k in range(64)]],
    [[0.0] * 64, [-4.0] * 64],
]
BIAS = [[1.5, -2.0], [0.0, 0.25]]


def blocks():
    return re.findall(r"```(?:json)?\n(.*?)\n```", EXAMPLE, re.DOTALL)


def bytes_of(dump):
    data = b""
    repeated = False
    for line in dump.splitlines():
        if line == "*":
            repeated = True
            continue
        offset = int(line[:8], 16)
        if repeated:
            data += data[-16:] * ((offset - len(data)) // 16)
            repeated = False
        assert len(data) == offset
        data += bytes.fromhex(line[8:].partition("|")[0])
    return data


@pytest.fixture
def example(tmp_path):
    manifest, experts, dense = blocks()
    (tmp_path / "pack.json").write_text(manifest)
    (tmp_path / "experts-00000.safetensors").write_bytes(bytes_of(experts))
    (tmp_path / "dense-00000.safetensors").write_bytes(bytes_of(dense))
    return tmp_path


def slots(folder):
    """The two experts' bytes, found as the text says."""
    layer = json.loads((folder / "pack.json").read_text())["layers"][0]
    data = (folder / layer["file"]).read_bytes()
    for expert_idx in range(layer["num_experts"]):
        start = layer["first_offset_bytes"] + expert_idx * layer["slot_bytes"]
        yield layer, data[start : start + layer["slot_bytes"]], layer["checksums"][expert_idx]


def test_read_by_the_text_alone(example):
    for expert_idx, (layer, slot, checksum) in enumerate(slots(example)):
        assert xxhash.xxh3_64_hexdigest(slot) == checksum
        up_proj, bias = layer["parts"]
        num_rows, num_cols = up_proj["shape"]
        part = slot[up_proj["offset_bytes"] :][: up_proj["size_bytes"]]
        scales = struct.unpack_from(f"<{num_rows}e", part, num_rows * num_cols // 2)
        for row in range(num_rows):
            codes_bytes = part[row * 32 : row * 32 + 32]
            codes = [byte & 15 for byte in codes_bytes] + [byte >> 4 for byte in codes_bytes]
            weights = [NF4[code] * scales[row] for code in codes]
            assert weights == pytest.approx(UP_PROJ[expert_idx][row])
        raw = slot[bias["offset_bytes"] :][:4]
        found = [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in (0, 2)]
        assert found == BIAS[expert_idx]


def test_read_by_safetensors(example):
    with safe_open(example / "experts-00000.safetensors", framework="numpy") as file:
        for expert_idx, (_, slot, _) in enumerate(slots(example)):
            assert file.get_tensor(f"layers.0.experts.{expert_idx}").tobytes() == slot
    with safe_open(example / "dense-00000.safetensors", framework="numpy") as file:
        assert file.get_tensor("model.norm.weight").tolist() == [1.0, 2.0]


def test_read_by_the_package(example):
    (layer,) = read_manifest(example).layers
    for expert_idx, (_, slot, _) in enumerate(slots(example)):
        up_proj, bias = layer.parts
        for part, expected in ((up_proj, UP_PROJ[expert_idx]), (bias, BIAS[expert_idx])):
            data = torch.frombuffer(bytearray(slot[part.offset_bytes :][: part.size_bytes]), dtype=torch.uint8)
            found = get_format(part.format).dequantize(data, part.shape, torch.float32)
            torch.testing.assert_close(found, torch.tensor(expected), atol=5e-5 * 4, rtol=0)
    check_dense_file(example, read_manifest(example).dense[0])


def test_written_by_the_package(example, tmp_path):
    folder = tmp_path / "written"
    (layer,) = read_manifest(example).layers
    manifest = read_manifest(example)
    layout = LayerLayout.of(layer.module, 2, [(p.name, p.shape, p.format, p.size_bytes) for p in layer.parts])
    with PackWriter(folder, identity={"source": "example"}) as writer:
        with writer.layer(0, layout) as expert_writer:
            for expert_idx, (_, slot, _) in enumerate(slots(example)):
                expert_writer.write_expert(expert_idx, slot)
        writer.dense_file("dense-00000.safetensors", [("model.norm.weight", "F32", (2,), struct.pack("<2f", 1.0, 2.0))])
        writer.finish(
            source=manifest.source,
            revision=manifest.revision,
            expert_format=manifest.expert_format,
            dense_format=manifest.dense_format,
            created_by=manifest.created_by,
            extra=manifest.extra,
        )
    assert (folder / "pack.json").read_text().strip() == blocks()[0]
    for name in ("experts-00000.safetensors", "dense-00000.safetensors"):
        assert (folder / name).read_bytes() == (example / name).read_bytes()


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("nf4", (3, 70)),
        ("int4", (3, 70)),
        ("mxfp4", (3, 70)),
        ("int8", (3, 70)),
        ("fp8", (130, 300)),
        ("fp8-2x32", (3, 70)),
        ("bnb-nf4-128", (3, 256)),
        ("bnb-fp4-32", (3, 64)),
        ("bf16", (3, 5)),
        ("fp32", (7,)),
    ],
)
def test_sizes_are_those_of_the_table(spec, shape):
    """The table of formats, as another program would work it out."""

    def up(size, step):
        return -(-size // step) * step

    if spec in ("bf16", "fp32"):
        expected = up(torch.Size(shape).numel() * (2 if spec == "bf16" else 4), 64)
    else:
        rows, cols = shape
        group = {"mxfp4": 32, "bnb-nf4-128": 128, "bnb-fp4-32": 32}.get(spec, 64)
        groups = -(-cols // group)
        code_bytes = rows * groups * group // (1 if spec == "int8" else 2)
        scale_bytes = rows * groups * {"mxfp4": 1, "bnb-nf4-128": 4, "bnb-fp4-32": 4}.get(spec, 2)
        if spec.startswith("fp8"):
            block_rows, block_cols = (128, 128) if spec == "fp8" else (2, 32)
            code_bytes = rows * cols
            scale_bytes = -(-rows // block_rows) * -(-cols // block_cols) * 4
        expected = up(code_bytes, 64) + up(scale_bytes, 64)
    assert get_format(spec).nbytes(shape) == expected


def test_three_bit_codes_are_where_the_page_says():
    """nf3 decoded as another program would, with the tables that the page prints."""
    lines = DOC.split("table 0 to 15, for codes 0 to 7:")[1].split("```")[1].split()
    tables = torch.tensor([int(number.strip(",")) for number in lines]).view(16, 8)
    rows, cols = 3, 100
    nf3 = get_format("nf3")
    packed = nf3.quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)))
    data = bytes(packed.tolist())
    values = torch.empty(rows, cols)
    for row in range(rows):
        (scale,) = struct.unpack_from("<e", data, -(-rows * 50 // 64) * 64 + 2 * row)
        for col in range(cols):
            start, p = row * 50 + col // 64 * 24, col % 64
            half, word, pair = p // 32, p % 8, p % 32 // 8
            low = data[start + 2 * word + half] >> 2 * pair & 3
            high = int.from_bytes(data[start + 16 : start + 24], "little") >> p & 1
            table = data[row * 50 + 48 + col // 64] >> 4 * half & 15
            values[row, col] = float(tables[table, low | high << 2]) / 128 * scale
    assert torch.equal(nf3.dequantize(packed, (rows, cols), torch.float32), values)
