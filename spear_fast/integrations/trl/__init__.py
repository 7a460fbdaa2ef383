"""TRL's trainers on this project's losses: LogProbMixin and patch_trainer, SPEARConfig and SPEARTrainer.

With a transformers causal `model`, its `tokenizer` and a `dataset` with a column "prompt":

```python
import torch
from trl import GRPOConfig, GRPOTrainer

from spear_fast.integrations.trl import SPEARConfig, SPEARTrainer, patch_trainer


def reward(completions, **_):
    return [float(len(set(text))) for text in completions]


options = {"output_dir": "out", "max_steps": 2, "num_generations": 4, "max_completion_length": 8}
options |= {"per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no"}
options |= {"bf16": torch.cuda.is_available()}

# TRL's own losses; only action tokens reach the head. In a class: class MyTrainer(LogProbMixin, GRPOTrainer).
trainer = GRPOTrainer(model, reward, GRPOConfig(**options), dataset, processing_class=tokenizer)
patch_trainer(trainer).train()

# SPEAR: filters, Clip-Cov and self-imitation. This model has no tools, so nothing is paid for calling them.
config = SPEARConfig(**options, intrinsic_mode="none", replay_require_tool_call=False, replay_buffer_size=64)
SPEARTrainer(model, reward, config, dataset, processing_class=tokenizer).train()
```
"""

from __future__ import annotations

from .config import SPEARConfig
from .logprob import LogProbMixin, patch_trainer
from .trainer import SPEARTrainer

__all__ = ["LogProbMixin", "SPEARConfig", "SPEARTrainer", "patch_trainer"]
