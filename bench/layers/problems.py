"""Shapes and inputs that the loss benchmarks run on, and what the least possible work on them is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

# Small, so that a share of live groups like 0.1 can be met at any size.
GROUP_SIZE = 2
# Rows of logits that exist at once while ids are drawn.
DRAW_BYTES = 256 << 20


@dataclass(frozen=True)
class Head:
    """A language model's output layer: weight [vocab_size, hidden_size] of `dtype`."""

    hidden_size: int
    vocab_size: int
    dtype: torch.dtype


HEADS = {
    "qwen2.5-1.5b": Head(1536, 151936, torch.bfloat16),
    "qwen2.5-7b": Head(3584, 152064, torch.bfloat16),
    "qwen2.5-32b": Head(5120, 152064, torch.bfloat16),
    "cpu": Head(1024, 32000, torch.float32),
    "cpu-small": Head(512, 16384, torch.float32),
    "tiny": Head(64, 515, torch.float32),
}
NO_HEAD = Head(0, 0, torch.float32)
"""Of problems that begin at log-probs or rewards."""


@dataclass(frozen=True)
class Shape:
    """A batch of `num_rows` packed tokens in sequences of equal length over a head.

    `active` is the share of rows that are action tokens, `live` the share of those whose advantage is not zero.
    """

    head: Head
    num_rows: int
    active: float = 1.0
    live: float = 1.0
    num_seqs: int = 64

    def __post_init__(self) -> None:
        if self.num_rows < 4 * self.num_seqs or self.num_rows % self.num_seqs:
            raise ValueError(f"num_rows={self.num_rows} must be a multiple of {self.num_seqs} and at least 4 times it")
        for name in ("active", "live"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1")

    @property
    def seq_len(self) -> int:
        """Rows of a sequence."""
        return self.num_rows // self.num_seqs


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of a policy loss; either `hidden` and `weight` or `logits` are there and want a gradient.

    The counts are known to the host, as they are to a trainer that packed the batch.
    """

    shape: Shape
    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [V, H]
    ids: torch.Tensor  # int64 [N]
    old_logp: torch.Tensor  # float32 [N]
    advantages: torch.Tensor  # float32 [N], one value per sequence
    mask: torch.Tensor  # bool [N]
    rows: torch.Tensor  # int64, indices of the rows with mask True
    num_live: int
    count: torch.Tensor  # float32 0-d, the action tokens: a number would be a constant of compiled graphs
    host_advantages: torch.Tensor  # the same as `advantages`, on the CPU, where a trainer makes them
    host_mask: torch.Tensor  # likewise
    logits: torch.Tensor | None = field(default=None)  # [N, V]
    objective: str = "ppo"
    """What is made of the log-probs: "ppo", or "reinforce" (-A logp) where they are what is measured."""

    @property
    def num_active(self) -> int:
        """Action tokens."""
        return len(self.rows)

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """The tensors that want a gradient."""
        return (self.hidden, self.weight) if self.logits is None else (self.logits,)

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.ids.device

    @property
    def rotating_bytes(self) -> int:
        """Size of what `rotated` copies, less a few numbers per row."""
        return self.row_inputs.nbytes

    @property
    def row_inputs(self) -> torch.Tensor:
        """The leaf with one line per token: hidden states, or logits."""
        return self.leaves[0]

    def rotated(self, num_copies: int) -> list[Problem]:
        """This problem and copies of it with per-token inputs of their own, so that a cache cannot keep them."""

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        names = ("ids", "old_logp", "advantages", "mask", "hidden" if self.logits is None else "logits")
        copies = [replace(self, **{name: leaf(getattr(self, name)) for name in names}) for _ in range(num_copies - 1)]
        return [self, *copies]


def make_problem(shape: Shape, device: torch.device, seed: int = 0, level: str = "hidden") -> Problem:
    """Draw inputs whose logits look like a language model's and whose old log-probs are near the present ones.

    At level "logits" the last row of each sequence is no action token, as where logits of a whole sequence are kept.
    """
    random = torch.Generator(device).manual_seed(seed)
    weight, hidden = _draw_head(shape, random)
    ids, logp = _draw_ids(hidden, weight, random)
    noise = torch.randn(shape.num_rows, generator=random, device=device).clamp_(-3, 3)
    advantages = draw_advantages(shape, seed)
    mask = action_mask(shape, drop_last=level == "logits")
    logits = (hidden @ weight.t()).requires_grad_() if level == "logits" else None
    return Problem(
        shape,
        hidden.requires_grad_(logits is None),
        weight.requires_grad_(logits is None),
        ids,
        # At most 0.15 nat, so that the clip bounds do not bind and live rows are those with an advantage.
        logp + 0.05 * noise,
        advantages.to(device),
        mask.to(device),
        mask.nonzero()[:, 0].to(device),
        int((mask & (advantages != 0)).sum()),
        mask.sum().float().to(device),
        advantages,
        mask,
        logits,
        "reinforce" if level == "hidden-logprob" else "ppo",
    )


def _draw_head(shape: Shape, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [V, H] and hidden [N, H] whose logits have a spread of 1.5 and one peak per row.

    The peak takes the probability sigmoid(margin), margin ~ N(4, 3): median 0.98, a tenth of the rows below a half.
    """
    head, spread = shape.head, 1.5

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, device=random.device)

    weight = normal(head.vocab_size, head.hidden_size).mul_(spread / math.sqrt(head.hidden_size))
    peaks = torch.randint(head.vocab_size, (shape.num_rows,), generator=random, device=random.device)
    log_rest = math.log(head.vocab_size) + spread**2 / 2
    height = log_rest + 4 + 3 * normal(shape.num_rows, 1)
    toward_peak = weight[peaks]
    hidden = normal(shape.num_rows, head.hidden_size).addcmul_(
        toward_peak, height / toward_peak.square().sum(1, keepdim=True)
    )
    return weight.to(head.dtype), hidden.to(head.dtype)


def _draw_ids(hidden: torch.Tensor, weight: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N] drawn from the head's own distribution, and their log-probs, float32 [N]."""
    ids, logp = [], []
    for rows in row_chunks(len(hidden), len(weight), DRAW_BYTES // 4):
        log_probs = torch.log_softmax((hidden[rows] @ weight.t()).float(), dim=1)
        ids.append(torch.multinomial(log_probs.exp(), 1, generator=random)[:, 0])
        logp.append(log_probs.gather(1, ids[-1][:, None])[:, 0])
    return torch.cat(ids), torch.cat(logp)


def row_chunks(num_rows: int, width: int, max_numel: int) -> Iterator[slice]:
    """Row ranges of a [num_rows, width] matrix with at most `max_numel` elements (at least one row) each."""
    step = max(1, max_numel // width)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def draw_advantages(shape: Shape, seed: int) -> torch.Tensor:
    """One value per sequence, [N]; whole groups are zero, as where all answers to a prompt did equally well."""
    random = torch.Generator().manual_seed(seed)
    num_groups = shape.num_seqs // GROUP_SIZE
    num_live = max(1, round(shape.live * num_groups))
    live = torch.zeros(num_groups, dtype=torch.bool)
    live[torch.randperm(num_groups, generator=random)[:num_live]] = True
    values = torch.randn(shape.num_seqs, generator=random)
    # A draw of exactly zero would change the number of live rows.
    values = torch.where(values.abs() < 1e-3, 1e-3, values)
    return (values * live.repeat_interleave(GROUP_SIZE)).repeat_interleave(shape.seq_len)


def action_mask(shape: Shape, drop_last: bool) -> torch.Tensor:
    """Bool [N]: in each sequence half of the other rows are a prompt in front, half a tool's output in the middle."""
    num_other = round((1 - shape.active) * shape.seq_len)
    prompt = num_other - num_other // 2
    middle = max(prompt, shape.seq_len // 2)
    mask = torch.ones(shape.seq_len, dtype=torch.bool)
    mask[:prompt] = False
    mask[middle : middle + num_other // 2] = False
    if drop_last:
        mask[-1] = False
    return mask.repeat(shape.num_seqs)


def product_flops(num_rows: int, head: Head) -> int:
    """One product of [num_rows, H] with the head, or of its gradient: 2 * rows * V * H."""
    return 2 * num_rows * head.vocab_size * head.hidden_size


def loss_flops(num_active: int, num_live: int, head: Head) -> int:
    """The least products of a token-local loss: logits of active rows, two gradient products of live rows.

    With active share a of N rows and live share g of those this is a (2 + 4 g) NVH.
    """
    return product_flops(num_active, head) + 2 * product_flops(num_live, head)


def recompute_flops(num_active: int, num_live: int, head: Head) -> int:
    """The same where the backward pass computes the logits of live rows again: a (2 + 6 g) NVH."""
    return loss_flops(num_active, num_live, head) + product_flops(num_live, head)


def forward_bytes(num_active: int, head: Head) -> int:
    """The least traffic of log-probs alone: hidden states and weight read once."""
    return (num_active + head.vocab_size) * head.hidden_size * head.dtype.itemsize


def loss_bytes(num_active: int, num_live: int, head: Head) -> int:
    """The least memory traffic of that loss when logits stay on the chip.

    Hidden states are read for the logits and for the weight gradient, the weight for the logits and for the hidden
    gradient; both gradients are written once, in the head's type.
    """
    size = head.dtype.itemsize
    hidden = (num_active + 2 * num_live) * head.hidden_size * size
    return hidden + 3 * head.vocab_size * head.hidden_size * size


def logits_bytes(num_rows: int, head: Head, backward: bool) -> int:
    """The least traffic on logits [num_rows, V]: read once forward; read again and gradient written backward."""
    return (3 if backward else 1) * num_rows * head.vocab_size * head.dtype.itemsize
