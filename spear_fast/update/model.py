"""The policy network: build or load it, run it on packed sequences, and refuse one that cannot be run so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging as transformers_logging

from spear_fast.errors import ConfigError
from spear_fast.types import MicroBatch, Segments

from .attention import AttentionPlan, Backend, packed_attention, plan_attention, select_rows
from .export import export_parameters, save_full
from .sharding import reshard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spear_fast.config.schema import ModelInit
    from spear_fast.dist import Ranks

    from .scoring import PlannedBatch

T = TypeVar("T")

ATTENTION = "spear_packed"
"""Name of the attention in transformers' registry: packed when a plan is passed, like "sdpa" otherwise."""


class Root(nn.Module):
    """What FSDP wraps around the whole model. Its forward does any work, between the hooks that gather weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        """Return `work()`; tensors that need a backward pass must be in plain tuples, lists and dicts of it."""
        return work()


class PackedModel:
    """A Hugging Face causal model seen as two parts: packed tokens -> hidden states, and the head as plain tensors.

    The model keeps working as usual (`model(...)`, `generate`) until `sharding.shard` spreads it over ranks; from then
    on whatever reads weights must happen inside `whole` or `run`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ConfigError when the model's attention or head cannot be used this way."""
        head, decoder = model.get_output_embeddings(), model.get_decoder()
        if head is None or decoder is model:
            raise ConfigError(f"{type(model).__name__} is not a causal language model with a head; load one that is")
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise ConfigError(
                f"{type(model).__name__} does not take its attention from transformers' registry; use one "
                "of the Qwen2, Qwen3, Llama, Mistral or Gemma families"
            )
        # Dropout would make the trainer's log-probs differ from the sampler's.
        self.model = model.eval()
        self.root = Root(self.model)
        self.ranks: Ranks | None = None
        """The ranks that the weights are spread over, None while they are whole."""
        self.rests_on_cpu = False
        """Whether master weights and optimizer live on the CPU and come to the device for each pass."""
        self.vocab_size: int | None = None
        """Leading columns of the head that can be sampled, where the tokenizer has fewer tokens than the head rows."""
        self.attention: Backend = "sdpa"
        """What computes packed attention, as `choose_attention` returns it; change it before any plan is made."""
        self._decoder: nn.Module = decoder
        self._head: Any = head

    @property
    def device(self) -> torch.device:
        """Where forward passes run."""
        return self.model.device if self.ranks is None else self.ranks.device

    @property
    def num_ranks(self) -> int:
        """Processes that share the work of a step."""
        return 1 if self.ranks is None else self.ranks.size

    @property
    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The LM head: weight [V, H], the embedding itself when tied, and bias [V] or None; whole inside `whole`."""
        return self._head.weight, getattr(self._head, "bias", None)

    def whole(self, work: Callable[[], T]) -> T:
        """Return `work()`, done while embedding, final norm and head are whole, in the type of the forward pass.

        All ranks must call it, and call the model equally often in it: its blocks are gathered on the way.
        """
        result = self.root(work)
        if not torch.is_grad_enabled():
            self.free_gathered()  # which no backward pass will do
        return result

    def free_gathered(self) -> None:
        """Leave the master weights alone to be seen, and free what was gathered from them and does not follow them.

        What a backward pass still needs is gathered again. Nothing happens to whole weights.
        """
        reshard(self.root)

    def export_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter under its Hugging Face name: adapters merged, a tied head left out, shards as DTensor.

        All ranks must go through all of them. The weights stay as they are.
        """
        self.free_gathered()
        return export_parameters(self.model)

    def save_full(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write a Hugging Face folder of the exported parameters, in `dtype` (None: that of the master weights).

        All ranks must call it; the main one keeps the whole model on its CPU, and writes.
        """
        self.free_gathered()
        save_full(self.model, folder, main=self.ranks is None or self.ranks.is_main, dtype=dtype)

    def run(self, planned: PlannedBatch, use: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], T]) -> T:
        """Return `use(hidden, weight, bias)`: hidden states [N, H] that predict the action tokens, and the head."""

        def work() -> T:
            hidden = self.hidden_states(planned.batch, planned.plan)
            return use(select_rows(hidden, planned.batch.predictors, planned.batch.repeats), *self.head)

        return self.whole(work)

    def hidden_states(self, batch: MicroBatch, plan: AttentionPlan | None = None) -> torch.Tensor:
        """Final hidden states [T, H] of a packed micro-batch, without the head.

        `plan` comes from `plan_attention`; None makes it.
        """
        if plan is None:
            plan = plan_attention(batch.segments, batch.input_ids.device, self.attention)
        output = self._decoder(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            # A mask of four dimensions is taken as ready-made, which keeps transformers from building a [T, T] one.
            attention_mask=batch.input_ids.new_empty((1, 1, 0, 0)),
            use_cache=False,
            attention_plan=plan,
        )
        return output.last_hidden_state[0]


def build_model(
    shape: ModelInit, *, vocab_size: int, eos_id: int, bos_id: int | None = None, seed: int, dtype: torch.dtype
) -> Qwen2ForCausalLM:
    """Build a Qwen2-architecture model with random weights on the CPU; the same seed gives the same weights.

    `vocab_size` is the tokenizer's. The global random state is left as it was.
    """
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tie_embeddings,
        initializer_range=shape.init_std,
        eos_token_id=eos_id,
        bos_token_id=bos_id,
        # A padding id would freeze that token's embedding, and packed batches hold no padding.
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    nn.Module.to(model, dtype=dtype)
    return model.eval()


def load_model(path: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load a Hugging Face causal model from a folder, on the CPU, in `dtype` (None: that of its files).

    Raises ConfigError if `path` does not hold one.
    """
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"model.path={path!r} is not a folder with a config.json; give the folder of a Hugging Face "
            "causal model, or null to build a random one"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"model.path={path!r} does not hold a causal model that transformers can load: {error}"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(
            f"model.path={path!r} lacks weights of its own architecture ({missing}, ...); "
            "it is not a causal language model, or the download is incomplete"
        )
    return model.eval()


def silence_progress_bars() -> None:
    """Keep transformers' own bars for loading and saving off the terminal, which the live display owns."""
    transformers_logging.disable_progress_bar()


@torch.no_grad()
def probe_isolation(packed: PackedModel) -> None:
    """Check on a few random tokens that packing changes nothing: no leak between sequences, same logits as unpacked.

    Sequences that share a prompt are tried too. Raises ConfigError naming what differs. Cheap (a few forward passes of
    under 30 tokens); run it once at start.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = packed.model.config.get_text_config().vocab_size
    # The second and the third sequence share a bucket, the first has its own.
    lengths = [11, 5, 4]
    first, second, third = (torch.randint(vocab_size, (n,), generator=generator).to(packed.device) for n in lengths)
    other = (first + 1) % vocab_size
    before = packed.whole(lambda: _packed_logits(packed, [first, second, third]))
    after = packed.whole(lambda: _packed_logits(packed, [other, second, third]))
    behind_first = [torch.cat([first, second]), torch.cat([first, third])]
    before += packed.whole(lambda: _packed_logits(packed, behind_first, prompt=len(first)))
    alone = packed.whole(lambda: _plain_logits(packed, [first, second, third, *behind_first]))
    name, rounding = type(packed.model).__name__, 1e-3 if before[0].dtype == torch.float32 else 0.1
    for index in (1, 2):
        if _relative_gap(after[index], before[index]) > 1e-3:
            raise ConfigError(
                f"attention of {name} leaks: changing one packed sequence changed the logits of another; "
                f"attention implementation {packed.model.config._attn_implementation!r} cannot be used packed"
            )
    for index, logits in enumerate(alone):
        if (gap := _relative_gap(before[index], logits)) > rounding:
            raise ConfigError(
                f"{name} gives other logits packed than alone (relative difference {gap:.2g}); its attention "
                "or its head does more than this trainer supports (soft-capping, logit scaling)"
            )


def _packed_logits(packed: PackedModel, sequences: Sequence[torch.Tensor], prompt: int = 0) -> list[torch.Tensor]:
    """Logits [L, V] of each sequence, from one packed pass; all begin with the same `prompt` tokens, computed once."""
    device = packed.device
    heads = [sequences[0][:prompt]] if prompt else []
    pieces = [*heads, *(ids[prompt:] for ids in sequences)]
    lengths = [len(ids) for ids in pieces]
    places = [torch.arange(n, device=device) + (0 if k < len(heads) else prompt) for k, n in enumerate(lengths)]
    batch = MicroBatch(
        input_ids=torch.cat(pieces),
        position_ids=torch.cat(places),
        segments=Segments.of(lengths, [-1] * len(heads) + [len(heads) - 1] * len(sequences)),
        **dict.fromkeys(
            ("predictors", "targets", "old_logp", "advantages", "seq_ids", "positions", "row_index", "versions"),
            torch.zeros(0, device=device),
        ),
    )
    logits = nn.functional.linear(packed.hidden_states(batch), *packed.head).split(lengths)
    return [torch.cat([*logits[: len(heads)], rest]) for rest in logits[len(heads) :]]


def _plain_logits(packed: PackedModel, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [L, V] of each sequence, one at a time, by transformers' own head and plainest attention."""
    packed.model.set_attn_implementation("eager")
    try:
        return [packed.model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
    finally:
        packed.model.set_attn_implementation(ATTENTION)


def _relative_gap(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-6)).item()


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    attention_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: [1, heads, T, D] in, [1, T, heads, D] out."""
    if attention_plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(query, key, value, attention_plan, scaling, sliding_window)[None], None


# Compiled blocks leave their graph here, at the outermost call of attention, which makes the fewest pieces of them.
AttentionInterface.register(ATTENTION, torch.compiler.disable(_attention_forward))
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
