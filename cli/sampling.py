"""How tokens are drawn: what the user asked for, over what the model recommends."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """Arguments of ``generate`` and its siblings; None leaves one to its default."""

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def over(self, generation_config: Any) -> "Sampling":
        """These; what the checkpoint recommends in its place if nothing was said of how to draw."""
        if self.temperature is not None:
            return self
        if self.top_p is not None or self.top_k is not None:
            return Sampling(self.max_new_tokens, 1.0, self.top_p, self.top_k, self.seed)
        if not getattr(generation_config, "do_sample", False):
            return self
        return Sampling(
            self.max_new_tokens,
            temperature=generation_config.temperature or 1.0,
            top_p=generation_config.top_p,
            top_k=generation_config.top_k or None,
            seed=self.seed,
        )

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments to pass on."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        if not self.temperature:
            return "greedy: always the likeliest token"
        named = {"temperature": self.temperature, "top-p": self.top_p, "top-k": self.top_k, "seed": self.seed}
        return "sampled, " + ", ".join(f"{name} {value:g}" for name, value in named.items() if value is not None)
