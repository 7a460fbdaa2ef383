"""Who samples in the rollout benchmark: our engines, transformers' generate, and vLLM used directly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from bench.common.engine_start import ENGINES, EngineSettings, start_engine
from bench.engines.load import Conversation, Turn
from spear_fast.rollout import vllm_compat
from spear_fast.rollout.engine import Engine, GenerationRequest
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Message:
    """What was sampled behind a prompt."""

    prompt: list[int]
    tokens: list[int]
    logps: list[float] | None
    """Nats, None where the contender gives none in a timed run."""
    answered_s: float
    """Seconds from the start of the run until the message was there."""


class Contender(Protocol):
    """Samples the conversations of a workload, all of them sent at once."""

    computes: str
    """What a timed run yields, in words."""

    def run(self, conversations: Sequence[Conversation], *, logps: bool) -> list[list[Message]]:
        """Sample the messages of each conversation; `logps` asks for log-probs even if a timed run has none."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class Ours:
    """One of our engines: a coroutine per conversation, no barrier between turns."""

    computes = "tokens and log-probs"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, conversations: Sequence[Conversation], *, logps: bool) -> list[list[Message]]:
        """See `Contender`."""
        started = time.perf_counter()

        async def converse(one: Conversation) -> list[Message]:
            context, messages = list(one.prompt), []
            for number, turn in enumerate(one.turns):
                seed = derive_seed(one.seed, number)
                completion = await self._engine.generate(
                    GenerationRequest(one.uid, list(context), turn.max_tokens, 1.0, (), seed)
                )
                answered = time.perf_counter() - started
                messages.append(Message(context, completion.tokens, completion.logps, answered))
                context = [*context, *completion.tokens, *turn.observed]
            return messages

        async def all_of_them() -> list[list[Message]]:
            return await asyncio.gather(*map(converse, conversations))

        return asyncio.run(all_of_them())

    def close(self) -> None:
        """See `Contender`."""
        self._engine.close()


class _TurnByTurn:
    """A loop around a batch generator: every turn waits for the slowest conversation, as trainers do that call one."""

    def run(self, conversations: Sequence[Conversation], *, logps: bool) -> list[list[Message]]:
        """See `Contender`."""
        started = time.perf_counter()
        contexts = [list(one.prompt) for one in conversations]
        messages: list[list[Message]] = [[] for _ in conversations]
        for number in range(max(len(one.turns) for one in conversations)):
            open_ones = [index for index, one in enumerate(conversations) if number < len(one.turns)]
            turns = [conversations[index].turns[number] for index in open_ones]
            seeds = [derive_seed(conversations[index].seed, number) for index in open_ones]
            answers = self.generate([contexts[index] for index in open_ones], turns, seeds, started, logps)
            for index, turn, message in zip(open_ones, turns, answers, strict=True):
                messages[index].append(message)
                contexts[index] = [*message.prompt, *message.tokens, *turn.observed]
        return messages

    def generate(
        self, prompts: list[list[int]], turns: list[Turn], seeds: list[int], started: float, logps: bool
    ) -> list[Message]:
        """One message for each prompt; `started` is when the run did."""
        raise NotImplementedError


class _SampledLogps:
    """A logits processor that notes the log-probs of what is sampled, and holds the scores of one step only."""

    def __init__(self) -> None:
        self._last: Tensor | None = None  # float32 [B, V]
        self._sampled: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are; `input_ids` ends with what was sampled from the last ones."""
        self._note(input_ids)
        self._last = torch.log_softmax(scores.float(), -1)
        return scores

    def _note(self, ids: Tensor) -> None:
        if self._last is not None:
            self._sampled.append(self._last.gather(1, ids[:, -1:]))

    def result(self, ids: Tensor) -> Tensor:
        """Log-probs of all steps, float32 [B, L] on the CPU, given the finished sequences."""
        self._note(ids)
        self._last = None
        return torch.cat(self._sampled, 1).cpu()


class TransformersGenerate(_TurnByTurn):
    """`model.generate` on left-padded batches; each batch runs until its longest message is complete."""

    computes = "tokens only"

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self._model: Any = model
        self._batch = batch

    def generate(
        self, prompts: list[list[int]], turns: list[Turn], seeds: list[int], started: float, logps: bool
    ) -> list[Message]:
        """See `_TurnByTurn`; one seed serves a batch, as generate takes no more."""
        messages = []
        for first in range(0, len(prompts), self._batch):
            part = slice(first, first + self._batch)
            torch.manual_seed(seeds[first] % 2**63)
            tokens, scores = self._generate(prompts[part], max(turn.max_tokens for turn in turns[part]), logps)
            answered = time.perf_counter() - started
            for index, (prompt, turn) in enumerate(zip(prompts[part], turns[part], strict=True)):
                own = None if scores is None else scores[index, : turn.max_tokens].tolist()
                messages.append(Message(prompt, tokens[index, : turn.max_tokens].tolist(), own, answered))
        return messages

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], max_tokens: int, logps: bool) -> tuple[Tensor, Tensor | None]:
        """Sampled tokens, int64 [B, max_tokens] on the CPU, and their log-probs."""
        width = max(map(len, prompts))
        ids, mask = (torch.zeros(len(prompts), width, dtype=torch.int64) for _ in range(2))
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        recorder = _SampledLogps()
        sequences = self._model.generate(
            input_ids=ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            max_new_tokens=max_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([recorder] if logps else []),
        )
        return sequences[:, width:].cpu(), recorder.result(sequences) if logps else None

    def close(self) -> None:
        """See `Contender`; the model is the caller's."""


class VllmGenerate(_TurnByTurn):
    """`vllm.LLM.generate`, with its own weights from a folder and its own choice of everything else."""

    computes = "tokens and log-probs"

    def __init__(self, folder: Path, model: PreTrainedModel, settings: EngineSettings) -> None:
        """Write the weights and start. Raises MissingDependencyError if vLLM is not installed."""
        vllm_compat.import_vllm()
        from vllm import LLM

        model.save_pretrained(folder)
        wanted: dict[str, Any] = {
            "dtype": str(settings.dtype).removeprefix("torch."),
            "kv_cache_memory_bytes": settings.kv_cache_bytes,
        }
        if settings.device.type == "cpu":
            wanted["enforce_eager"] = True  # its graphs would need a compiler and a minute
        else:
            # The cache has its size in bytes; a share of the device would be checked against what is free.
            wanted["gpu_memory_utilization"] = 0.01
        self._llm: Any = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            max_model_len=settings.max_model_tokens,
            max_num_seqs=settings.max_concurrent,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            **wanted,
        )

    def generate(
        self, prompts: list[list[int]], turns: list[Turn], seeds: list[int], started: float, logps: bool
    ) -> list[Message]:
        """See `_TurnByTurn`."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=turn.max_tokens,
                temperature=1.0,
                seed=seed & 0x7FFF_FFFF_FFFF_FFFF,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for turn, seed in zip(turns, seeds, strict=True)
        ]
        outputs = self._llm.generate([vllm_compat.token_prompt(prompt) for prompt in prompts], params, use_tqdm=False)
        answered = time.perf_counter() - started
        return [
            Message(prompt, list(output.outputs[0].token_ids), vllm_compat.sampled_logps(output.outputs[0]), answered)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def close(self) -> None:
        """See `Contender`."""
        with suppress(Exception):  # what is left ends with the process
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        vllm_compat.release_memory()


def scripted() -> Ours:
    """No model: what coroutines and requests alone cost."""
    return Ours(ScriptedEngine(lambda request: range(request.max_tokens)))


def contenders(folder: Path, model: PreTrainedModel, settings: EngineSettings) -> dict[str, Callable[[], Contender]]:
    """What starts each contender, by the name of its row; one that shares this process with an earlier vLLM is last."""

    def ours(name: str) -> Callable[[], Contender]:
        def start() -> Contender:
            engine = start_engine(name, folder, settings)
            engine.load_weights(model.named_parameters(), 1)
            engine.wake()
            return Ours(engine)

        return start

    return {
        "scripted": scripted,
        "transformers": lambda: TransformersGenerate(model, settings.max_concurrent),
        **{name: ours(name) for name in ENGINES},
        "vllm-direct": lambda: VllmGenerate(folder / "weights", model, settings),
    }
