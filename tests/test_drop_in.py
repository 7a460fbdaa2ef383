"""The code of docs/drop-in.md runs as it stands, and its versions are those that are pinned."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.modules.tiny_models import VOCAB, tiny_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:<!-- (from|runs-in): (\S+) -->\n)?```python\n(.*?)```", PAGE, re.DOTALL)
HERE = [code for mark, _, code in BLOCKS if not mark]
WITH_TRL = [code for code in HERE if "integrations.trl" in code]
ALONE = [code for code in HERE if code not in WITH_TRL]


def first_import(code: str) -> str:
    return re.search(r"from spear_\S+ import .*", code)[0].split()[-1]  # pyright: ignore[reportOptionalSubscript]


def batch() -> SimpleNamespace:
    ids = torch.randint(3, VOCAB, (3, 8))
    labels = ids.clone()
    labels[:, :3] = labels[1, 6:] = -100
    return SimpleNamespace(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=labels,
        old_logp=torch.full((3, 8), -5.0),
        advantages=torch.randn(3),
        num_tokens=(labels[:, 1:] != -100).sum(),
    )


@pytest.mark.parametrize("code", ALONE, ids=first_import)
def test_blocks_give_gradients(code: str) -> None:
    model = tiny_model("untied")
    exec(code, {"torch": torch, "model": model, "batch": batch()})
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("code", WITH_TRL, ids=first_import)
def test_blocks_train_in_trl(code: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from tests.integrations.trl_toys import prompts, settings, tiny_tokenizer
    from tests.integrations.trl_toys import tiny_model as tiny_trl_model

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[0] % 5) for ids in completion_ids]

    # A random model writes bytes that are no text.
    spear = {"filter_unreadable": False} if "SPEARConfig" in code else {}
    model: Any = tiny_trl_model()
    before = model.lm_head.weight.detach().clone()
    names = {
        "model": model,
        "reward": reward,
        "dataset": prompts(),
        "tokenizer": tiny_tokenizer(),
        "settings": settings(tmp_path, max_steps=1, mask_truncated_completions=False, **spear),
    }
    exec(code, names)
    assert not torch.equal(model.lm_head.weight, before)


def test_blocks_run_elsewhere_say_where() -> None:
    """tests/verl runs the blocks of verl, the test of two ranks the file that a block is taken from."""
    elsewhere = [(mark, place, code) for mark, place, code in BLOCKS if mark]
    assert [(mark, place) for mark, place, _ in elsewhere] == [("from", "docs/examples/loop.py"), ("runs-in", "verl")]
    (_, file, excerpt), (_, _, of_verl) = elsewhere
    assert " ".join(excerpt.split()) in " ".join((ROOT / file).read_text(encoding="utf-8").split())
    assert "spear_fast.integrations.verl" in of_verl


def test_versions_are_the_pinned_ones() -> None:
    sentence = re.search(r"Tested with (.*?); (verl .*?)\.\n", PAGE)
    assert sentence
    for text, pins in zip(sentence.groups(), ("constraints-cpu.txt", "constraints-verl.txt"), strict=True):
        pinned = (ROOT / pins).read_text(encoding="utf-8").splitlines()
        named = re.findall(r"(\w+) (\d[\d.]*\d)", text)
        assert named and not [f"{name}=={version}" for name, version in named if f"{name}=={version}" not in pinned]
