"""A file of frozen rollouts: what one policy update is given, so that two trainers can be given the same.

The file is in the safetensors format. B sequences stand end to end, E tokens in all, prompts first in each:

    lengths         int64   [B]  tokens of each sequence, prompt included
    prompt_lengths  int64   [B]  tokens of its prompt; what follows is the completion
    group_ids       int64   [B]  sequences of one prompt share it
    rewards         float32 [B]
    advantages      float32 [B]  of every action token of the sequence
    tokens          int32   [E]
    action_mask     bool    [E]  sampled tokens; False on prompts, and on what tools and environments wrote
    sampler_logp    float32 [E]  nats, log-prob each action token was drawn with; 0 elsewhere
    ref_logp        float32 [E]  nats, of a reference policy; may be missing

The metadata `spear_frozen` is JSON: `version` 1, `name`, `vocab_size`, `temperature`, and an object `notes` for people.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spear_fast.errors import SpearError
from spear_fast.types import Row

HEADER, VERSION = "spear_frozen", 1
PER_SEQUENCE = {
    "lengths": np.int64,
    "prompt_lengths": np.int64,
    "group_ids": np.int64,
    "rewards": np.float32,
    "advantages": np.float32,
}
PER_TOKEN = {"tokens": np.int32, "action_mask": np.bool_, "sampler_logp": np.float32, "ref_logp": np.float32}
OPTIONAL = ("ref_logp",)
REMEDY = "write the file with bench/updates/frozen.py's write()"


class FrozenError(SpearError):
    """A file of frozen rollouts cannot be used."""


@dataclass(frozen=True)
class Frozen:
    """A batch of rollouts; the arrays are those of the file, see the module's docstring."""

    name: str
    vocab_size: int
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    group_ids: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    tokens: np.ndarray
    action_mask: np.ndarray
    sampler_logp: np.ndarray
    ref_logp: np.ndarray | None = None
    temperature: float = 1.0
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises FrozenError, naming field, value and remedy, for arrays that do not belong together."""
        _check(self)

    @property
    def group_size(self) -> int:
        """Sequences of each prompt. Raises FrozenError if it is not the same for all, which only some trainers need."""
        sizes = np.unique(self.group_ids, return_counts=True)[1]
        if len(set(sizes.tolist())) != 1:
            raise FrozenError(
                f"group_ids of {self.name!r} has groups of {sorted(set(sizes.tolist()))} sequences; "
                "freeze groups of one size"
            )
        return int(sizes[0])

    @property
    def num_tokens(self) -> int:
        """All tokens, without padding."""
        return len(self.tokens)

    @property
    def num_action_tokens(self) -> int:
        """Tokens that enter the loss."""
        return int(self.action_mask.sum())

    @property
    def longest_completion(self) -> int:
        """Tokens."""
        return int((self.lengths - self.prompt_lengths).max())

    def split(self, name: str) -> list[np.ndarray]:
        """A field [E] cut into sequences. Raises FrozenError if it is the one that may be missing, and is."""
        if getattr(self, name) is None:
            raise FrozenError(
                f"{name} of {self.name!r} is missing; freeze it too, or choose a loss without a reference"
            )
        return np.split(getattr(self, name), np.cumsum(self.lengths)[:-1])

    def rows(self) -> list[Row]:
        """The sequences as this trainer's loss sees them, old log-probs being the sampler's."""
        pieces = {name: self.split(name) for name in PER_TOKEN if getattr(self, name) is not None}
        return [
            Row(
                uid=index,
                group_id=int(self.group_ids[index]),
                version=0,
                tokens=pieces["tokens"][index],
                action_mask=mask,
                old_logp=pieces["sampler_logp"][index],
                advantages=np.where(mask, self.advantages[index], np.float32(0)),
                reward=float(self.rewards[index]),
                ref_logp=pieces["ref_logp"][index] if "ref_logp" in pieces else None,
            )
            for index, mask in enumerate(pieces["action_mask"])
        ]


def from_rows(rows: Sequence[Row], *, name: str, vocab_size: int, temperature: float = 1.0) -> Frozen:
    """Freeze rows of this trainer: a prompt is what precedes the first action token.

    Raises:
        FrozenError: A row's advantages differ between its tokens, or see `Frozen`.
    """
    if not rows:
        raise FrozenError("rows is empty; freeze at least one")
    for row in rows:
        if len(np.unique(row.advantages[row.action_mask])) > 1:
            raise FrozenError(
                f"row uid={row.uid} has different advantages on its tokens; freeze trajectory-level ones, as of GRPO"
            )
    whole = all(row.ref_logp is not None for row in rows)
    return Frozen(
        name=name,
        vocab_size=vocab_size,
        temperature=temperature,
        lengths=np.array([row.num_tokens for row in rows], dtype=np.int64),
        prompt_lengths=np.array([row.action_mask.argmax() for row in rows], dtype=np.int64),
        group_ids=np.array([row.group_id for row in rows], dtype=np.int64),
        rewards=np.array([row.reward for row in rows], dtype=np.float32),
        advantages=np.array([row.advantages[row.action_mask.argmax()] for row in rows], dtype=np.float32),
        tokens=np.concatenate([row.tokens for row in rows]).astype(np.int32),
        action_mask=np.concatenate([row.action_mask for row in rows]),
        sampler_logp=np.concatenate([np.where(row.action_mask, row.old_logp, 0) for row in rows]).astype(np.float32),
        ref_logp=np.concatenate([row.ref_logp for row in rows if row.ref_logp is not None]) if whole else None,
    )


def write(frozen: Frozen, path: Path) -> None:
    """Write a file that `read` gives back."""
    header = {"version": VERSION, **{name: getattr(frozen, name) for name in ("name", "vocab_size", "temperature")}}
    arrays = {name: getattr(frozen, name) for name in (*PER_SEQUENCE, *PER_TOKEN)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None},
        path,
        {HEADER: json.dumps(header | {"notes": frozen.notes})},
    )


def read(path: Path) -> Frozen:
    """Read a file. Nothing in it is executed.

    Raises:
        FrozenError: It is missing, of another format, or its parts do not fit; the message names the part.
    """
    if not path.is_file():
        raise FrozenError(f"{path} is not a file; {REMEDY}, or pass no file to have batches drawn")
    try:
        with safe_open(path, "numpy") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            arrays = {name: file.get_tensor(name) for name in names & {*PER_SEQUENCE, *PER_TOKEN}}
    except SafetensorError as error:
        raise FrozenError(f"{path} is not a safetensors file ({error}); {REMEDY}") from error
    try:
        header = json.loads(metadata[HEADER])
        version = header.pop("version")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise FrozenError(f"{path} has no metadata {HEADER!r} with a version; {REMEDY}") from error
    if version != VERSION:
        raise FrozenError(f"{path} has version {version!r} of the format, this program reads {VERSION}; freeze it anew")
    missing = sorted({*PER_SEQUENCE, *PER_TOKEN} - names - set(OPTIONAL))
    known = {one.name for one in fields(Frozen)} - set(arrays)
    if missing or not {"name", "vocab_size"} <= set(header) <= known:
        raise FrozenError(
            f"{path} lacks {', '.join(missing) or 'no array'}, and its metadata has {sorted(header)}, where name, "
            f"vocab_size, temperature and notes are known; {REMEDY}"
        )
    return Frozen(**arrays, **header)


def _check(frozen: Frozen) -> None:
    def refuse(name: str, found: object, remedy: str) -> None:
        raise FrozenError(f"{name} of frozen rollouts {frozen.name!r} is {found}; {remedy}")

    for name, known in (("name", str), ("vocab_size", int), ("temperature", (int, float)), ("notes", dict)):
        if not isinstance(getattr(frozen, name), known):
            refuse(name, repr(getattr(frozen, name)), f"it must be of type {known}")
    if frozen.vocab_size < 2:
        refuse("vocab_size", frozen.vocab_size, "it must be at least 2 tokens")
    if not 0 < frozen.temperature < np.inf:
        refuse("temperature", frozen.temperature, "it must be positive")
    count = len(frozen.lengths) if np.ndim(frozen.lengths) == 1 else 0
    if not count or frozen.lengths.min() < 2:
        refuse("lengths", frozen.lengths, "it must hold at least one sequence, of 2 tokens or more each")
    for known, size in ((PER_SEQUENCE, count), (PER_TOKEN, int(frozen.lengths.sum()))):
        for name, dtype in known.items():
            if getattr(frozen, name) is None and name in OPTIONAL:
                continue
            array = np.asarray(getattr(frozen, name))
            if array.dtype != dtype or array.shape != (size,):
                remedy = f"it must be {np.dtype(dtype).name} [{size}], as lengths says"
                refuse(name, f"{array.dtype} {list(array.shape)}", remedy)
            if array.dtype == np.float32 and not np.isfinite(array).all():
                refuse(name, f"not finite at {int((~np.isfinite(array)).argmax())}", "drop or repair that sequence")
    _check_contents(frozen, refuse)


def _check_contents(frozen: Frozen, refuse: Any) -> None:
    """What the arrays say, once their types and shapes are right."""
    if not ((frozen.prompt_lengths >= 1) & (frozen.prompt_lengths < frozen.lengths)).all():
        refuse("prompt_lengths", frozen.prompt_lengths, "every prompt and every completion needs a token")
    if frozen.tokens.min() < 0 or frozen.tokens.max() >= frozen.vocab_size:
        worst = frozen.tokens.min() if frozen.tokens.min() < 0 else frozen.tokens.max()
        refuse("tokens", f"{worst} somewhere", f"ids run from 0 to vocab_size - 1 = {frozen.vocab_size - 1}")
    for index, (mask, prompt) in enumerate(zip(frozen.split("action_mask"), frozen.prompt_lengths, strict=True)):
        if mask[:prompt].any() or not mask.any():
            found = "True in the prompt" if mask.any() else "False throughout"
            refuse("action_mask", f"{found} in sequence {index}", "mark sampled tokens of the completion, one at least")
    logp = frozen.sampler_logp[frozen.action_mask]
    if logp.max() > 0:
        refuse("sampler_logp", f"{logp.max():g} somewhere", "log-probs are in nats and at most 0")


def describe(frozen: Frozen) -> dict[str, Any]:
    """What a result says about a batch: counts in sequences and tokens, shares of all tokens and of action tokens."""
    live = np.repeat(frozen.advantages != 0, frozen.lengths) & frozen.action_mask
    completions = frozen.lengths - frozen.prompt_lengths
    padded = len(frozen.lengths) * int(frozen.prompt_lengths.max() + completions.max())
    return {
        "sequences": len(frozen.lengths),
        "groups": len(np.unique(frozen.group_ids)),
        "tokens": frozen.num_tokens,
        "padded_tokens": padded,
        "action_tokens": frozen.num_action_tokens,
        "live_action_tokens": int(live.sum()),
        "longest": int(frozen.lengths.max()),
        "median_length": float(np.median(frozen.lengths)),
        "notes": frozen.notes,
    }
