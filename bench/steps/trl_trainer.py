"""TRL's GRPOTrainer in the step benchmark: its own loop, with tokens forced, phases timed and a stop between steps."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback

from bench.common.failures import NeedsCuda
from bench.steps.contender import CLIP, LEARNING_RATE, Opening, StepReport, Turn, device_of, script_of
from bench.steps.phases import PhaseClock
from bench.steps.workloads import Script, TrainedRow, World, reward_of

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

CERTAIN = 1e4
"""A logit that leaves all others the probability 0 in float32."""
MOST_STEPS = 1_000_000


def run_trl(opening: Opening, turn: Turn, folder: Path) -> None:
    """Train on the opening's workload step by step; see `contender.run`."""
    if opening.liger and opening.device == "cpu":
        raise NeedsCuda("Liger's layers are Triton kernels")
    script = script_of(opening)
    trainer = make_trainer(opening, script, folder)
    clock = PhaseClock(device_of(opening))
    forcing = ForcedGeneration(trainer, script)
    rows = _Rows(trainer, script.workload.samples)
    _time_phases(trainer, clock)
    trainer.add_callback(_Stops(turn, clock, forcing, rows, _facts(trainer)))
    trainer.train()


def make_trainer(opening: Opening, script: Script, folder: Path) -> GRPOTrainer:
    """A GRPOTrainer with the settings that suit it best; micro-batch size and Liger are tried from outside."""
    from datasets import Dataset
    from trl.trainer.grpo_trainer import GRPOTrainer

    kind = script.workload.kind
    data = Dataset.from_list([{"prompt": prompt, "task": index} for index, prompt in enumerate(script.prompts)])
    return GRPOTrainer(
        model=opening.model,
        reward_funcs=_rewards,
        args=make_config(opening, script, folder),
        train_dataset=data,
        processing_class=opening.tokenizer(),
        tools=[script.lookup()] if kind == "tools" else None,
        environment_factory=Game if kind == "game" else None,
    )


def make_config(opening: Opening, script: Script, folder: Path) -> GRPOConfig:
    """One optimizer step a training step on all its trajectories, with the loss that both trainers have."""
    from trl.trainer.grpo_config import GRPOConfig

    workload, on_cuda = script.workload, opening.device == "cuda"
    micro_batch = opening.micro_batch or workload.trajectories
    if workload.trajectories % micro_batch:
        raise ValueError(f"micro_batch={micro_batch} must divide the {workload.trajectories} trajectories of a step")
    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=not on_cuda,
        bf16=on_cuda,
        model_init_kwargs=_loading(on_cuda),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=workload.trajectories // micro_batch,
        num_generations=workload.samples,
        max_completion_length=script.longest(),
        max_steps=MOST_STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        epsilon=CLIP,
        loss_type="dapo",
        beta=0.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_liger_kernel=opening.liger,
        use_vllm=opening.engine == "vllm",
        vllm_mode="colocate",
        vllm_max_model_length=script.longest(),
        # It would cost a pass over all tokens before the update, which this trainer does not make either.
        vllm_importance_sampling_correction=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=workload.seed,
    )


def _loading(on_cuda: bool) -> dict[str, str]:
    """How the model is loaded. From float32 weights TRL would sample in float32, so on CUDA it gets no such masters."""
    if not on_cuda:
        return {"dtype": "float32"}
    flash = {"attn_implementation": "flash_attention_2"} if find_spec("flash_attn") else {}
    return {"dtype": "bfloat16", **flash}


class Game:
    """The world as TRL's environment: one object a rollout, its public methods are tools."""

    def __init__(self) -> None:
        self._world = World(0)

    def reset(self, **row: Any) -> None:
        """Start the game of a row of the dataset."""
        self._world = World(int(row["task"]))

    def act(self, move: str) -> str:
        """Take a step.

        Args:
            move: Where to.

        Returns:
            What is seen there.
        """
        return self._world.move(move)


def _rewards(completions: list[list[dict[str, Any]]], **_: Any) -> list[float | None]:
    return [reward_of(completion[-1]["content"]) for completion in completions]


class Forcing(LogitsProcessor):
    """Makes the drawn token certain, one entry a row; softmax and draw over the whole vocabulary stay as they are."""

    def __init__(self, messages: list[list[int]], prompt_length: int, device: torch.device) -> None:
        self._prompt_length = prompt_length
        longest = max(map(len, messages))
        # A row that has ended is padded by `generate`, whatever is drawn for it.
        padded = [message + message[-1:] * (longest - len(message)) for message in messages]
        self._wanted = torch.tensor(padded, device=device)  # [B, longest]
        self.seconds = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        started = time.perf_counter()
        place = input_ids.shape[1] - self._prompt_length
        scores.scatter_(1, self._wanted[:, place : place + 1], CERTAIN)
        self.seconds += time.perf_counter() - started
        return scores


class ForcedGeneration:
    """Gives every call of a step to the sampler the messages that are due.

    The k-th call of a step holds, in the order of places, the trajectories with more than k messages.
    """

    def __init__(self, trainer: GRPOTrainer, script: Script) -> None:
        self._turns = [turns for group in script.turns for turns in group]
        # With vLLM it is its own sampler that runs, not the model's.
        self._sampler: Any = trainer.vllm_generation.llm if trainer.use_vllm else trainer.model
        self._generate = self._sampler.generate
        self._sampler.generate = self.generate_as_long if trainer.use_vllm else self.generate
        self.restart()

    @property
    def seconds(self) -> float:
        """Time taken by the hook in this step."""
        return sum(processor.seconds for processor in self._processors)

    def restart(self) -> None:
        """Begin a step."""
        self._calls = 0
        self._processors: list[Forcing] = []

    def generate(self, input_ids: torch.Tensor, **named: Any) -> torch.Tensor:
        """Sample with transformers, the messages of this call forced."""
        processor = Forcing(self._due(len(input_ids)), input_ids.shape[1], input_ids.device)
        self._processors.append(processor)
        return self._generate(input_ids, **named, logits_processor=LogitsProcessorList([processor]))

    def generate_as_long(self, prompts: list[Any], sampling_params: Any, **named: Any) -> list[Any]:
        """Let vLLM sample as many tokens as each message has, and return those of the message; see `ours`."""
        messages = self._due(len(prompts))
        params = [sampling_params.clone() for _ in messages]
        for each, message in zip(params, messages, strict=True):
            each.max_tokens = each.min_tokens = len(message)
            each.ignore_eos = True
        outputs = self._generate(prompts, sampling_params=params, **named)
        for output, message in zip(outputs, messages, strict=True):
            output.outputs[0].token_ids = list(message)
        return outputs

    def _due(self, rows: int) -> list[list[int]]:
        turn, self._calls = self._calls, self._calls + 1
        messages = [turns[turn] for turns in self._turns if len(turns) > turn]
        if len(messages) != rows:
            raise RuntimeError(f"call {turn} of a step has {rows} rows; the script has {len(messages)}")
        return messages


class _Rows:
    """Remembers what the last step trained on."""

    def __init__(self, trainer: GRPOTrainer, samples: int) -> None:
        self._samples = samples
        self._batch: dict[str, Any] = {}
        score = trainer._generate_and_score_completions

        def scored(inputs: Any) -> Any:
            self._batch = score(inputs)
            return self._batch

        trainer._generate_and_score_completions = scored

    def trained(self) -> list[TrainedRow]:
        """Its rows by prompt and sample, without padding."""
        batch = {name: value.tolist() for name, value in self._batch.items() if isinstance(value, torch.Tensor)}
        said = batch.get("tool_mask") or batch["completion_mask"]
        rows = []
        for place, advantage in enumerate(batch["advantages"]):
            prompt = _kept(batch["prompt_ids"][place], batch["prompt_mask"][place])
            completion = _kept(batch["completion_ids"][place], batch["completion_mask"][place])
            mask = _kept(said[place], batch["completion_mask"][place])
            row = [False] * len(prompt) + [bool(bit) for bit in mask]
            rows.append(
                TrainedRow(place // self._samples, place % self._samples, prompt + completion, row, float(advantage))
            )
        return rows


def _kept(values: list[int], mask: list[int]) -> list[int]:
    return [value for value, keep in zip(values, mask, strict=True) if keep]


class _Stops(TrainerCallback):
    """Hands the report of each step over and waits for the next; TRL's loop goes on between the two."""

    def __init__(
        self, turn: Turn, clock: PhaseClock, forcing: ForcedGeneration, rows: _Rows, facts: dict[str, Any]
    ) -> None:
        self._turn, self._clock, self._forcing, self._rows, self._facts = turn, clock, forcing, rows, facts

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Ready; there is always a first step, because the loop looks for a stop behind a step only."""
        del args, state, control
        self._clock.wrap(optimizer, "step", "update")
        if not self._turn(None):
            raise RuntimeError("a trainer was made and no step asked of it")
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is over; logging and fetching the next batch belong to the step that follows."""
        del args, state
        seconds = self._clock.stop()
        report = StepReport.of(self._rows.trained(), seconds, self._clock.seconds, self._forcing.seconds, **self._facts)
        if self._turn(report):
            self._begin()
        else:
            control.should_training_stop = True

    def _begin(self) -> None:
        self._forcing.restart()
        self._clock.restart()


def _facts(trainer: GRPOTrainer) -> dict[str, Any]:
    """What a reader has to know of the release and the settings."""
    args, model = trainer.args, cast(Any, trainer.model)
    return {
        "micro_batch": args.per_device_train_batch_size,
        "padding_free": getattr(args, "padding_free", "GRPOConfig has no such option"),
        "weights": str(model.dtype),
        "attention": model.config._attn_implementation,
        "old_log_probs": "those of the update itself, without a pass of their own",
        "tools": "calls of one message overlap; messages wait for each other",
    }


def _time_phases(trainer: GRPOTrainer, clock: PhaseClock) -> None:
    clock.wrap(trainer, "_generate_single_turn", "generation")
    clock.wrap(trainer, "_tool_call_loop", "tools")
    clock.wrap(trainer, "_generate_and_score_completions", "rest")
    clock.wrap(trainer, "training_step", "update")
    if trainer.use_vllm:
        clock.wrap(trainer.vllm_generation, "sync_weights", "sync")
    clock.wrap(trainer.accelerator, "clip_grad_norm_", "update")
    # The same pass makes old log-probs, without gradients, and those of the loss.
    clock.wrap(
        trainer, "_get_per_token_logps_and_entropies", lambda: "update" if torch.is_grad_enabled() else "scoring"
    )
