"""The vllm engine, in this process and in its own, against plain transformers: a real vLLM on the CPU."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from spear_fast.errors import ConfigError, EngineError
from spear_fast.rollout.engine import Completion, GenerationRequest
from spear_fast.rollout.vllm_engine import VllmEngine
from spear_fast.rollout.vllm_factory import make_vllm_engine
from spear_fast.rollout.vllm_isolation import LAUNCHER
from spear_fast.rollout.vllm_process import CoreProcess
from spear_fast.weights_digest import digest
from tests.rollout.test_sampling import nucleus_logps

HEAD_ROWS = 70
VOCAB = 61
"""The head has nine rows that no tokenizer knows."""
STOP = 5
MAX_TOKENS = 192
"""More than the 128 tokens of a block of the CPU's KV cache, so that a prompt can be cached."""


def make_model(seed: int = 0, tied: bool = True, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=HEAD_ROWS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config).eval().to(dtype)


def start(folder, model: Qwen2ForCausalLM, placement: str = "inproc", **changes) -> VllmEngine:
    model.config.save_pretrained(folder)
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_tokens": MAX_TOKENS,
        "max_concurrent": 16,
        "vocab_size": VOCAB,
        "kv_cache_bytes": None,
        "max_batched_tokens": 512,
        "enforce_eager": True,
        "prefix_caching": True,
        "sleep_level": 0,
        "deterministic": False,
        "device": torch.device("cpu"),
        "seed": 0,
        "bucket_bytes": 20_000,  # smaller than the largest parameter, so that buckets fill and grow
    }
    return make_vllm_engine(str(folder), placement=placement, **{**settings, **changes})


@pytest.fixture(scope="module", params=["inproc", "process"])
def engine(request, tmp_path_factory):
    engine = start(tmp_path_factory.mktemp("model"), make_model(), request.param)
    yield engine
    engine.close()


def push(engine: VllmEngine, model: Qwen2ForCausalLM, version: int = 1) -> Qwen2ForCausalLM:
    engine.load_weights(model.named_parameters(), version)
    return model


def request(uid: int, prompt: list[int], max_tokens: int = 12, temperature: float = 1.0) -> GenerationRequest:
    return GenerationRequest(uid, prompt, max_tokens, temperature, (STOP,), seed=2**63 + 1000 + uid)


def prompt_of(uid: int, length: int | None = None) -> list[int]:
    return random.Random(uid).choices(range(6, VOCAB), k=length or 3 + uid % 7)


def generate(engine: VllmEngine, requests: list[GenerationRequest]) -> list[Completion]:
    async def run():
        return await asyncio.gather(*(engine.generate(each) for each in requests))

    return asyncio.run(run())


@torch.no_grad()
def reference_logps(model, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1, :VOCAB].double()
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def gap(model, prompt: list[int], completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    expected = reference_logps(model, prompt, completion.tokens, temperature)
    return (torch.tensor(completion.logps).double() - expected).abs()


@torch.no_grad()
def greedy(model, prompt: list[int], count: int, stop: int | None = STOP) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and tokens[-1] != stop:
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1, :VOCAB].argmax()))
    return tokens[len(prompt) :]


def test_logps_of_many_concurrent_turns_equal_transformers(engine):
    model = push(engine, make_model())

    async def trajectory(uid: int):
        tokens, spans = prompt_of(uid), []
        for turn in range(3):
            completion = await engine.generate(request(uid, list(tokens), 3 + uid % 5, 0.7))
            spans.append((list(tokens), completion))
            tokens += [*completion.tokens, 9, 9 + turn]
            await asyncio.sleep(0.001 * (uid % 3))
        return spans

    async def run():
        return await asyncio.gather(*(trajectory(uid) for uid in range(24)))

    finishes = set()
    for spans in asyncio.run(run()):
        for prompt, completion in spans:
            assert gap(model, prompt, completion, 0.7).max() < 1e-4
            finishes.add(completion.finish)
            stopped = completion.finish == "stop"
            assert (completion.tokens[-1] == STOP) == stopped and STOP not in completion.tokens[:-1]
    assert finishes == {"stop", "length"}


def test_new_weights_are_used_at_once_and_old_caches_are_not(engine):
    prompt = prompt_of(1, length=150)  # a whole block of it is cached
    for version, seed in ((3, 0), (4, 1), (5, 0)):
        model = push(engine, make_model(seed), version)
        for _ in range(2):
            (completion,) = generate(engine, [request(1, prompt, temperature=0.0)])
            assert completion.tokens == greedy(model, prompt, 12)
            assert gap(model, prompt, completion).max() < 1e-4
            assert completion.version == version


def test_every_weight_arrives_bit_for_bit(engine):
    model = push(engine, make_model(2))
    assert engine.weights_digest() == {name: digest(parameter) for name, parameter in model.named_parameters()}


def test_no_token_of_the_padding_is_sampled_nor_has_probability(engine):
    model = make_model(3)
    with torch.no_grad():  # the padding would win every draw
        model.model.embed_tokens.weight[VOCAB:] = 40 * model.model.embed_tokens.weight[VOCAB - 1]
        model.model.embed_tokens.weight[VOCAB + 1 :] *= -1
    push(engine, model)
    for temperature in (0.0, 1.0):
        requests = [request(uid, prompt_of(uid), 30, temperature) for uid in range(6)]
        for each, completion in zip(requests, generate(engine, requests), strict=True):
            assert max(completion.tokens) < VOCAB
            assert gap(model, each.prompt, completion).max() < 1e-4


def test_top_p_draws_from_the_nucleus_only(engine):
    model = push(engine, make_model())
    requests = [replace(request(uid, prompt_of(uid)), top_p=0.5 if uid % 2 else 1.0) for uid in range(8)]
    for each, completion in zip(requests, generate(engine, requests), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([each.prompt + completion.tokens])).logits[0, len(each.prompt) - 1 : -1, :VOCAB]
        allowed = nucleus_logps(logits, each.top_p)
        for logps, token, logp in zip(allowed, completion.tokens, completion.logps, strict=True):
            assert abs(logps[token] - logp) < 1e-4


def test_equal_requests_get_equal_tokens_and_other_seeds_others(engine):
    push(engine, make_model())
    same = [GenerationRequest(uid, [7, 8, 9], 20, 1.0, (), seed=11) for uid in range(3)]
    other = [GenerationRequest(uid, [7, 8, 9], 20, 1.0, (), seed=uid) for uid in range(3)]
    one, two = generate(engine, same + other), generate(engine, other + same)
    assert len({tuple(c.tokens) for c in one[:3] + two[3:]}) == 1
    assert len({tuple(c.tokens) for c in one[3:]}) == 3
    assert [c.tokens for c in one[3:]] == [c.tokens for c in two[:3]]


def test_more_prompt_than_a_batch_holds_is_served(engine):
    model = push(engine, make_model())
    requests = [request(uid, prompt_of(uid, length=150), 3) for uid in range(20)]
    for each, completion in zip(requests, generate(engine, requests), strict=True):
        assert gap(model, each.prompt, completion).max() < 1e-4


def test_a_paused_request_keeps_its_tokens_and_goes_on_under_new_weights(engine):
    old, new = make_model(0), make_model(1)
    push(engine, old, 7)
    prompts = [prompt_of(uid, length=20) for uid in range(4)]

    async def run():
        running = [
            asyncio.ensure_future(engine.generate(GenerationRequest(uid, prompt, 150, 0.0, (), seed=uid)))
            for uid, prompt in enumerate(prompts)
        ]
        while not any(len(opened.tokens) >= 10 for opened in engine._open):
            await asyncio.sleep(0)
            engine._core.interrupt()  # brings what was sampled so far
        engine.pause()
        kept = {opened.request.uid: (list(opened.tokens), list(opened.logps)) for opened in engine._open}
        late = asyncio.ensure_future(engine.generate(request(9, prompts[0], 5, 0.0)))
        await asyncio.sleep(0.05)
        assert kept == {
            opened.request.uid: (opened.tokens, opened.logps) for opened in engine._open if opened.request.uid != 9
        }
        push(engine, new, 8)
        engine.resume()
        return kept, await asyncio.gather(*running), await late

    kept, completions, late = asyncio.run(run())
    assert late.version == 8 and late.tokens == greedy(new, prompts[0], 5)
    assert any(0 < len(tokens) < 150 for tokens, _ in kept.values())
    for uid, completion in enumerate(completions):
        tokens, logps = kept[uid]
        count = len(tokens)
        assert completion.tokens[:count] == tokens and completion.logps[:count] == logps
        assert tokens == greedy(old, prompts[uid], count, stop=None)
        assert completion.tokens[count:] == greedy(new, prompts[uid] + tokens, 150 - count, stop=None)
        assert len(completion.tokens) == len(completion.logps) == 150 and completion.finish == "length"
        assert completion.version == (7 if tokens else 8)


def test_draws_after_a_pause_do_not_repeat_those_before(engine):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every token has the same probability, so tokens show the draws
    push(engine, model)

    async def run():
        running = asyncio.ensure_future(engine.generate(GenerationRequest(0, [7], 180, 1.0, (), seed=1)))
        while not any(len(opened.tokens) >= 10 for opened in engine._open):
            await asyncio.sleep(0)
            engine._core.interrupt()  # brings what was sampled so far
        engine.pause()
        count = sum(len(opened.tokens) for opened in engine._open)
        engine.resume()
        return count, (await running).tokens

    count, tokens = asyncio.run(run())
    assert 10 <= count < 170 and len(set(tokens[:10])) > 3
    assert tokens[count : count + 10] != tokens[:10]


def test_weights_cannot_change_under_running_requests(engine):
    model = push(engine, make_model(), 1)

    async def run():
        running = asyncio.ensure_future(engine.generate(request(1, prompt_of(1))))
        await asyncio.sleep(0)
        for call in (lambda: push(engine, model, 2), engine.sleep):
            with pytest.raises(EngineError, match="requests are running"):
                call()
        await running

    asyncio.run(run())
    assert engine.weights_version == 1


def test_partial_or_foreign_weights_are_refused_and_never_sampled_from(engine):
    model = push(engine, make_model(), 1)
    named = list(model.named_parameters())
    with pytest.raises(EngineError, match="no value for"):
        engine.load_weights(named[1:], version=2)
    with pytest.raises(EngineError, match="no complete weights"):
        generate(engine, [request(1, [7])])
    with pytest.raises(EngineError, match="nonsense"):
        engine.load_weights([("nonsense", torch.zeros(1))], version=2)
    assert engine.weights_version == 1 and engine.alive
    push(engine, model, 2)
    assert generate(engine, [request(1, [7])])[0].version == 2


def test_requests_that_cannot_be_served_are_refused_alone(engine):
    push(engine, make_model())
    bad = [
        request(1, []),
        request(1, [7] * MAX_TOKENS),
        request(1, [VOCAB]),
        request(1, [-1]),
        request(1, [7], max_tokens=0),
        request(1, [7], temperature=1e-4),
    ]

    async def run():
        good = asyncio.ensure_future(engine.generate(request(2, [7, 8])))
        refused = await asyncio.gather(*(engine.generate(each) for each in bad), return_exceptions=True)
        return await good, refused

    good, refused = asyncio.run(run())
    assert good.tokens and all(isinstance(error, EngineError) for error in refused)
    (full,) = generate(engine, [GenerationRequest(1, [7] * (MAX_TOKENS - 2), 12, 1.0, (), seed=1)])
    assert len(full.tokens) == 2 and full.finish == "length"


def test_abort_and_cancel_leave_the_engine_usable(engine):
    push(engine, make_model())

    async def run():
        running = [
            asyncio.ensure_future(engine.generate(GenerationRequest(uid, [7, 8], 180, 1.0, (), uid)))
            for uid in range(20)
        ]
        await asyncio.sleep(0.05)
        running[0].cancel()
        await asyncio.sleep(0.01)
        engine.pause()  # which ends with the requests
        engine.abort()
        return await asyncio.gather(*running, return_exceptions=True)

    results = asyncio.run(run())
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, EngineError) for result in results[1:])

    async def left_behind():
        running = asyncio.ensure_future(engine.generate(GenerationRequest(1, [7, 8], 180, 1.0, (), 1)))
        await asyncio.sleep(0.05)
        assert not running.done()

    asyncio.run(left_behind())  # ends, and cancels what still runs
    model = push(engine, make_model(1), 5)
    (completion,) = generate(engine, [request(1, prompt_of(1), temperature=0.0)])
    assert completion.tokens == greedy(model, prompt_of(1), 12)


def test_sleep_keeps_version_and_answers(engine):
    push(engine, make_model(), 3)
    (before,) = generate(engine, [request(1, prompt_of(1))])
    for _ in range(20):
        engine.sleep()
        engine.wake()
    assert generate(engine, [request(1, prompt_of(1))]) == [before]
    assert before.version == 3


def test_logps_that_are_not_numbers_abort_the_request_only(engine):
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = float("nan")
        model.model.layers[0].self_attn.q_proj.weight[:] = 0  # keep the rest finite
    model.config.tie_word_embeddings = False
    push(engine, model)
    (completion,) = generate(engine, [request(1, [7, 9])])
    assert completion.finish == "abort" and len(completion.tokens) == 1


def test_the_random_state_of_the_trainer_is_untouched(engine):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    model = make_model()
    before = states()
    push(engine, model)
    generate(engine, [request(uid, prompt_of(uid)) for uid in range(3)])
    engine.sleep()
    engine.wake()
    assert states() == before


def test_an_engine_that_dies_fails_its_requests_and_comes_back_with_the_next_weights(engine, monkeypatch):
    push(engine, make_model(0), 1)
    dead = engine._core

    async def run():
        running = [
            asyncio.ensure_future(engine.generate(GenerationRequest(uid, [7, 8], 180, 1.0, (), uid)))
            for uid in range(4)
        ]
        while not engine._running:
            await asyncio.sleep(0.001)
        if isinstance(dead, CoreProcess):
            os.kill(dead.pid, signal.SIGKILL)
        else:
            monkeypatch.setattr(dead._core._llm, "step", lambda: 1 // 0)
        return await asyncio.gather(*running, return_exceptions=True)

    reason = "exit code -9" if isinstance(dead, CoreProcess) else "ZeroDivisionError"
    assert all(isinstance(each, EngineError) and reason in str(each) for each in asyncio.run(run()))
    assert not engine.alive
    with pytest.raises(EngineError, match="load_weights starts a new one"):
        generate(engine, [request(1, [7])])
    for name in LAUNCHER:  # as torchrun sets them
        monkeypatch.setenv(name, "7")
    model = push(engine, make_model(1), 2)
    assert engine.alive and engine._core is not dead and os.environ["RANK"] == "7"
    (completion,) = generate(engine, [request(1, prompt_of(1), temperature=0.0)])
    assert completion.tokens == greedy(model, prompt_of(1), 12) and completion.version == 2
    if isinstance(engine._core, CoreProcess):
        environment = Path(f"/proc/{engine._core.pid}/environ").read_text().split("\0")
        assert not {f"{name}=7" for name in LAUNCHER} & set(environment)


@pytest.mark.parametrize("tied, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_untied_heads_and_bfloat16(tmp_path, tied, dtype):
    random_state = torch.get_rng_state()
    engine = start(tmp_path, make_model(0, tied, dtype), prefix_caching=False)
    torch.set_rng_state(random_state)
    try:
        for version in range(2):
            model = push(engine, make_model(version, tied, dtype), version)
            assert engine.weights_digest().keys() >= dict(model.named_parameters()).keys()
            requests = [request(uid, prompt_of(uid), 20) for uid in range(8)]
            gaps = [gap(model, r.prompt, c) for r, c in zip(requests, generate(engine, requests), strict=True)]
            assert torch.cat(gaps).mean() < (1e-4 if dtype == torch.float32 else 0.02)
    finally:
        engine.close()


def test_deterministic_mode_repeats_bit_for_bit_whatever_tools_cost(tmp_path):
    model = make_model()
    engine = start(tmp_path, model, deterministic=True)

    def run_once(delay_seed: int):
        push(engine, model, 1)
        delays = random.Random(delay_seed)
        order = []

        async def trajectory(uid: int):
            with engine.participant():
                prompt = prompt_of(uid)
                one = await engine.generate(request(uid, prompt, 4 + uid % 3))
                await asyncio.sleep(0.02 * delays.random())
                order.append(uid)
                return one, await engine.generate(request(uid, [*prompt, *one.tokens, 9], 6))

        async def run():
            return await asyncio.gather(*(trajectory(uid) for uid in range(12)))

        return asyncio.run(run()), order

    try:
        (first, order_one), (second, order_two) = run_once(1), run_once(2)
    finally:
        engine.close()
    assert order_one != order_two
    assert first == second


def test_starting_leaves_the_process_as_it_was(tmp_path):
    environment, threads = dict(os.environ), torch.get_num_threads()
    torch.manual_seed(5)
    engine = start(tmp_path, make_model())
    torch.manual_seed(5)
    expected = torch.rand(3)
    make_model()
    torch.manual_seed(5)
    engine.close()
    assert torch.equal(torch.rand(3), expected)
    assert not torch.distributed.is_initialized()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    changed = {name for name in os.environ if os.environ[name] != environment.get(name)}
    assert not {name for name in changed if name.startswith(("LD_", "NUMEXPR", "OMP", "TORCHINDUCTOR"))}


def test_what_vllm_cannot_run_is_refused_before_it_starts(tmp_path):
    narrow = make_model()
    narrow.config.hidden_size = 32  # heads of width 16
    with pytest.raises(ConfigError, match="no heads of width 16"):
        start(tmp_path, narrow)
    with pytest.raises(ConfigError, match="has 71 tokens"):
        start(tmp_path, make_model(), vocab_size=HEAD_ROWS + 1)
    with pytest.raises(ConfigError, match="needs CUDA"):
        start(tmp_path, make_model(), sleep_level=1)
    with pytest.raises(ConfigError, match="does not exist"):
        (tmp_path / "config.json").unlink()
        make_vllm_engine(
            str(tmp_path), placement="inproc", dtype="float32", max_model_tokens=8, max_concurrent=1, vocab_size=9,
            kv_cache_bytes=None, max_batched_tokens=8, enforce_eager=True, prefix_caching=True, sleep_level=0,
            deterministic=False, device=torch.device("cpu"), seed=0,
        )  # fmt: skip
