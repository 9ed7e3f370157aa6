"""A model that says what it is told to, for tests of the command line: no weights, no torch."""

import signal
import sys
import threading
import time
import types
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FakeRun:
    prompt_tokens: int = 5
    new_tokens: int = 7
    time_to_first_token_s: float = 0.25
    decode_s: float = 0.5
    tokens_per_s: float = 12.0
    hits: int = 30
    misses: int = 10
    hit_ratio: float = 0.75
    bytes_read: int = 3 << 20
    bytes_copied: int = 2 << 20
    bytes_copied_ahead: int = 1 << 20
    link_peak_bytes_per_s: float = 8e6
    link_busy_s: float = 0.3
    link_use: float = 0.35
    link_use_steps: tuple[float, ...] = (0.25, 0.12345)
    stall_s: float = 0.125
    prefetch_issued: int = 6
    prefetch_used: int = 4
    prefetch_wasted: int = 1
    prefetch_recall: float = 0.5
    warmed: int = 0
    computed_on_cpu: int = 0
    num_ranks: int = 1
    peer_wait_s: float = 0.0
    peer_bytes: int = 0


@dataclass(frozen=True)
class FakeManifest:
    expert_format: str = "nf4"
    dense_format: str = "source"
    expert_bytes: int = 4 << 20
    dense_bytes: int = 1 << 20


@dataclass(frozen=True)
class FakePlan:
    device: str = "cpu"
    resident_share: float = 0.4
    host_share: float = 0.0
    parts: tuple[Any, ...] = ()

    def render(self) -> str:
        return "RAM   expert slots  3.0 MiB\nslots 2 of 5 per layer"


@dataclass
class FakeTokenizer:
    chat_template: str | None = "{{ messages }}"
    prompt_end: str = ""

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return "prompt" + self.prompt_end


@dataclass
class FakeModel:
    """Answers with ``replies`` in turn, the last again and again.

    "<endless>" goes on until it is stopped, "<deaf>" does not even stop then; at "<ctrl-c>" the user presses it.
    """

    replies: list[Any] = field(default_factory=lambda: [["Hello", " there."]])
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    manifest: FakeManifest = field(default_factory=FakeManifest)
    group: None = None
    plan: FakePlan = field(default_factory=FakePlan)
    model: Any = field(default_factory=lambda: types.SimpleNamespace(generation_config=None))
    last_run: FakeRun | None = None
    stats: FakeRun = field(default_factory=FakeRun)
    asked: list[Any] = field(default_factory=list)
    sampled: list[dict[str, Any]] = field(default_factory=list)
    closed: bool = False
    miss_path: str = "copy"

    def __post_init__(self) -> None:
        self._stop = threading.Event()

    def load_figures(self, *, context_tokens: int) -> dict[str, Any]:
        return {"kv_bytes": context_tokens}

    def stream(self, prompt: Any, **sampling: Any) -> Any:
        self._stop.clear()
        self.asked.append(prompt)
        self.sampled.append(sampling)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, BaseException):
            raise reply
        return self._say(reply)

    def _say(self, reply: Any) -> Any:
        for text in reply:
            if text == "<endless>":
                while not self._stop.is_set():
                    time.sleep(0.01)
                    yield "on and "
            elif text == "<deaf>":
                while True:
                    time.sleep(0.01)
                    yield "was asked to stop\n" if self._stop.is_set() else "deaf and "
            elif text == "<ctrl-c>":
                signal.raise_signal(signal.SIGINT)
            else:
                yield text
        self.last_run = FakeRun()

    stream_chat = stream

    def stop(self) -> None:
        self._stop.set()

    def __enter__(self) -> "FakeModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


class Loader:
    """Stands in for ``OffloadedModel``: hands out ``model`` and remembers what it was asked to load."""

    def __init__(self, model: FakeModel, error: BaseException | None = None) -> None:
        self.model = model
        self.error = error
        self.loaded: list[tuple[str, dict[str, Any]]] = []

    def from_pretrained(self, name: str, *, on_progress: Any, on_plan: Any, **load: Any) -> FakeModel:
        self.loaded.append((name, load))
        on_progress.start("packing", 1000)
        on_progress.advance(1000)
        on_progress.finish()
        if self.error is not None:
            raise self.error
        on_plan(self.model.plan)
        return self.model


def install(monkeypatch: Any, model: FakeModel, error: BaseException | None = None) -> Loader:
    """Let the commands find ``model`` where they would load a real one."""
    loader = Loader(model, error)
    modules = {
        "moe_offload.offload.model": {"OffloadedModel": loader},
        "moe_offload.offload.demo.build": {
            "demo_budget": lambda device: {"ram": "300MiB"} if device == "auto" else {"vram": device},
            "ensure_demo": lambda progress: "/demo",
        },
        "moe_offload.quant": {"backend_name": lambda: "fake kernels"},
    }
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return loader
