"""Where parameters live in a model that fuses them, without vLLM: a model of the same build, and what can be wrong."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from spear_fast.errors import EngineError
from spear_fast.rollout.weight_layout import WeightLayout

VOCAB, PADDED, WIDTH = 10, 16, 6
SHAPES = {
    "model.language.embed.weight": (VOCAB, WIDTH),
    "model.language.attn.q_proj.weight": (8, WIDTH),
    "model.language.attn.k_proj.weight": (4, WIDTH),
    "model.language.attn.v_proj.weight": (4, WIDTH),
    "model.language.norm.weight": (WIDTH,),
}
EMBED, KEY, NORM = "model.language.embed.weight", "model.language.attn.k_proj.weight", "model.language.norm.weight"


class Vocabulary(nn.Module):
    """Weight of a padded vocabulary, as vLLM's embeddings and heads hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.org_vocab_size = VOCAB
        self.weight = nn.Parameter(torch.randn(PADDED, WIDTH))


class Fused(nn.Module):
    """Named and fused like a multimodal model of vLLM; `load_weights` is how it would read a checkpoint."""

    scale_norm = 1.0

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        inner = nn.Module()
        inner.embed = Vocabulary()
        inner.attn = nn.Module()
        inner.attn.qkv_proj = nn.Linear(WIDTH, 16, bias=False)
        inner.norm = nn.LayerNorm(WIDTH, bias=False)
        self.language = nn.ModuleDict({"model": inner})
        self.to(dtype)
        self.hf_to_vllm_mapper = SimpleNamespace(apply_list=lambda names: [self.renamed(name) for name in names])
        self.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        self.loads = 0

    @staticmethod
    def renamed(name: str) -> str:
        return name.replace("model.language.", "language.model.", 1)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        starts = {"q_proj": slice(0, 8), "k_proj": slice(8, 12), "v_proj": slice(12, 16)}
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            self.loads += 1
            part = next((part for part in starts if part in name), None)
            target = parameters[self.renamed(name).replace(part or "\n", "qkv_proj")]
            rows = starts[part] if part else slice(0, len(tensor))
            target.data[rows] = tensor * (self.scale_norm if "norm" in name else 1)


def values(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(layout: WeightLayout, named: dict[str, Tensor]) -> None:
    for name, tensor in named.items():
        layout.write(name, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_land_in_the_fused_storage_cast(dtype: torch.dtype) -> None:
    model = Fused(dtype)
    layout = WeightLayout.of(model, SHAPES)
    for seed in (0, 1):
        named = values(seed)
        layout.begin()
        write(layout, named)
        assert layout.missing() == set()
        qkv = torch.cat([named[f"model.language.attn.{part}.weight"] for part in ("q_proj", "k_proj", "v_proj")])
        assert torch.equal(model.get_parameter("language.model.attn.qkv_proj.weight"), qkv.to(dtype))
        embed = model.get_parameter("language.model.embed.weight")
        assert torch.equal(embed[:VOCAB], named[EMBED].to(dtype)) and not embed[VOCAB:].any()
        for name, tensor in named.items():
            assert torch.equal(layout.read(name), tensor.to(dtype))
        assert model.loads == len(SHAPES)  # the model's own loader proves the map once
    layout.read(KEY).zero_()
    assert not model.get_parameter("language.model.attn.qkv_proj.weight")[8:12].any()
    assert set(layout.readable) == set(SHAPES) and not layout.unreadable


def test_what_has_not_been_written_since_begin_is_missing() -> None:
    layout = WeightLayout.of(Fused(), SHAPES)
    write(layout, values())
    layout.begin()
    layout.write(NORM, torch.ones(WIDTH))
    assert layout.missing() == SHAPES.keys() - {NORM}


def test_a_parameter_that_the_engine_transforms_goes_through_its_loader() -> None:
    model = Fused()
    model.scale_norm = 2.0
    layout = WeightLayout.of(model, SHAPES)
    for seed in (0, 1):
        write(layout, values(seed))
        assert torch.equal(model.get_parameter("language.model.norm.weight"), 2 * values(seed)[NORM])
        assert layout.unreadable == {NORM} and NORM not in layout.readable
    with pytest.raises(EngineError, match="cannot be read back"):
        layout.read(NORM)


def test_a_name_that_the_map_lacks_goes_through_the_loader() -> None:
    model = Fused()
    model.packed_modules_mapping = {}  # what a model without fused layers says
    layout = WeightLayout.of(model, SHAPES)
    for seed in (0, 1):
        write(layout, values(seed))
        assert torch.equal(model.get_parameter("language.model.attn.qkv_proj.weight")[8:12], values(seed)[KEY])
    assert layout.unreadable == {name for name in SHAPES if "attn" in name}


def test_a_loader_that_refuses_or_ignores_a_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fused()
    untied = {**SHAPES, "lm_head.weight": (VOCAB, WIDTH)}  # the engine has no such head
    layout = WeightLayout.of(model, untied)
    with pytest.raises(EngineError, match=r"own loader refuses 'lm_head\.weight': KeyError"):
        layout.write("lm_head.weight", torch.zeros(VOCAB, WIDTH))
    monkeypatch.setattr(layout, "_load", lambda weights: set())
    with pytest.raises(EngineError, match=r"own loader ignores 'lm_head\.weight'"):
        layout.write("lm_head.weight", torch.zeros(VOCAB, WIDTH))


def test_a_head_with_storage_of_its_own_follows_the_embedding_it_is_tied_to() -> None:
    model = Fused()
    model.lm_head = Vocabulary()
    layout = WeightLayout.of(model, SHAPES)
    for seed in (0, 1):
        write(layout, values(seed))
        assert torch.equal(model.lm_head.weight[:VOCAB], values(seed)[EMBED])
        assert torch.equal(layout.read("lm_head.weight"), values(seed)[EMBED])
    assert set(layout.readable) == {*SHAPES, "lm_head.weight"}
    model.lm_head.weight = model.get_parameter("language.model.embed.weight")
    assert set(WeightLayout.of(model, SHAPES).readable) == set(SHAPES)


def test_a_head_that_only_the_engine_ties_is_refused() -> None:
    model = Fused()
    model.lm_head = Vocabulary()
    untied = {**SHAPES, "lm_head.weight": (VOCAB, WIDTH)}
    write(WeightLayout.of(model, untied), values())
    model.lm_head.weight = model.get_parameter("language.model.embed.weight")
    with pytest.raises(EngineError, match=r"keeps one value for .*embed\.weight' and 'lm_head\.weight'"):
        WeightLayout.of(model, untied)


def test_a_parameter_of_the_engine_that_nobody_writes_is_refused() -> None:
    model = Fused()
    model.extra = nn.Linear(2, 3)
    with pytest.raises(EngineError, match=r"goes to the engine's 'extra\.weight' \(3, 2\)"):
        WeightLayout.of(model, SHAPES)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (NORM, (WIDTH + 1,), r"norm\.weight' have shape \(7,\), but the engine holds \(6,\)"),
        (EMBED, (VOCAB + 1, WIDTH), r"have shape \(11, 6\), but the engine holds \(10, 6\) in .* of \(16, 6\)"),
        (KEY, (5, WIDTH), r"\[8, 5, 4\] rows, 17 together, but the engine's .*qkv_proj\.weight' is \(16, 6\)"),
        (KEY, (4, WIDTH + 1), r"k_proj\.weight' have shape \(4, 7\), but the engine holds \(4, 6\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_when_the_layout_is_made(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        WeightLayout.of(Fused(), {**SHAPES, name: shape})


def test_values_that_do_not_fit_are_refused_when_they_are_written() -> None:
    layout = WeightLayout.of(Fused(), SHAPES)
    with pytest.raises(EngineError, match=r"'other' of shape \(2,\), but the engine was built without it"):
        layout.write("other", torch.zeros(2))
    with pytest.raises(EngineError, match=r"norm\.weight' of shape \(1,\), but the engine was built for \(6,\)"):
        layout.write(NORM, torch.zeros(1))
