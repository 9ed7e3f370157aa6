"""An embedding whose rows are read from the pack: the same rows as from memory, and memory that is not spent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, make_config
from family_runs import load_smallest, save_random_model
from torch import nn
from torch.nn import functional as F

from moe_offload.errors import PackCorruptError
from moe_offload.offload.checkpoint.shard_file import ShardFile
from moe_offload.offload.checkpoint.transformers_loading import auto_class
from moe_offload.offload.dense_weights import DenseWeights
from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.row_embedding import RowEmbedding, table_in_pack


@pytest.fixture
def pack(tmp_path: Path) -> Any:
    def make(**overrides: Any) -> Path:
        config = make_config("mixtral", hidden_size=64, intermediate_size=64, **overrides)
        checkpoint = save_random_model(config, tmp_path / "checkpoint", torch.bfloat16)
        return pack_model(str(checkpoint), tmp_path / "pack", format="nf4")

    return make


def table_of(folder: Path) -> tuple[ShardFile, torch.Tensor]:
    manifest = read_manifest(folder)
    dense = DenseWeights(folder, manifest)
    try:
        key = "model.embed_tokens.weight"
        return dense.reopened(key), dense[key][...]
    finally:
        dense.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (1, 0)])
def test_rows_are_those_of_the_table(pack, dtype, shape):
    folder = pack()
    file, table = table_of(folder)
    file.close()
    ids = torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(0))
    with load_smallest(folder, dtype=dtype) as loaded:
        embedding = loaded.model.get_input_embeddings()
        assert isinstance(embedding, RowEmbedding)
        found = embedding(ids)
        assert found.dtype == getattr(torch, dtype)
        assert torch.equal(found, F.embedding(ids, table).to(found.dtype))
        assert torch.equal(embedding.weight, table.to(found.dtype))
        with pytest.raises(IndexError, match="token 128 is not in a vocabulary of 128"):
            embedding(torch.tensor([[128]]))
        assert loaded.model.to(torch.float16).get_input_embeddings()(ids).dtype == torch.float16


def test_the_plan_counts_what_is_resident(pack):
    with load_smallest(pack()) as loaded:
        resident_bytes = sum(t.nbytes for t in [*loaded.model.parameters(), *loaded.model.buffers()])
        manifest = loaded.manifest
        assert loaded.plan.dense_bytes <= resident_bytes <= loaded.plan.dense_bytes + 4096, (
            "rotary tables are not stored"
        )
        assert loaded.plan.dense_bytes < 2 * manifest.dense_bytes - 4 * 128 * 64 + 1


def test_a_table_that_is_the_head_too_is_resident(pack):
    with load_smallest(pack(tie_word_embeddings=True)) as loaded:
        assert isinstance(loaded.model.get_input_embeddings(), nn.Embedding)


def test_a_table_of_another_shape_is_refused(pack):
    file, _ = table_of(pack())
    with pytest.raises(PackCorruptError, match=r"holds model.embed_tokens.weight of shape \[128, 64\]"):
        RowEmbedding(nn.Embedding(64, 64, device="meta"), file, "model.embed_tokens.weight", torch.float32)
    file.close()


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_every_table_that_a_plan_leaves_out_is_a_plain_embedding(family):
    config = make_config(family)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    table = table_in_pack(config, model.state_dict().keys(), "cpu")
    if table is not None:
        assert type(model.get_submodule(table.removesuffix(".weight"))) is nn.Embedding
        assert model.get_input_embeddings() is model.get_submodule(table.removesuffix(".weight"))
    assert table_in_pack(config, model.state_dict().keys(), "cuda") is None
