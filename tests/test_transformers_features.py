"""What transformers' models can do, an offloaded one can too; and what `OffloadedModel` adds to it."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_config
from family_runs import load_smallest, save_random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from moe_offload import OffloadedModel
from moe_offload.errors import ConfigError

VOCAB_SIZE = 264
PROMPT = "the quick brown fox"
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no such role') }}"
    "{% endif %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """A token for each byte, the special tokens before them, and a chat template."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = special | {letter: i + len(special) for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "mixtral"
    save_random_model(make_config("mixtral", vocab_size=VOCAB_SIZE, max_position_embeddings=256), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def pack(checkpoint) -> Path:
    return checkpoint.parent / "pack"


@pytest.fixture(scope="module")
def offloaded(checkpoint, pack) -> Iterator[OffloadedModel]:
    with load_smallest(checkpoint, pack_dir=pack, format="source", context_tokens=128) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(checkpoint) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager").eval()


def encode(offloaded: OffloadedModel, *texts: str) -> dict[str, torch.Tensor]:
    return dict(offloaded.tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False))


# -- transformers' own ways to generate: the same tokens as from its own model --

GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam search": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True, "temperature": 0.7},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
    "a static cache": {"cache_implementation": "static", "do_sample": False, "disable_compile": True},
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_generations_are_those_of_transformers(name, offloaded, reference):
    inputs = encode(offloaded, PROMPT + " and the " + PROMPT)
    tokens = []
    for model in (reference, offloaded.model):
        torch.manual_seed(7)
        tokens.append(model.generate(**inputs, max_new_tokens=12, **GENERATIONS[name]))
    assert torch.equal(*tokens)
    offloaded._residency.cache.check_integrity()


def test_assisted_generation(offloaded, reference):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    assistant = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, pad_token_id=0, eos_token_id=2, **sizes)).eval()
    inputs = encode(offloaded, PROMPT)
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.9}):
        tokens = []
        for model in (reference, offloaded.model):
            torch.manual_seed(7)
            tokens.append(model.generate(**inputs, assistant_model=assistant, max_new_tokens=12, **sampling))
        assert torch.equal(*tokens)


def test_it_can_be_the_assistant_itself(offloaded, reference):
    inputs = encode(offloaded, PROMPT)
    alone = reference.generate(**inputs, max_new_tokens=8, do_sample=False)
    helped = reference.generate(**inputs, assistant_model=offloaded.model, max_new_tokens=8, do_sample=False)
    assert torch.equal(helped, alone)


def test_a_padded_batch_gives_what_its_prompts_give_alone(offloaded):
    texts = [PROMPT, "a", "some other, longer text to be continued"]
    together = offloaded.model.generate(**encode(offloaded, *texts), max_new_tokens=8, do_sample=False)
    for row, text in zip(together, texts, strict=True):
        alone = offloaded.model.generate(**encode(offloaded, text), max_new_tokens=8, do_sample=False)
        new_tokens = alone[0, -8:] if alone.shape[1] >= 8 else alone[0]
        assert torch.equal(row[-len(new_tokens) :], new_tokens)


def test_a_pipeline(offloaded, reference):
    generate = pipeline("text-generation", model=offloaded.model, tokenizer=offloaded.tokenizer)
    plain = pipeline("text-generation", model=reference, tokenizer=offloaded.tokenizer)
    messages = [{"role": "user", "content": "hello"}]
    for prompt in (PROMPT, [PROMPT, "other"], messages):
        arguments = {"max_new_tokens": 6, "do_sample": False, "batch_size": 2}
        assert generate(prompt, **arguments) == plain(prompt, **arguments)


def test_streamers(offloaded, capsys):
    inputs = encode(offloaded, PROMPT)
    tokens = offloaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = offloaded.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    streamer = TextIteratorStreamer(offloaded.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    arguments = {**inputs, "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=offloaded.model.generate, kwargs=arguments)
    thread.start()
    assert "".join(streamer) == text
    thread.join()
    printer = TextStreamer(offloaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    offloaded.model.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=printer)
    assert capsys.readouterr().out == text + "\n"


def test_logits_and_hidden_states_are_given_out(offloaded, reference):
    inputs = encode(offloaded, PROMPT)
    with torch.no_grad():
        outputs = [
            m(**inputs, output_hidden_states=True, output_router_logits=True) for m in (offloaded.model, reference)
        ]
    for ours, theirs in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(outputs[0].router_logits, outputs[1].router_logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


# -- what OffloadedModel adds --


def expected_text(offloaded: OffloadedModel, inputs: Any, max_new_tokens: int) -> str:
    tokens = offloaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(offloaded.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_generate_and_stream_agree(offloaded):
    expected = expected_text(offloaded, encode(offloaded, PROMPT), 10)
    assert offloaded.generate(PROMPT, max_new_tokens=10) == expected
    assert offloaded.generate(PROMPT, max_new_tokens=10, temperature=0) == expected
    pieces = list(offloaded.stream(PROMPT, max_new_tokens=10))
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_a_seed_makes_sampling_repeatable(offloaded):
    sampling = {"max_new_tokens": 16, "temperature": 1.5, "top_p": 0.95, "top_k": 100}
    texts = [offloaded.generate(PROMPT, seed=seed, **sampling) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert "".join(offloaded.stream(PROMPT, seed=1, **sampling)) == texts[0]


def test_chat_follows_the_template(offloaded):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    expected = expected_text(offloaded, encode(offloaded, "s:be brief\nu:hello\na:"), 8)
    assert offloaded.chat(messages, max_new_tokens=8) == expected
    assert "".join(offloaded.stream_chat(messages, max_new_tokens=8)) == expected


def test_what_a_template_refuses_is_said(offloaded):
    with pytest.raises(ConfigError, match="no such role"):
        offloaded.chat([{"role": "narrator", "content": "x"}])


def test_the_end_token_ends_the_answer_and_is_not_shown(offloaded, monkeypatch):
    tokens = offloaded.model.generate(**encode(offloaded, PROMPT), max_new_tokens=10, do_sample=False)
    third = int(tokens[0, len(PROMPT) + 2])
    monkeypatch.setattr(offloaded.model.generation_config, "eos_token_id", third)
    offloaded.generate(PROMPT, max_new_tokens=10)
    new_tokens = tokens[0, len(PROMPT) :].tolist()
    assert offloaded.last_run.new_tokens == new_tokens.index(third) + 1


def test_last_run_and_stats_count(offloaded):
    before = offloaded.stats
    offloaded.generate(PROMPT, max_new_tokens=6)
    run = offloaded.last_run
    assert run.prompt_tokens == len(PROMPT)
    assert 1 <= run.new_tokens <= 6
    assert run.hits + run.misses > 0
    assert 0 <= run.hit_ratio <= 1
    assert run.bytes_read > 0
    assert run.time_to_first_token_s > 0
    after = offloaded.stats
    assert after.new_tokens - before.new_tokens == run.new_tokens
    assert after.prompt_tokens - before.prompt_tokens == run.prompt_tokens
    assert after.hits - before.hits == run.hits
    assert after.bytes_read - before.bytes_read == run.bytes_read


def test_stop_ends_a_stream_and_the_next_one_runs(offloaded):
    whole = offloaded.generate(PROMPT, max_new_tokens=60)
    stream = offloaded.stream(PROMPT, max_new_tokens=60)
    start = next(stream)
    offloaded.stop()
    rest = "".join(stream)
    assert whole.startswith(start + rest)
    assert offloaded.last_run.new_tokens < 60
    assert offloaded.generate(PROMPT, max_new_tokens=60) == whole


def test_leaving_a_stream_stops_it(offloaded):
    num_threads = threading.active_count()
    stream = offloaded.stream(PROMPT, max_new_tokens=100)
    next(stream)
    stream.close()
    assert threading.active_count() <= num_threads
    assert offloaded.last_run.new_tokens < 100


def test_a_long_prompt_in_pieces_gives_the_same_tokens(offloaded, reference, monkeypatch):
    prompt = "the quick brown fox jumps over the lazy dog, and again " * 2
    inputs = encode(offloaded, prompt[:100])
    expected = reference.generate(**inputs, max_new_tokens=8, do_sample=False)[0, 100:]
    calls: list[int] = []
    hook = offloaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(offloaded._generator, "_chunk_tokens", 32)
    try:
        text = offloaded.generate(prompt[:100], max_new_tokens=8)
    finally:
        hook.remove()
    assert text == offloaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert calls[:4] == [32, 32, 32, 4]


def test_the_context_is_kept(offloaded):
    with pytest.raises(ConfigError, match=r"the prompt has 128 tokens, the context holds 128; .*--context"):
        offloaded.generate("x" * 128)
    with pytest.raises(ConfigError, match="the prompt has 200 tokens"):
        list(offloaded.stream("x" * 200))
    offloaded.generate("x" * 120, max_new_tokens=100)
    assert offloaded.last_run.new_tokens <= 8


BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": 1, "top_p": 0}, "top_p is 0"),
    ({"temperature": 1, "top_p": 1.1}, r"top_p is 1\.1"),
    ({"temperature": 1, "top_k": 0}, "top_k is 0"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD_SAMPLING)
def test_bad_sampling_is_refused(arguments, text, offloaded):
    messages = [{"role": "user", "content": "x"}]
    for run in (
        lambda: offloaded.generate(PROMPT, **arguments),
        lambda: list(offloaded.stream(PROMPT, **arguments)),
        lambda: offloaded.chat(messages, **arguments),
        lambda: list(offloaded.stream_chat(messages, **arguments)),
    ):
        with pytest.raises(ConfigError, match=text):
            run()


def test_unknown_arguments_and_empty_prompts_are_refused(offloaded):
    with pytest.raises(ConfigError, match="unknown arguments max_tokens; known are max_new_tokens"):
        offloaded.chat([{"role": "user", "content": "x"}], max_tokens=3)
    with pytest.raises(TypeError):
        offloaded.generate(PROMPT, max_tokens=3)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        offloaded.generate("")
    with pytest.raises(ConfigError, match="has no messages"):
        offloaded.chat([])


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"device": "tpu"}, "tpu"),
    ({"device": "meta"}, "meta"),
    ({"dtype": "int8"}, "dtype 'int8' is not supported"),
    ({"policy": "random"}, "no policy 'random'; there are: "),
    ({"verify": "sometimes"}, "verify is 'sometimes'; use first, always, off"),
    ({"context_tokens": 0}, "context_tokens is 0"),
    ({"prefetch": "far"}, "far"),
    ({"prefetch": -1}, "-1"),
    ({"ram": "lots"}, "lots"),
    ({"ram": "-1GiB"}, "-1GiB"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD_SETTINGS)
def test_bad_settings_are_refused(arguments, text, offloaded, pack):
    with pytest.raises(ConfigError, match=text):
        OffloadedModel.from_pretrained(pack, **({"device": "cpu", "context_tokens": 64, "ram": "1GiB"} | arguments))


def test_saving_is_refused_with_the_reason(offloaded, tmp_path):
    for save in (offloaded.save_pretrained, offloaded.model.save_pretrained):
        with pytest.raises(ConfigError, match="save_pretrained is refused: the experts are not in the model"):
            save(tmp_path / "saved")
    with pytest.raises(ConfigError, match="save_pretrained is refused"):
        offloaded.model.push_to_hub("somebody/something")
    assert not (tmp_path / "saved").exists()


def test_a_closed_model_says_so(offloaded, pack):
    with OffloadedModel.from_pretrained(pack, device="cpu", ram="1GiB", context_tokens=64) as second:
        assert second.generate(PROMPT, max_new_tokens=4) == offloaded.generate(PROMPT, max_new_tokens=4)
        stream = second.stream(PROMPT, max_new_tokens=40)
        next(stream)
    inputs = encode(second, PROMPT)
    for run in (lambda: second.generate(PROMPT), lambda: second.model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ConfigError, match="closed"):
            run()
    list(stream)
    second.close()


def test_a_model_without_a_tokenizer_or_template(checkpoint, tmp_path):
    bare = save_random_model(make_config("mixtral"), tmp_path / "bare")
    with load_smallest(bare, pack_dir=tmp_path / "pack") as loaded:
        assert loaded.tokenizer is None
        with pytest.raises(ConfigError, match="came without a tokenizer"):
            loaded.generate(PROMPT)
        with pytest.raises(ConfigError, match="no chat template"):
            loaded.chat([{"role": "user", "content": "x"}])
        assert loaded.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape[1] <= 5


def test_an_encoder_decoder_answers_in_text(tmp_path):
    config = make_config("switch_transformers", vocab_size=VOCAB_SIZE, eos_token_id=2)
    folder = save_random_model(config, tmp_path / "checkpoint")
    save_tokenizer(folder)
    with load_smallest(folder, pack_dir=tmp_path / "pack", format="source") as loaded:
        inputs = encode(loaded, PROMPT)
        tokens = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected = loaded.tokenizer.decode(tokens[0], skip_special_tokens=True)
        assert loaded.generate(PROMPT, max_new_tokens=8) == expected
        assert "".join(loaded.stream(PROMPT, max_new_tokens=8)) == expected
        assert 1 <= loaded.last_run.new_tokens <= 8
