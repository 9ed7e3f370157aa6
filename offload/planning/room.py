"""What a text needs beside the model: its keys and values, and the temporaries of a pass over some of its tokens."""

from dataclasses import dataclass

from moe_offload.offload.pass_inputs import LONGEST_DRAFT_TOKENS

# Slots give way for so many tokens at a time, or an eighth of the context: moving them costs more than a step.
_AT_ONCE_TOKENS = 256


@dataclass(frozen=True)
class Room:
    """Memory for a text of ``text_tokens``, of which a pass reads at most ``pass_tokens`` at once."""

    text_tokens: int
    pass_tokens: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.kv_bytes + self.workspace_bytes


def tokens_at_once(context_tokens: int) -> int:
    """By how many tokens a text is taken to grow, where ``context_tokens`` were planned."""
    return min(context_tokens, max(LONGEST_DRAFT_TOKENS, min(_AT_ONCE_TOKENS, context_tokens // 8)))
