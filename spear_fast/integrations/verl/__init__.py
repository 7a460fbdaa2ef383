"""This project's policy losses and fused head inside verl; importing this package registers the losses there.

In a verl run every worker process has to import it, which verl (0.9.1) does when told so by one of

    actor_rollout_ref.model.external_lib=spear_fast.integrations.verl  # a setting of the run
    VERL_USE_EXTERNAL_MODULES=spear_fast.integrations.verl             # in the environment of every node

and the loss is chosen by verl's own setting, `actor_rollout_ref.actor.policy_loss.loss_mode=spear_vanilla`; LOSSES
lists the names. `...external_lib=spear_fast.integrations.verl.fused` puts the fused head in place too, for runs with
`use_fused_kernels=True` and `fused_kernel_options.impl_backend=torch` under actor_rollout_ref.model.

Outside a run, `model` being a causal model and `actor` verl's ActorConfig:

```python
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.trainer.ppo.core_algos import get_policy_loss_fn

from spear_fast.integrations.verl import patch_fused_head

apply_monkey_patch(model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend="torch")
with patch_fused_head():  # from here on verl's FusedLinearForPPO runs on spear_kernels.linear_logprob
    output = model(input_ids=batch.input_ids, temperature=0.7, return_dict=True)
    log_prob = output.log_probs[:, :-1]  # [B, T]; place t is about the token at t + 1
    clip_cov = get_policy_loss_fn("spear_clip_cov_dual")
    loss, metrics = clip_cov(batch.old_log_prob, log_prob, batch.advantages, batch.mask, "token-mean", actor)
    loss.backward()
```

Replay and self-imitation are not here: they need rows of earlier steps in a mini-batch, for which verl has no hook.
"""

from __future__ import annotations

from spear_fast.integrations.verl.head import FusedHeadPatch, patch_fused_head
from spear_fast.integrations.verl.losses import LOSSES, register

__all__ = ["LOSSES", "FusedHeadPatch", "patch_fused_head", "register"]

register()
