"""LogProbMixin and patch_trainer: TRL's GRPO and RLOO trainers on this project's log-probs and entropies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType, SimpleNamespace
from typing import Any

import torch

from spear_fast.errors import ConfigError
from spear_kernels import PolicyHead, PolicyInputs, replace_lm_head, restore_lm_head

IGNORED = -100
_Trainer: Any = object
"""Base of the mixin, Any to the type checker: what it needs comes from the trainer that it is put before."""


class LogProbMixin(_Trainer):
    """Put before GRPOTrainer, RLOOTrainer or a subclass: `class MyTrainer(LogProbMixin, GRPOTrainer)`.

    Log-probs and entropies then come from `linear_logprob`: only action tokens (completion_mask times tool_mask) reach
    the head, TRL's own path scores tool results too and, off a GPU, every position; logits are float32 and exist in
    chunks. Everything else stays TRL's: losses, options, metrics, temperature, soft-cap, adapters, MoE loss. The
    wrapped model is called, so that a wrapper's hooks fire; tested with DDP. A reference model that FSDP or DeepSpeed
    wrapped while the trainer was built keeps TRL's head.

    Raises:
        ConfigError: the model's head cannot be replaced; the message says why.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._install_head()

    def _install_head(self) -> None:
        self._loss_mask: torch.Tensor | None = None
        self._generated_tool_mask: list[list[int]] | None = None
        self._heads = [self.model]
        is_wrapped = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if getattr(self, "ref_model", None) is not None and not is_wrapped:
            self._heads.append(self.ref_model)
        casts = getattr(self.args, "cast_lm_head_to_fp32", False)
        with ExitStack() as undo:
            for model in self._heads:
                _replace_head(model, casts, undo)
            undo.pop_all()

    def _generate(self, prompts: list[Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's generation; keeps the tool mask, its third result, for log-probs computed before there is a batch."""
        result = super()._generate(prompts, *args, **kwargs)
        mask = result[2]
        # RLOOTrainer returns other things there.
        self._generated_tool_mask = mask if _is_mask(mask) else None
        return result

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._generated_tool_mask = None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        with self._scoring(loss_mask(inputs)):
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _scoring(self, mask: torch.Tensor) -> Iterator[None]:
        """Within, only completion tokens where `mask` [B, C] is not 0 are scored."""
        self._loss_mask = mask
        try:
            yield
        finally:
            self._loss_mask = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kw: Any,
    ) -> Any:
        """As in TRL, 0 at completion tokens that are no action tokens."""
        if model is getattr(self, "ref_model", None) and model not in self._heads:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kw
            )
        head = _ScoredModel(model, self._action_mask(len(input_ids), logits_to_keep), self.temperature)
        return super()._get_per_token_logps_and_entropies(head, input_ids, attention_mask, logits_to_keep, *args, **kw)

    def _action_mask(self, num_rows: int, length: int) -> torch.Tensor | None:
        """Bool [B, C] of the completion tokens the policy wrote, as far as known; None: all that are no padding."""
        if self._loss_mask is not None:
            return self._loss_mask.bool()
        generated = self._generated_tool_mask
        if generated is None or len(generated) != num_rows:
            return None
        rows = [torch.tensor(row[:length], dtype=torch.bool) for row in generated]
        return torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])


class _ScoredModel:
    """Stands for a model in TRL's method: takes its call for the fused head and makes ours; rows come in order."""

    def __init__(self, model: Any, mask: torch.Tensor | None, temperature: float) -> None:
        self.model, self.mask, self.temperature, self.done = model, mask, temperature, 0

    def __call__(self, *, labels: torch.Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
        """log_probs and entropy [B, L - 1] of labels [B, L], and aux_loss, as TRL's fused head returns them."""
        assert fused_lm_head
        start, self.done = self.done, self.done + len(labels)
        if self.mask is not None:
            completion = labels[:, -self.mask.shape[1] :]
            completion.masked_fill_(~self.mask[start : self.done].to(labels.device), IGNORED)
        output = self.model(**inputs, policy_inputs=PolicyInputs(labels, temperature=self.temperature))
        return SimpleNamespace(log_probs=output.logp[:, 1:], entropy=output.entropy[:, 1:], aux_loss=output.aux_loss)


def loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """Completion tokens in the loss, int [B, C]: the completion mask times the tool mask where there is one."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if inputs.get("tool_mask") is not None else mask


def patch_trainer(trainer: Any) -> Any:
    """Give an existing GRPOTrainer or RLOOTrainer the log-prob path of LogProbMixin, in place, and return it.

    Call it before `train()`. The trainer becomes an instance of a subclass of its class.

    Raises:
        ConfigError: the trainer computes no log-probs of completions, or its head cannot be replaced.
    """
    if isinstance(trainer, LogProbMixin):
        return trainer
    kind = type(trainer)
    if not hasattr(kind, "_get_per_token_logps_and_entropies"):
        raise ConfigError(f"trainer={kind.__name__} has no log-probs of completions; pass a GRPOTrainer or RLOOTrainer")
    trainer.__class__ = type(kind.__name__, (LogProbMixin, kind), {})
    try:
        trainer._install_head()
    except ConfigError:
        trainer.__class__ = kind
        raise
    return trainer


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and set(map(type, row)) <= {int} for row in value)


def _replace_head(model: Any, casts: bool, undo: ExitStack) -> None:
    """`replace_lm_head` for a model whose head TRL has cast to float32 (`casts`), or an earlier trainer replaced.

    `undo` gets what puts the model back. A forward of the head's own that is no such cast is left for
    `replace_lm_head` to refuse.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings()
    forward = None if head is None else head.__dict__.get("forward")
    is_cast = forward is not None and (casts or getattr(forward, "__func__", None) is _float32_head)
    if is_cast:
        delattr(head, "forward")
        undo.callback(setattr, head, "forward", forward)
    if not isinstance(head, PolicyHead):
        try:
            replace_lm_head(model)
        except ValueError as error:
            raise ConfigError(f"the head of {type(inner).__name__} cannot be replaced: {error}") from error
        undo.callback(restore_lm_head, model)
    if is_cast:
        head = inner.get_output_embeddings()
        head.forward = MethodType(_float32_head, head)


def _float32_head(head: PolicyHead, hidden: torch.Tensor, request: Any = None) -> Any:
    """PolicyHead.forward in float32 outside autocast, what TRL's cast_lm_head_to_fp32 means."""
    with torch.autocast(hidden.device.type, enabled=False):
        return PolicyHead.forward(head, hidden.float(), request)
