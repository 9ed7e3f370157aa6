"""The experts of a layer as one operator: what a compiler sees of them, and that it computes the same."""

from pathlib import Path

import pytest
import torch
from families import make_config
from family_runs import CONTEXT_TOKENS, save_random_model

from moe_offload import OffloadedModel
from moe_offload.offload.graphs.experts_op import register_experts, routed_experts
from moe_offload.offload.pack.packer import pack_model


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("op")
    return pack_model(str(save_random_model(make_config("mixtral"), folder / "checkpoint")), folder / "pack")


def routing(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 32, generator=generator)
    index = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(num_tokens)])
    return x, index, torch.rand(num_tokens, 2, generator=generator)


def test_a_graph_has_the_experts_as_one_operator(pack: Path):
    with OffloadedModel.from_pretrained(pack, device="cpu", dtype="float32", context_tokens=CONTEXT_TOKENS) as model:
        experts = model.model.get_submodule(model.manifest.layers[1].module)
        seen: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
            seen.append(graph)
            return graph

        compiled = torch.compile(
            lambda x, index, weights: experts(x * 2, index, weights) + 1, backend=backend, fullgraph=True, dynamic=True
        )
        with torch.no_grad():
            for num_tokens in (2, 5):
                x, index, weights = routing(num_tokens)
                assert torch.equal(compiled(x, index, weights), experts(x * 2, index, weights) + 1)
        calls = [node for graph in seen for node in graph.graph.nodes if "moe_offload" in str(node.target)]
        assert len(calls) == len(seen)


def test_the_operator_is_what_torch_wants_of_one():
    def experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x * weights.sum(-1, keepdim=True)

    handle = register_experts(experts)
    torch.library.opcheck(routed_experts, (*routing(3), handle), test_utils=("test_schema", "test_faketensor"))
    del experts
    with pytest.raises(KeyError):
        routed_experts(*routing(3), handle)
