"""The hf engine against plain transformers: tokens, log-probs, caches, weights, and independence of the batch."""

from __future__ import annotations

import asyncio
import copy
import random
from dataclasses import replace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from spear_fast.errors import EngineError
from spear_fast.rollout.engine import GenerationRequest
from spear_fast.rollout.hf_engine import HFEngine
from spear_fast.weights_digest import digest
from tests.rollout.test_sampling import nucleus_logps

VOCAB = 37
STOP = 5
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def make_model(tied: bool = True, seed: int = 0) -> Qwen2ForCausalLM:
    config = Qwen2Config(**SHAPE, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config).eval()


def make_engine(model: Qwen2ForCausalLM, slots: int = 8, deterministic: bool = False) -> HFEngine:
    return HFEngine(copy.deepcopy(model), max_slots=slots, max_model_tokens=48, deterministic=deterministic)


def request(uid: int, prompt: list[int], max_tokens: int = 12, temperature: float = 1.0) -> GenerationRequest:
    return GenerationRequest(uid, prompt, max_tokens, temperature, (STOP,), seed=1000 + uid)


def prompt_of(uid: int) -> list[int]:
    return random.Random(uid).choices(range(6, VOCAB), k=3 + uid % 7)


def generate(engine: HFEngine, requests: list[GenerationRequest]):
    async def run():
        return await asyncio.gather(*(engine.generate(each) for each in requests))

    return asyncio.run(run())


@torch.no_grad()
def reference_logps(model: Qwen2ForCausalLM, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("tied", [True, False])
def test_logps_of_many_concurrent_turns_equal_transformers(tied):
    model = make_model(tied)
    engine = make_engine(model)

    async def trajectory(uid: int):
        tokens, spans = prompt_of(uid), []
        for turn in range(3):
            completion = await engine.generate(request(uid, list(tokens), 3 + uid % 5, 0.7))
            spans.append((list(tokens), completion))
            tokens += [*completion.tokens, 9, 9 + turn]
            await asyncio.sleep(0.001 * (uid % 3))
        return spans

    async def run():
        return await asyncio.gather(*(trajectory(uid) for uid in range(20)))

    for spans in asyncio.run(run()):
        for prompt, completion in spans:
            expected = reference_logps(model, prompt, completion.tokens, 0.7)
            assert torch.allclose(torch.tensor(completion.logps).double(), expected, atol=1e-5)


def test_greedy_tokens_equal_transformers():
    model = make_model()
    prompts = [prompt_of(uid) for uid in range(6)]
    completions = generate(make_engine(model), [request(i, p, temperature=0.0) for i, p in enumerate(prompts)])
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=STOP, pad_token_id=0
        )[0, len(prompt) :]
        assert completion.tokens == expected.tolist()


def test_top_p_draws_from_the_nucleus_only():
    model = make_model()
    requests = [replace(request(uid, prompt_of(uid)), top_p=0.5 if uid % 2 else 1.0) for uid in range(8)]
    for each, completion in zip(requests, generate(make_engine(model), requests), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([each.prompt + completion.tokens])).logits[0, len(each.prompt) - 1 : -1]
        allowed = nucleus_logps(logits, each.top_p)
        for logps, token, logp in zip(allowed, completion.tokens, completion.logps, strict=True):
            assert abs(logps[token] - logp) < 1e-4


def test_a_draw_does_not_depend_on_the_company_it_is_made_in():
    model = make_model()
    requests = [request(uid, prompt_of(uid)) for uid in range(20)]
    together = generate(make_engine(model, slots=20), requests)
    queued = generate(make_engine(model, slots=3), requests[::-1])[::-1]
    alone = [generate(make_engine(model), [each])[0] for each in requests]
    assert [c.tokens for c in together] == [c.tokens for c in queued] == [c.tokens for c in alone]


def test_group_samples_share_a_prompt_and_differ():
    model = make_model()
    prompt = prompt_of(3)
    completions = generate(make_engine(model), [request(uid, prompt) for uid in range(8)])
    assert len({tuple(c.tokens) for c in completions}) > 1
    for completion in completions:
        expected = reference_logps(model, prompt, completion.tokens, 1.0)
        assert torch.allclose(torch.tensor(completion.logps).double(), expected, atol=1e-5)


def test_stop_length_and_context_limits():
    model = make_model()
    engine = make_engine(model)
    for uid in range(30):
        completion = generate(engine, [request(uid, prompt_of(uid), max_tokens=6)])[0]
        if completion.finish == "stop":
            assert completion.tokens[-1] == STOP and STOP not in completion.tokens[:-1]
        else:
            assert len(completion.tokens) == 6 and STOP not in completion.tokens
    full = generate(engine, [request(99, [7] * 46, max_tokens=12)])[0]
    assert len(full.tokens) <= 2
    with pytest.raises(EngineError, match="prompt of 48 tokens"):
        generate(engine, [request(99, [7] * 48)])


def test_new_weights_are_used_at_once_and_old_caches_are_not():
    old, new = make_model(seed=0), make_model(seed=1)
    engine = make_engine(old)
    prompt = prompt_of(1)
    first = generate(engine, [request(1, prompt, temperature=0.0)])[0]
    engine.load_weights(new.named_parameters(), version=7)
    longer = [*prompt, *first.tokens, 8, 9]
    second = generate(engine, [request(1, longer, temperature=0.0)])[0]
    expected = reference_logps(new, longer, second.tokens, 1.0)
    assert torch.allclose(torch.tensor(second.logps).double(), expected, atol=1e-5)
    assert (first.version, second.version) == (0, 7)


def test_partial_or_foreign_weights_are_refused():
    model = make_model()
    engine = make_engine(model)
    named = list(model.named_parameters())
    with pytest.raises(EngineError, match="no value for"):
        engine.load_weights(named[1:], version=1)
    with pytest.raises(EngineError, match="lacks"):
        engine.load_weights([("nonsense", torch.zeros(1))], version=1)
    assert engine.weights_version == 0


def test_weights_cannot_change_under_running_requests():
    model = make_model()
    engine = make_engine(model)

    async def run():
        running = asyncio.ensure_future(engine.generate(request(1, prompt_of(1))))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="requests are running"):
            engine.load_weights(model.named_parameters(), version=1)
        await running

    asyncio.run(run())


def test_sleep_keeps_version_and_answers():
    model = make_model()
    engine = make_engine(model)
    engine.load_weights(model.named_parameters(), version=3)
    before = generate(engine, [request(1, prompt_of(1))])[0]
    for _ in range(20):
        engine.sleep()
        engine.wake()
        assert generate(engine, [request(1, prompt_of(1))])[0] == before


def test_deterministic_mode_repeats_bit_for_bit_whatever_tools_cost():
    model = make_model()

    def run_once(delay_seed: int):
        engine = make_engine(model, slots=16, deterministic=True)
        delays = random.Random(delay_seed)
        started = []

        async def trajectory(uid: int):
            with engine.participant():
                prompt = prompt_of(uid)
                one = await engine.generate(request(uid, prompt, 4))
                await asyncio.sleep(0.02 * delays.random())
                started.append(uid)
                two = await engine.generate(request(uid, [*prompt, *one.tokens, 9], 6))
                return one, two

        async def run():
            return await asyncio.gather(*(trajectory(uid) for uid in range(12)))

        return asyncio.run(run()), started

    (first, order_one), (second, order_two) = run_once(1), run_once(2)
    assert order_one != order_two
    assert first == second


def test_abort_answers_everyone_and_leaves_the_engine_usable():
    engine = make_engine(make_model(), slots=2)

    async def run():
        running = [asyncio.ensure_future(engine.generate(request(uid, prompt_of(uid)))) for uid in range(5)]
        for _ in range(3):
            await asyncio.sleep(0)
        engine.pause()  # which ends with the requests
        engine.abort()
        return await asyncio.gather(*running, return_exceptions=True)

    results = asyncio.run(run())
    assert sum(isinstance(result, EngineError) for result in results) >= 3
    assert generate(engine, [request(1, prompt_of(1))])[0].tokens


def test_logps_that_are_not_numbers_abort_the_request():
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = float("nan")
    engine = make_engine(model)
    completion = generate(engine, [request(1, [7, 9])])[0]
    assert completion.finish == "abort"


def test_sliding_windows_are_kept():
    config = MistralConfig(**SHAPE, head_dim=8, sliding_window=6)
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    prompt = [8, 9] * 10
    completion = generate(make_engine(model), [request(1, prompt, temperature=1.0)])[0]
    expected = reference_logps(model, prompt, completion.tokens, 1.0)
    assert torch.allclose(torch.tensor(completion.logps).double(), expected, atol=1e-5)


def test_a_failure_reaches_every_request_and_the_engine_recovers(monkeypatch):
    engine = make_engine(make_model())
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(EngineError, match="out of memory"):
            generate(engine, [request(uid, prompt_of(uid % 2)) for uid in range(12)])
    assert generate(engine, [request(1, prompt_of(1))])[0].tokens


def test_a_paused_request_goes_on_as_if_nothing_had_happened():
    model = make_model()
    requests = [request(uid, prompt_of(uid % 4), max_tokens=30) for uid in range(12)]
    expected = generate(make_engine(model, slots=5), requests)
    engine = make_engine(model, slots=5)
    engine.load_weights(model.named_parameters(), version=3)

    async def run():
        running = [asyncio.ensure_future(engine.generate(each)) for each in requests]
        for version in range(4, 8):
            for _ in range(6):
                await asyncio.sleep(0)
            engine.pause()
            await asyncio.sleep(0.01)
            held = [list(each.sampled) for each in engine._waiting]
            engine.load_weights(model.named_parameters(), version)
            assert held == [each.sampled for each in engine._waiting] and any(held)
            engine.sleep()
            engine.wake()
            engine.resume()
        return await asyncio.gather(*running)

    for one, other in zip(asyncio.run(run()), expected, strict=True):
        assert one.tokens == other.tokens and one.finish == other.finish
        assert torch.allclose(torch.tensor(one.logps), torch.tensor(other.logps), atol=1e-5)
        assert 3 <= one.version <= 7


def test_a_request_that_was_paused_reports_its_oldest_weights():
    old, new = make_model(seed=0), make_model(seed=1)
    engine = make_engine(old)
    prompt = prompt_of(3)

    async def run():
        running = asyncio.ensure_future(engine.generate(request(1, prompt, 20, temperature=0.0)))
        while not engine._running:
            await asyncio.sleep(0)
        engine.pause()
        late = asyncio.ensure_future(engine.generate(request(2, prompt, 3)))
        await asyncio.sleep(0.01)
        assert not late.done()
        engine.load_weights(new.named_parameters(), version=1)
        kept = len(next(each for each in engine._waiting if each.request.uid == 1).sampled)
        engine.resume()
        return await running, kept, await late

    completion, kept, late = asyncio.run(run())
    assert 0 < kept < len(completion.tokens)
    before = reference_logps(old, prompt, completion.tokens[:kept], 1.0)
    after = reference_logps(new, prompt + completion.tokens[:kept], completion.tokens[kept:], 1.0)
    assert torch.allclose(torch.tensor(completion.logps).double(), torch.cat([before, after]), atol=1e-5)
    assert (completion.version, late.version) == (0, 1)


def test_the_digest_is_that_of_the_weights_that_were_pushed():
    engine, model = make_engine(make_model(seed=0)), make_model(seed=1)
    expected = {name: digest(parameter) for name, parameter in model.named_parameters()}
    assert engine.weights_digest() != expected
    engine.load_weights(model.named_parameters(), version=1)
    assert engine.weights_digest() == expected
