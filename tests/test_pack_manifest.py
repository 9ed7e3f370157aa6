import contextlib
import json
import os
import random
from dataclasses import replace

import pytest
import tiny_packs
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.errors import PackCorruptError, PackError, PackIncompleteError, PackVersionError
from moe_offload.offload.pack.manifest import DenseFile, LayerSpec, PackManifest, PartSpec, is_pack, read_manifest


def manifest(num_layers=2, num_experts=3):
    return PackManifest(
        source="org/model",
        revision=None,
        expert_format="nf4",
        dense_format="source",
        created_by="a test",
        layers=tuple(
            LayerSpec(
                f"model.layers.{layer_idx}.mlp.experts",
                num_experts,
                8192,
                (PartSpec("gate", (8, 64), "nf4", 0, 320), PartSpec("up#0", (8,), "bf16", 320, 16)),
                file=f"experts-{layer_idx:05d}.safetensors",
                first_offset_bytes=4096,
                checksums=tuple(f"{layer_idx * num_experts + e:016x}" for e in range(num_experts)),
            )
            for layer_idx in range(num_layers)
        ),
        dense=(DenseFile("dense-00000.safetensors", 100, "0" * 16),),
        extra={"exact": "no"},
    )


def edited(*path, value):
    """The manifest's JSON with the element at ``path`` set, or removed where ``value`` is `...`."""
    tree = json.loads(manifest().to_json())
    spot = tree
    for key in path[:-1]:
        spot = spot[key]
    if value is ...:
        del spot[path[-1]]
    else:
        spot[path[-1]] = value
    return json.dumps(tree)


def test_json_and_back():
    assert PackManifest.from_json(manifest().to_json()) == manifest()


def test_experts_lie_one_after_the_other():
    layer = manifest().layers[1]
    assert [(e.file, e.offset_bytes) for e in layer.experts.values()] == [
        ("experts-00001.safetensors", 4096 + 8192 * expert_idx) for expert_idx in range(3)
    ]
    assert [e.checksum for e in layer.experts.values()] == list(layer.checksums)


def test_sizes():
    assert manifest().expert_bytes == 2 * 3 * 8192
    assert manifest().dense_bytes == 100


@pytest.mark.parametrize("version", [0, 3, 1 << 40])
def test_another_version(version):
    with pytest.raises(PackVersionError, match=f"format version {version}, this moe-offload reads 1 and 2"):
        PackManifest.from_json(edited("version", value=version))


def test_another_version_is_told_even_if_the_rest_changed():
    with pytest.raises(PackVersionError):
        PackManifest.from_json('{"format": "moe-offload-pack", "version": 3, "new": 1}')


LAYER = ("layers", 0)
PART = (*LAYER, "parts", 0)
SECOND_PART = (*LAYER, "parts", 1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "other", "format is not"),
        (("version",), 1.0, "not a whole number"),
        (("version",), True, "not a whole number"),
        (("source",), 1, "not a string"),
        (("source",), ..., "lacks 'source'"),
        (("new",), 1, "unknown keys: 'new'"),
        (("layers",), [], "no expert layers"),
        (("layers",), {}, "not a list"),
        (LAYER, 1, "not an object"),
        ((*LAYER, "new"), 1, "unknown keys"),
        ((*LAYER, "module"), "", "no module name"),
        ((*LAYER, "module"), "model.layers.1.mlp.experts", "one module name"),
        ((*LAYER, "num_experts"), 0, "no experts"),
        ((*LAYER, "num_experts"), 4, "3 checksums for 4 experts"),
        ((*LAYER, "slot_bytes"), 8191, "no multiple of 4096"),
        ((*LAYER, "slot_bytes"), 0, "no multiple of 4096"),
        ((*LAYER, "slot_bytes"), -4096, "not a whole number"),
        ((*LAYER, "slot_bytes"), 1 << 70, "not a whole number"),
        ((*LAYER, "first_offset_bytes"), 4097, "no multiple of 4096"),
        ((*LAYER, "first_offset_bytes"), 0, "no multiple of 4096"),
        ((*LAYER, "checksums"), ["0" * 16] * 2 + ["0" * 15], "16 hex digits"),
        ((*LAYER, "checksums"), ["0" * 16] * 2 + ["G" * 16], "16 hex digits"),
        ((*LAYER, "checksums"), ["0" * 16] * 2 + [0], "list of strings"),
        ((*LAYER, "file"), "../experts.safetensors", "not a file name inside the pack"),
        ((*LAYER, "file"), "/etc/passwd", "not a file name inside the pack"),
        ((*LAYER, "file"), "a/b.safetensors", "not a file name inside the pack"),
        ((*LAYER, "file"), "a\\b.safetensors", "not a file name inside the pack"),
        ((*LAYER, "file"), "..", "not a file name inside the pack"),
        ((*LAYER, "file"), "a\x00b", "not a file name inside the pack"),
        ((*LAYER, "file"), "a\n", "not a file name inside the pack"),
        ((*LAYER, "file"), "", "not a file name inside the pack"),
        ((*LAYER, "parts"), [], "has no parts"),
        ((*PART, "name"), "up#0", "two parts of one name"),
        ((*PART, "shape"), [], "has shape"),
        ((*PART, "shape"), [8, 0], "has shape"),
        ((*PART, "shape"), [8, "64"], "list of whole numbers"),
        ((*PART, "format"), "", "lacks a name or a format"),
        ((*PART, "size_bytes"), 0, "is empty"),
        ((*PART, "size_bytes"), 321, "overlaps"),
        ((*SECOND_PART, "offset_bytes"), 330, "no multiple of 64"),
        ((*SECOND_PART, "size_bytes"), 8192 - 320 + 1, "past its slot"),
        (("dense", 0, "file"), "../../x", "not a file name inside the pack"),
        (("dense", 0, "checksum"), "", "16 hex digits"),
        (("extra",), {"a": 1}, "object of strings"),
        (("extra",), [], "object of strings"),
    ],
)
def test_what_does_not_add_up(path, value, message):
    with pytest.raises(PackCorruptError, match=message):
        PackManifest.from_json(edited(*path, value=value))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 10_000,
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        '{"format": NaN}',
        manifest().to_json() + "{}",
        manifest().to_json().replace('"source"', '"source": "twice", "source"', 1),
    ],
    ids=range(12),
)
def test_what_is_not_json(text):
    with pytest.raises(PackCorruptError):
        PackManifest.from_json(text)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def spots(tree):
    """Every (container, key) of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list):
            yield from spots(value)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 32), value=JSON_VALUES, change=st.sampled_from(["set", "delete", "nudge", "add"]))
def test_a_mutated_tree_loads_or_is_refused(seed, value, change):
    tree = json.loads(manifest().to_json())
    chosen = random.Random(seed)
    container, key = chosen.choice(list(spots(tree)))
    if change == "delete":
        del container[key]
    elif change == "nudge" and isinstance(container[key], int):
        container[key] += chosen.choice([-4096, -64, -1, 1, 64, 4096])
    elif change == "add" and isinstance(container, dict):
        container[str(value)] = value
    else:
        container[key] = value
    try:
        loaded = PackManifest.from_json(json.dumps(tree))
    except PackError:
        return
    assert PackManifest.from_json(loaded.to_json()) == loaded


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_mutated_bytes_load_or_are_refused(seed):
    data = bytearray(manifest().to_json().encode())
    chosen = random.Random(seed)
    for _ in range(chosen.choice([1, 1, 2, 5])):
        start = chosen.randrange(len(data))
        data[start : start + chosen.randrange(4)] = chosen.randbytes(chosen.randrange(4))
    with contextlib.suppress(PackError):
        PackManifest.from_json(bytes(data))


def test_a_large_manifest_is_compact():
    large = manifest(num_layers=94, num_experts=128)
    text = large.to_json()
    assert len(text) < 94 * 128 * 30
    assert sum(len(layer.experts) for layer in PackManifest.from_json(text).layers) == 94 * 128


def test_a_pack_is_read(tmp_path):
    written = tiny_packs.write_pack(tmp_path)
    assert is_pack(tmp_path)
    assert read_manifest(tmp_path) == written
    assert read_manifest(str(tmp_path)) == written


@pytest.mark.parametrize("folder", ["", "missing", "pack.json", "a\x00b", "x" * 5000])
def test_what_is_no_pack(tmp_path, folder):
    (tmp_path / "pack.txt").write_text("x")
    path = os.path.join(tmp_path, folder)
    assert not is_pack(path)
    with pytest.raises(PackError, match="pack"):
        read_manifest(path)


def test_an_unfinished_pack(tmp_path):
    (tmp_path / "pack.journal").write_text("")
    with pytest.raises(PackIncompleteError, match="was not finished; run the same"):
        read_manifest(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    tiny_packs.write_pack(tmp_path)
    file = tmp_path / "experts-00001.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(PackCorruptError, match=r"experts-00001.safetensors has 36863 bytes of 36864: it is truncated"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["experts-00000.safetensors", "dense-00000.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    tiny_packs.write_pack(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(PackCorruptError, match=f"{name} is missing"):
        read_manifest(tmp_path)


def test_a_link_out_of_the_folder(tmp_path):
    pack = tmp_path / "pack"
    tiny_packs.write_pack(pack)
    outside = tmp_path / "outside"
    (pack / "experts-00000.safetensors").rename(outside)
    (pack / "experts-00000.safetensors").symlink_to(outside)
    with pytest.raises(PackCorruptError, match="leaves the pack's folder"):
        read_manifest(pack)


def test_a_link_in_a_circle(tmp_path):
    tiny_packs.write_pack(tmp_path)
    file = tmp_path / "experts-00000.safetensors"
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(PackCorruptError, match="experts-00000"):
        read_manifest(tmp_path)


def test_a_folder_that_is_a_link_itself(tmp_path):
    tiny_packs.write_pack(tmp_path / "pack")
    (tmp_path / "link").symlink_to("pack")
    assert read_manifest(tmp_path / "link").source == "tiny"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_file(tmp_path, make):
    tiny_packs.write_pack(tmp_path)
    file = tmp_path / "experts-00000.safetensors"
    file.unlink()
    make(file)
    with pytest.raises(PackCorruptError, match="not a regular file"):
        read_manifest(tmp_path)


def test_a_version_error_names_the_pack(tmp_path):
    tiny_packs.write_pack(tmp_path)
    path = tmp_path / "pack.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 3'))
    with pytest.raises(PackVersionError, match=r"pack\.json: the pack has format version 3"):
        read_manifest(tmp_path)


def test_a_layer_keeps_to_its_layout():
    layer = manifest().layers[0]
    with pytest.raises(PackCorruptError, match="past its slot"):
        replace(layer, slot_bytes=4096, parts=(PartSpec("gate", (8,), "nf4", 4032, 128),))
