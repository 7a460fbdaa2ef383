"""TRL's GRPOTrainer on a frozen batch: its training loop, with generation and scoring replaced by what was frozen."""

from __future__ import annotations

import logging
import tempfile
from importlib.util import find_spec
from typing import Any

import torch

from bench.updates.frozen import Frozen
from bench.updates.job import Clock, Gradients, Job, Phases, copied, timed


class TrlTrainer:
    """A GRPOTrainer of TRL 1.16 whose `train()` takes optimizer steps on the frozen batch.

    Shuffling, splitting, loss, accumulation, clipping and optimizer are TRL's. The batch is padded once, outside the
    clock. No activations are recomputed, unlike TRL's default, since this project's trainer does not either.
    """

    def __init__(
        self, job: Job, batch_size: int, mixin: type | None = None, more: dict[str, Any] | None = None
    ) -> None:
        """`batch_size` sequences per forward pass; `mixin` comes before GRPOTrainer; `more` are fields of GRPOConfig.

        Raises:
            ImportError: TRL is not installed.
        """
        from spear_fast.update.model import load_model

        sequences = len(job.frozen.lengths)
        if sequences % batch_size:
            raise ValueError(f"batch_size={batch_size} must divide the {sequences} sequences")
        self._job, self._mixin = job, mixin
        self._model = load_model(str(job.folder), torch.float32)
        # What this project's trainer takes there too.
        if job.device == "cuda" and job.dtype == "bfloat16" and find_spec("flash_attn"):
            self._model.set_attn_implementation("flash_attention_2")
        self._accumulation = sequences // batch_size
        self._output = tempfile.TemporaryDirectory()
        self._fields = self._configuration(batch_size) | (more or {})
        self.settings: dict[str, Any] = {
            "batch_size": batch_size,
            "accumulation": self._accumulation,
            "attention": self._model.config._attn_implementation,
            **(more or {}),
        }
        self._trainer: Any = None

    def steps(self, count: int) -> list[Phases]:
        """See `job.Trainer`."""
        watch = _watch(self._job.device)
        self._train(count, watch)
        return watch.taken

    def gradients(self) -> Gradients:
        """See `job.Trainer`."""
        watch = _watch(self._job.device, self._model)
        trainer = self._train(1, watch)
        return Gradients(float(sum(trainer.losses)), watch.found)

    def score(self) -> float:
        """See `job.Trainer`; TRL does it at the batch size of training."""
        trainer = self._trainer or self._train(1, _watch(self._job.device))
        batch = trainer.frozen_batch
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        size = self._fields["per_device_train_batch_size"]

        @torch.no_grad()
        def score() -> None:
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].size(1), size)

        return timed(score, self._job.device)

    def close(self) -> None:
        """See `job.Trainer`."""
        self._trainer = self._model = None
        self._output.cleanup()

    def _train(self, count: int, watch: Any) -> Any:
        from datasets import Dataset
        from transformers import AutoTokenizer, PrinterCallback
        from trl.trainer.grpo_config import GRPOConfig

        logging.getLogger("trl").setLevel(logging.ERROR)
        job, frozen = self._job, self._job.frozen
        groups = len(frozen.lengths) // frozen.group_size
        trainer = _trainer_class(self._mixin)(
            model=self._model,
            reward_funcs=_no_reward,
            args=GRPOConfig(output_dir=self._output.name, max_steps=count, **self._fields),
            train_dataset=Dataset.from_dict({"prompt": ["frozen"] * groups}),
            processing_class=AutoTokenizer.from_pretrained(job.folder),
            callbacks=[watch],
        )
        # It prints what nobody asked for.
        trainer.remove_callback(PrinterCallback)
        # GRPOTrainer would load a reference model to compute what is frozen too, were beta in its configuration.
        trainer.beta = job.loss.kl_coef
        trainer.frozen_batch = padded(frozen, trainer.accelerator.device, reference=job.loss.kl_coef != 0)
        trainer.train()
        self._trainer = trainer
        return trainer

    def _configuration(self, batch_size: int) -> dict[str, Any]:
        job, frozen = self._job, self._job.frozen
        return {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": self._accumulation,
            "num_generations": frozen.group_size,
            "temperature": frozen.temperature,
            "learning_rate": job.lr,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": job.grad_clip,
            "bf16": job.dtype == "bfloat16",
            "use_cpu": job.device == "cpu",
            "gradient_checkpointing": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **job.loss.trl_of(frozen.longest_completion),
        }


def padded(frozen: Frozen, device: torch.device, *, reference: bool) -> dict[str, torch.Tensor]:
    """The batch as GRPOTrainer's generation leaves it: prompts [B, P] padded left, completions [B, C] right."""
    prompts, rests = frozen.prompt_lengths, frozen.lengths - frozen.prompt_lengths
    sizes, longest = (int(prompts.max()), int(rests.max())), len(prompts)

    def place(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = (torch.zeros(longest, size, dtype=dtype) for size in sizes)
        for row, (piece, prompt) in enumerate(zip(frozen.split(name), prompts, strict=True)):
            values = torch.from_numpy(piece).to(dtype)
            left[row, sizes[0] - prompt :] = values[:prompt]
            right[row, : len(values) - prompt] = values[prompt:]
        return left, right

    prompt_ids, completion_ids = place("tokens", torch.int64)
    places = [torch.arange(size) for size in sizes]
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": (places[0] >= sizes[0] - torch.from_numpy(prompts)[:, None]).long(),
        "completion_ids": completion_ids,
        "completion_mask": (places[1] < torch.from_numpy(rests)[:, None]).long(),
        "tool_mask": place("action_mask", torch.int64)[1],
        "advantages": torch.from_numpy(frozen.advantages),
        "old_per_token_logps": place("sampler_logp", torch.float32)[1],
        "num_items_in_batch": torch.tensor(frozen.num_action_tokens),
    }
    if reference:
        batch["ref_per_token_logps"] = place("ref_logp", torch.float32)[1]
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    """Never called: rewards became advantages when the batch was frozen."""
    return [0.0] * len(completions)


def _trainer_class(mixin: type | None) -> Any:
    from trl.trainer.grpo_trainer import GRPOTrainer

    class FrozenTrainer(GRPOTrainer):
        """Takes every generation batch from `frozen_batch`, and keeps the loss of each micro-batch in `losses`."""

        frozen_batch: dict[str, torch.Tensor]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.losses: list[torch.Tensor] = []
            super().__init__(*args, **kwargs)

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
            return dict(self.frozen_batch)

        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

    return FrozenTrainer if mixin is None else type(f"{mixin.__name__}FrozenTrainer", (mixin, FrozenTrainer), {})


def _watch(device: str, model: torch.nn.Module | None = None) -> Any:
    """A callback of transformers' loop that clocks each step, and with `model` copies its gradients before the step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.taken: list[Phases] = []
            self.found: dict[str, torch.Tensor] = {}
            self._clock = Clock(device)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self._clock.start()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self._clock.mark("gradients")
            if model is not None:
                self.found = copied(model)

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self._clock.mark("optimizer")

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.taken.append(self._clock.stop())

    return Watch()
