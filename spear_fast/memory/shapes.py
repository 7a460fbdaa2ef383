"""Shapes of models: how many parameters each part has and what a token costs in the KV cache, without building one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spear_fast.config.schema import ModelInit
from spear_fast.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number, by the names that the configuration uses."""

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"head_dim": 128, "qk_norm": True},
    "llama": {},
    "mistral": {},
    "gemma": {"head_dim": 256, "tied": True},
    "gemma2": {"head_dim": 256, "tied": True, "norms_per_block": 4},
    "gemma3_text": {"head_dim": 256, "tied": True, "norms_per_block": 4, "qk_norm": True},
}
"""`model_type` of config.json -> what differs from Llama, as far as config.json may be silent about it."""

_SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
"""Keys of config.json without which there is no shape -> fields of ModelShape."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder of the Llama kind: attention with grouped heads, gated feed-forward, RMSNorm.

    Example: Qwen2.5-1.5B is `ModelShape("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, tied=True, qkv_bias=True)`.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool = False
    """Whether the head is the embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm of width head_dim."""
    norms_per_block: int = 2
    max_positions: int | None = None
    """Longest sequence in tokens, where config.json says so."""

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """(input width, output width, bias) of each matrix of a block."""
        width, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (width, self.query_width, self.qkv_bias),
            "k_proj": (width, self.kv_width, self.qkv_bias),
            "v_proj": (width, self.kv_width, self.qkv_bias),
            "o_proj": (self.query_width, width, self.output_bias),
            "gate_proj": (width, inner, self.mlp_bias),
            "up_proj": (width, inner, self.mlp_bias),
            "down_proj": (inner, width, self.mlp_bias),
        }

    @property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        matrices = sum(inputs * outputs + bias * outputs for inputs, outputs, bias in self.linears.values())
        return matrices + self.norms_per_block * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, which a tied head shares."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the head beyond the embedding: none if tied."""
        return 0 if self.tied else self.embedding_parameters

    @property
    def root_parameters(self) -> int:
        """Parameters outside the blocks: embedding, last norm and head."""
        return self.embedding_parameters + self.hidden_size + self.head_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied head counted once, as transformers' `num_parameters()`."""
        return self.num_layers * self.block_parameters + self.root_parameters

    def lora_parameters(self, rank: int, targets: Iterable[str]) -> int:
        """Parameters of adapters A [rank, in] and B [out, rank] on these layers of every block.

        Raises ConfigError if `targets` names a layer that a block does not have.
        """
        linears, targets = self.linears, list(targets)
        if unknown := [target for target in targets if target not in linears]:
            raise ConfigError(
                f"model.lora.targets names {unknown[0]!r}, which no block has; choose from {', '.join(linears)}"
            )
        return self.num_layers * sum(rank * (linears[target][0] + linears[target][1]) for target in targets)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values of one token in all layers; `dtype` as in DTYPE_BYTES."""
        return 2 * self.num_layers * self.kv_width * DTYPE_BYTES[dtype]


def shape_of_init(init: ModelInit) -> ModelShape:
    """Return the shape of the random Qwen2 model of `model.init`, when the tokenizer uses its whole vocabulary."""
    return ModelShape(
        "qwen2",
        init.hidden_size,
        init.num_layers,
        init.num_heads,
        init.num_kv_heads,
        init.hidden_size // init.num_heads,
        init.intermediate_size,
        init.vocab_size,
        tied=init.tie_embeddings,
        qkv_bias=True,
        max_positions=init.max_positions,
    )


def shape_of_file(path: Path) -> ModelShape:
    """Return the shape that a Hugging Face config.json describes.

    Raises ConfigError if the file cannot be read, lacks a size, or is of a family that is not known here.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"shape file {path} cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"shape file {path} holds no JSON object; give a config.json of a Hugging Face model")
    return shape_of_settings(settings, str(path))


def shape_of_settings(settings: Mapping[str, Any], source: str) -> ModelShape:
    """Return the shape of a config.json that is read already; errors as `shape_of_file`, naming `source`."""
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(
            f"{source}: model_type={family!r} is not a family whose size is known; known: {', '.join(FAMILIES)}"
        )
    missing = [key for key in _SIZES if not isinstance(settings.get(key), int)]
    if missing:
        raise ConfigError(f"{source}: {', '.join(missing)} must be there as a whole number")
    shape = ModelShape(family, num_kv_heads=0, head_dim=0, **{field: settings[key] for key, field in _SIZES.items()})
    facts = FAMILIES[family]
    head_dim = settings.get("head_dim") or facts.get("head_dim") or shape.hidden_size // shape.num_heads
    attention_bias = bool(settings.get("attention_bias")) and family != "mistral"
    return replace(
        shape,
        num_kv_heads=settings.get("num_key_value_heads") or shape.num_heads,
        head_dim=head_dim,
        tied=settings.get("tie_word_embeddings", facts.get("tied", False)),
        qkv_bias=facts.get("qkv_bias", attention_bias),
        # Qwen2 has biases where queries, keys and values are made, whatever its config says, and none behind.
        output_bias=attention_bias and family != "qwen2",
        mlp_bias=family == "llama" and bool(settings.get("mlp_bias")),
        qk_norm=facts.get("qk_norm", False),
        norms_per_block=facts.get("norms_per_block", 2),
        max_positions=settings.get("max_position_embeddings"),
    )


def find_shape(model_path: str | None, init: ModelInit, folders: Iterable[Path] = ()) -> ModelShape:
    """Return the shape of the configured model.

    That is `init`'s without a path; the config.json in the folder `model_path`; or, where no such folder is, a file in
    `folders` that is called like it: `models/Qwen2.5-1.5B-Instruct` is looked for as qwen2.5-1.5b-instruct.json, then
    as qwen2.5-1.5b.json.

    Raises ConfigError if none of these exists.
    """
    if model_path is None:
        return shape_of_init(init)
    if (Path(model_path) / "config.json").is_file():
        return shape_of_file(Path(model_path) / "config.json")
    folders = list(folders)
    name = Path(model_path).name.lower()
    for folder in folders:
        for stem in (name, name.removesuffix("-instruct")):
            if (folder / f"{stem}.json").is_file():
                return shape_of_file(folder / f"{stem}.json")
    known = sorted(path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.json"))
    raise ConfigError(
        f"model.path={model_path!r} is no folder with a config.json, and no known shape has its name "
        f"(known: {', '.join(known) or 'none'}); give the folder, or a config.json with --shape"
    )
