"""The whole demo, built, packed and run in its budget, answers fixed prompts as recorded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig

from moe_offload import OffloadedModel
from moe_offload.offload.demo.build import DEMO_RAM, DEMO_VRAM, ensure_demo
from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.planning.plan import make_plan
from moe_offload.offload.planning.sizes import parse_size

# Beginnings only: another machine rounds the routers' fit differently, and the answers part ways later on.
RECORDED = {
    "What is gravity?": "Gravity is a fundamental concept in physics that describes",
    "Who was Albert Einstein?": "Albert Einstein was a brilliant physicist and mathematician who",
    "Write a Python function that returns the factorial of n.": (
        "```python\ndef factorial(n):\n    if n == 0:\n        return 1\n    else:\n        return n * factorial(n - 1)"
    ),
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_OFFLOAD_HOME", str(tmp_path_factory.mktemp("home")))
        return ensure_demo()


@pytest.fixture(scope="module")
def demo(pack: Path) -> Iterator[OffloadedModel]:
    with OffloadedModel.from_pretrained(pack, device="cpu", ram=DEMO_RAM) as model:
        yield model


@pytest.mark.slow
@pytest.mark.parametrize("question", RECORDED)
def test_greedy_answers_are_the_recorded_ones(demo: OffloadedModel, question: str):
    num_tokens = len(demo.tokenizer(RECORDED[question])["input_ids"])
    assert demo.chat([{"role": "user", "content": question}], max_new_tokens=num_tokens) == RECORDED[question]


@pytest.mark.slow
def test_an_answer_ends_by_itself(demo: OffloadedModel):
    answer = demo.chat([{"role": "user", "content": "How many days are in a week?"}], max_new_tokens=64)
    assert "7 days" in answer
    assert demo.last_run is not None
    assert demo.last_run.new_tokens < 20
    assert "<|im_end|>" not in answer


@pytest.mark.slow
def test_its_budget_puts_the_cache_to_work(demo: OffloadedModel):
    assert 0.37 < demo.plan.resident_share < 0.43
    demo.chat([{"role": "user", "content": "Tell me about the sea."}], max_new_tokens=8)
    assert demo.last_run is not None
    assert demo.last_run.misses > 0
    # Better than what experts picked at random would give.
    assert demo.last_run.hit_ratio > demo.plan.resident_share


@pytest.mark.slow
def test_on_a_gpu_too(pack: Path):
    """The default budget of VRAM holds about as much, and the rest finds room in RAM."""
    manifest = read_manifest(pack)
    assert manifest.source == "demo: SmolLM2-135M-Instruct upcycled to 8 experts"
    plan = make_plan(
        manifest,
        AutoConfig.from_pretrained(pack),
        device="cuda",
        ram_bytes=8 << 30,
        vram_bytes=parse_size(DEMO_VRAM, total_bytes=0, free_bytes=0),
        context_tokens=4096,
        dtype_bytes=2,
        top_k_per_layer=[2] * len(manifest.layers),
        prefetch_depth=1,
    )
    assert 0.37 < plan.resident_share < 0.43
    assert plan.host_share == 1
