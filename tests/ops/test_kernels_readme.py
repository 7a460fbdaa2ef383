"""The examples of kernels/README.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

PAGE = Path(__file__).parents[2] / "kernels" / "README.md"
EXAMPLES = re.findall(r"### (\S+)(?:(?!###).)*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
WIDTH, VOCAB, LENGTH = 8, 24, 40


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)

    def forward(self, input_ids):
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids).tanh())


class Model(nn.Module):
    """What the examples use of a Hugging Face causal model."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = Decoder(), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.lm_head(self.model(input_ids).last_hidden_state))


def make_batch():
    input_ids = torch.randint(VOCAB, (1, LENGTH))
    action_index = torch.arange(10, LENGTH)
    num_rows = len(action_index)
    seq_ids = torch.arange(num_rows) // 8
    return SimpleNamespace(
        input_ids=input_ids,
        action_index=action_index,
        ids=input_ids[0, action_index],
        old_logp=torch.full((num_rows,), -3.0),
        advantages=torch.randn(num_rows),
        mask=torch.rand(num_rows) < 0.8,
        seq_ids=seq_ids,
        positions=torch.arange(num_rows) % 8,
    )


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example(name, code, group):
    torch.manual_seed(0)
    model, batch = Model(), make_batch()
    exec(code, {"torch": torch, "model": model, "batch": batch, "step": 3, "group": group})
    if "backward" in code:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    else:
        assert batch.advantages.abs().sum() > 0


def test_every_function_has_an_example_of_about_ten_lines():
    assert [name for name, _ in EXAMPLES] == re.findall(r"### (\S+)", PAGE.read_text(encoding="utf-8"))
    for name, code in EXAMPLES:
        assert len(code.splitlines()) <= 16, name
