"""An answer's text, handed from the thread that makes it to the one that reads it."""

from typing import Any

import torch
from transformers import TextIteratorStreamer

# Special tokens that say what is reasoning and what is answer (DeepSeek and Qwen, Mistral, gpt-oss).
REASONING_MARKERS = (
    *("<think>", "</think>", "[THINK]", "[/THINK]"),
    *("<|channel|>", "<|message|>", "<|start|>", "<|end|>"),
)


class TextStream(TextIteratorStreamer):  # type: ignore[misc]
    """Text as it is made, without special tokens; an error of the generating thread reaches the reader."""

    def __init__(self, tokenizer: Any, *, skip_prompt: bool, keep_reasoning_markers: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=False)
        kept = REASONING_MARKERS if keep_reasoning_markers else ()
        self._hidden = torch.tensor(
            [i for i in tokenizer.all_special_ids if tokenizer.convert_ids_to_tokens(i) not in kept], dtype=torch.long
        )

    def put(self, value: torch.Tensor) -> None:
        """Token ids ``[n]`` or ``[1, n]``, the prompt's first."""
        if self.skip_prompt and self.next_tokens_are_prompt:
            super().put(value)
            return
        shown = value.reshape(-1)
        shown = shown[~torch.isin(shown, self._hidden)]
        if len(shown):
            super().put(shown)

    def fail(self, error: BaseException) -> None:
        self.text_queue.put(error)

    def __next__(self) -> str:
        value = self.text_queue.get()
        if isinstance(value, BaseException):
            raise value
        if value == self.stop_signal:
            raise StopIteration
        return str(value)
