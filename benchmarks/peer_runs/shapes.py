"""Model shapes that every engine can be given: the names and sizes of the tensors, and the weights of none."""

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Shape:
    """A decoder whose every layer is a mixture of experts."""

    name: str
    family: Literal["mixtral", "qwen3_moe"]
    num_layers: int
    hidden_size: int
    expert_size: int
    num_experts: int
    top_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.expert_size

    @property
    def dense_weights(self) -> int:
        """Weights of the matrices that every token uses, without the routers and the embedding."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * attention + self.vocab_size * self.hidden_size

    @property
    def num_weights(self) -> int:
        """All weights of the matrices, without the routers."""
        experts = self.num_layers * self.num_experts * self.expert_weights
        return experts + self.dense_weights + self.vocab_size * self.hidden_size

    @property
    def active_weights(self) -> int:
        """Weights that one token reads."""
        return self.dense_weights + self.num_layers * self.top_k * self.expert_weights

    def transformers_config(self) -> dict[str, object]:
        """The keys of a transformers ``config.json`` for this shape."""
        sizes = asdict(self)
        common = {name: sizes[name] for name in ("hidden_size", "head_dim", "vocab_size", "rms_norm_eps")} | {
            "model_type": self.family,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
        if self.family == "mixtral":
            return common | {"intermediate_size": self.expert_size, "num_local_experts": self.num_experts}
        return common | {
            "moe_intermediate_size": self.expert_size,
            "num_experts": self.num_experts,
            "norm_topk_prob": True,
        }


SHAPES = {
    "mixtral": Shape("Mixtral-8x7B, 8 layers", "mixtral", 8, 4096, 14336, 8, 2, 32, 8, 128, 32000, 1e-5),
    # Few tokens in the vocabulary: an lm_head made for 48 layers would outweigh the experts of 8.
    "qwen3": Shape("Qwen3-30B-A3B, 8 layers x 64 experts", "qwen3_moe", 8, 2048, 768, 64, 8, 32, 4, 128, 512, 1e-6),
}
