"""`replace_lm_head`: log-probs or a policy loss from any causal model's own forward, without its logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import nn

from spear_kernels.backend import BACKENDS
from spear_kernels.linear_logprob import linear_logprob
from spear_kernels.linear_logprob.head import chunk_budget
from spear_kernels.linear_policy_loss import linear_policy_loss
from spear_kernels.modules.inputs import TOKEN_FIELDS, LabelledRows, PolicyInputs, PolicyOutput
from spear_kernels.modules.logit_scale import LogitScale, found, probe_logits
from spear_kernels.policy_loss import PolicyLossConfig

_WRAPPERS = "pass the model itself, before DistributedDataParallel, fully_shard or torch.compile wrap it"


Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class HeadSettings:
    """How a head is applied; the arguments of `replace_lm_head`."""

    temperature: float
    chunk_bytes: int | None
    backend: str
    vocab_size: int | None
    scale: LogitScale | None
    """None until the first call has watched the model."""


@dataclass(frozen=True)
class HeadRequest:
    """What one forward pass asks of the head."""

    inputs: PolicyInputs
    rows: LabelledRows
    settings: HeadSettings
    scale: LogitScale

    def run(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> PolicyOutput:
        """Score the labelled rows of hidden [B, L, H] with the head weight [V, H], bias [V]."""
        scaled, temperature, softcap = self._scaled(self.rows.hidden(hidden))
        settings: dict[str, Any] = {
            "bias": bias,
            "softcap": softcap,
            "vocab_size": self.settings.vocab_size,
            "chunk_bytes": self.settings.chunk_bytes,
            "backend": self.settings.backend,
        }
        if self.inputs.cfg is None:
            logp, entropy = linear_logprob(scaled, weight, self.rows.ids, temperature, **settings)
            return PolicyOutput(None, self.rows.spread(logp), self.rows.spread(entropy), None)
        return self._policy_loss(scaled, weight, temperature, self.inputs.cfg, settings)

    def _scaled(self, hidden: torch.Tensor) -> tuple[torch.Tensor, float | torch.Tensor, float | None]:
        """hidden [n, H], temperature and soft-cap under which a plain head gives the model's final logits."""
        temperature = self.inputs.temperature
        temperature = self.settings.temperature if temperature is None else temperature
        if isinstance(temperature, torch.Tensor) and temperature.dim():
            temperature = self.rows.take(temperature.detach())
        factor, softcap = self.scale
        if softcap is None:
            return hidden, temperature / factor, None
        # The factor comes before the soft-cap, the temperature after it.
        return hidden if factor == 1.0 else hidden * factor, temperature, softcap

    def _policy_loss(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        temperature: float | torch.Tensor,
        cfg: PolicyLossConfig,
        settings: dict[str, Any],
    ) -> PolicyOutput:
        inputs, rows = self.inputs, self.rows
        given = {name: getattr(inputs, name) for name in TOKEN_FIELDS}
        fields: dict[str, Any] = {name: None if value is None else rows.take(value) for name, value in given.items()}
        fields["seq_ids"] = rows.row if fields["seq_ids"] is None else fields["seq_ids"]
        fields["positions"] = rows.column if fields["positions"] is None else fields["positions"]
        result = linear_policy_loss(
            hidden,
            weight,
            rows.ids,
            mask=None,
            cfg=cfg,
            temperature=temperature,
            seed=inputs.seed,
            num_tokens=inputs.num_tokens,
            num_seqs=inputs.num_seqs,
            **fields,
            **settings,
        )
        return PolicyOutput(result.loss, rows.spread(result.logp), rows.spread(result.entropy), result.metrics)


class PolicyHead(nn.Linear):
    """A linear head over the Parameters of another one: the same logits, and `HeadRequest`s beside them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, hidden: torch.Tensor, request: HeadRequest | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits [..., V] of hidden [..., H], or the `PolicyOutput` that `request` asks for."""
        if request is None:
            return super().forward(hidden)
        # By name: torch.distributed need not be there.
        if type(self.weight).__name__ == "DTensor":
            raise ValueError(
                "the head's weight is still a DTensor where the head runs: with FSDP2 call the wrapped model, not its "
                "forward, so that its hooks gather the weight; for a head in tensor parallel call linear_logprob with "
                "group"
            )
        return request.run(hidden, self.weight, self.bias)


class _Tap(nn.Module):
    """Stands where the head is while the backbone runs: keeps the hidden states and returns next to no logits."""

    def __init__(self, head: nn.Module, watched: bool) -> None:
        super().__init__()
        self.watched = watched
        self.hidden: torch.Tensor | None = None
        object.__setattr__(self, "head", head)

    def __getattr__(self, name: str) -> Any:
        # Some models ask their head for its weight's type.
        return getattr(self.__dict__["head"], name)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden = hidden
        return probe_logits(len(hidden), hidden.device) if self.watched else hidden.new_zeros(len(hidden), 1, 1)


class PolicyForward:
    """The forward of a model whose head was replaced; an object, so that the model can be copied and pickled."""

    def __init__(self, model: nn.Module, path: str, linear: nn.Linear, settings: HeadSettings) -> None:
        self.model, self.path, self.linear, self.settings = model, path, linear, settings
        self.own = model.__dict__.get("forward")
        """A forward that the instance had, not its class."""
        self.plain = model.forward
        self.takes_use_cache = "use_cache" in inspect.signature(self.plain).parameters
        # Generation and trainers ask for the signature of forward.
        self.__wrapped__ = self.plain

    def __call__(
        self,
        *args: Any,
        logp_labels: torch.Tensor | None = None,
        policy_inputs: PolicyInputs | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward, or its `PolicyOutput` if labels are given."""
        if logp_labels is None and policy_inputs is None:
            return self.plain(*args, **kwargs)
        if logp_labels is not None and policy_inputs is not None:
            raise ValueError("both logp_labels and policy_inputs are given; the latter hold labels already")
        inputs = PolicyInputs(cast(torch.Tensor, logp_labels)) if policy_inputs is None else policy_inputs
        return self._scored(inputs, args, kwargs)

    @torch.compiler.disable(recursive=False)
    def _scored(self, inputs: PolicyInputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PolicyOutput:
        """What the head says of the labels. Of a compiled model the backbone is compiled, and not this."""
        if kwargs.get("labels") is not None:
            raise ValueError("labels asks the model for a cross-entropy of logits, which are not made; leave it out")
        if self.takes_use_cache:
            kwargs.setdefault("use_cache", False)
        rows = LabelledRows.of(inputs.labels)  # Before anything is launched that looking at labels could wait for.
        hidden, output = self._backbone(args, kwargs, rows)
        aux_loss = getattr(output, "aux_loss", None)
        if kwargs.get("output_router_logits") and aux_loss is None:
            raise ValueError(f"output_router_logits is set, but {type(self.model).__name__} returned no aux_loss")
        request = HeadRequest(inputs, rows, self.settings, cast(LogitScale, self.settings.scale))
        return self._slot()(hidden, request)._replace(aux_loss=aux_loss)

    def _backbone(self, args: Any, kwargs: Any, rows: LabelledRows) -> tuple[torch.Tensor, Any]:
        """What the model feeds its head, [B, L, H], and what it returns for next to no logits."""
        tap = _Tap(self._slot(), watched=self.settings.scale is None)
        with self._in_place_of_the_head(tap):
            output = self.plain(*args, **kwargs)
        hidden = tap.hidden
        if hidden is None or tuple(hidden.shape[:-1]) != rows.shape:
            seen = "nothing" if hidden is None else f"shape {tuple(hidden.shape)}"
            raise ValueError(
                f"labels have shape {rows.shape}, but the model gave its head {seen}; they must be labels of all of "
                "input_ids, and logits_to_keep must be left out"
            )
        if self.settings.scale is None:
            logits = output[0] if isinstance(output, tuple) else output.logits
            self.settings = replace(self.settings, scale=found(self.model.config, logits))
        return hidden, output

    def _slot(self) -> nn.Module:
        """What stands in the head's place. Raises ValueError if it does not pass requests on to a `PolicyHead`."""
        module = self.model.get_submodule(self.path)
        copies = getattr(module, "modules_to_save", None)
        heads = [module] if copies is None else [*copies.values(), getattr(module, "original_module", None)]
        if not all(isinstance(head, PolicyHead) for head in heads):
            raise ValueError(
                f"{self.path} is a {type(module).__name__} and no longer the PolicyHead that replace_lm_head put there "
                "(an adapter on the head itself is not supported: leave it out of target_modules); restore_lm_head "
                "before you change the head, and replace it again"
            )
        return module

    @contextmanager
    def _in_place_of_the_head(self, module: nn.Module) -> Iterator[None]:
        prefix, _, name = self.path.rpartition(".")
        owner = self.model.get_submodule(prefix)
        head = owner._modules[name]
        owner._modules[name] = module
        try:
            yield
        finally:
            owner._modules[name] = head


def replace_lm_head(
    model: Model,
    *,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    vocab_size: int | None = None,
    logit_scale: float | None = None,
    softcap: float | None = None,
) -> Model:
    """Let a transformers causal model return log-probs or a policy loss of labels; change it in place and return it.

    Parameters, their names, logits and `generate` stay as they are. Two arguments are added to the model's call:

    - `model(input_ids=..., logp_labels=labels)` with labels int64 [B, L], -100 where not scored, gives a
      `PolicyOutput` with logp and entropy [B, L], differentiable in both.
    - `model(input_ids=..., policy_inputs=PolicyInputs(...))` gives its loss, metrics and detached logp and entropy, by
      `linear_policy_loss`.

    The model's own forward runs up to the head; only rows with a label reach it, the hidden state at t - 1 for the
    label at t. Labels on the CPU cost no wait for the device; on the device the host looks at them once per call,
    before the backbone is launched. Do this before the model is wrapped (DistributedDataParallel, fully_shard,
    torch.compile, get_peft_model) and call the wrapper; a PEFT model may also be passed.

    Args:
        model: With `get_output_embeddings`, `config`, and a plain nn.Linear as head.
        temperature: Divides the final logits, unless a call gives its own.
        chunk_bytes: As in `linear_logprob`.
        backend: As in `linear_logprob`.
        vocab_size: Tokens that exist, where the head is padded; None: all rows of the head.
        logit_scale: What the model multiplies its logits by; None finds this and soft-cap in the first call with
            labels, which waits for the device once.
        softcap: The model's final soft-cap.

    Raises:
        ValueError: an argument out of range, a head that is not a plain linear layer, or a model that is wrapped or was
            changed already.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be a positive finite number")
    chunk_budget(chunk_bytes, torch.device("cpu"))
    inner = _innermost(model)
    path, linear = _linear_head(inner)
    if vocab_size is not None and not 0 < vocab_size <= linear.out_features:
        raise ValueError(f"vocab_size={vocab_size} must be between 1 and {linear.out_features}, the rows of the head")
    given = logit_scale is not None or softcap is not None
    scale = LogitScale(1.0 if logit_scale is None else logit_scale, softcap) if given else None
    settings = HeadSettings(temperature, chunk_bytes, backend, vocab_size, scale)
    forward = PolicyForward(inner, path, linear, settings)
    _put(inner, path, PolicyHead(linear))
    # Kept for restore_lm_head, it would keep whole weights alive that FSDP2 replaces by shards.
    linear.weight, linear.bias = cast(Any, None), cast(Any, None)
    inner.forward = forward
    return model


def restore_lm_head(model: Model) -> Model:
    """Undo `replace_lm_head`, in place; weights trained in between stay.

    Raises:
        ValueError: the head was not replaced, or forward or head were changed again since.
    """
    inner = _innermost(model)
    forward = inner.__dict__.get("forward")
    if not isinstance(forward, PolicyForward):
        raise ValueError(f"the head of {type(inner).__name__} is not replaced, or something else wrapped its forward")
    head = forward._slot()
    if not isinstance(head, PolicyHead):
        raise ValueError(f"{forward.path} is wrapped by a {type(head).__name__}; unload the adapter first")
    forward.linear.weight, forward.linear.bias = head.weight, head.bias
    forward.linear.train(head.training)
    _put(inner, forward.path, forward.linear)
    if forward.own is None:
        del inner.forward
    else:
        inner.forward = forward.own
    return model


def _innermost(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or `model`."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]


def _put(model: nn.Module, path: str, head: nn.Module) -> None:
    prefix, _, name = path.rpartition(".")
    setattr(model.get_submodule(prefix), name, head)


def _linear_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The head and its path in the model. Raises ValueError if a `PolicyHead` cannot take its place."""
    kind = type(model).__name__
    if isinstance(model.__dict__.get("forward"), PolicyForward):
        raise ValueError(f"the head of {kind} is replaced already; call restore_lm_head first")
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise ValueError(f"{kind} has no get_output_embeddings or no config, as transformers models have; {_WRAPPERS}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder model; only causal models score a token by the one before it")
    head = cast(Any, model).get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head and name), None)
    if head is None or path is None:
        raise ValueError(f"{kind} has no output embedding; pass a model with a language-model head")
    if any("FSDP" in base.__name__ for base in (*type(head).__mro__, *type(model).__mro__)):
        raise ValueError(f"{kind} is sharded by FSDP already; {_WRAPPERS}")
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the head {path} is a {type(head).__name__}, not a plain nn.Linear; quantized heads and adapters on the "
            "head itself are not supported, and PEFT's modules_to_save only after replace_lm_head"
        )
    if head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__:
        raise ValueError(f"the head {path} has hooks of its own, which would be lost; remove them and set them after")
    return path, head
