"""This project's policy losses and fused head inside verl; importing this package registers the losses there.

In a verl run every worker process has to import it, which verl (0.9.1) does when told so by one of

    actor_rollout_ref.model.external_lib=spear_fast.integrations.verl  # a setting of the run
    VERL_USE_EXTERNAL_MODULES=spear_fast.integrations.verl             # in the environment of every node

and the loss is chosen by verl's own setting, `actor_rollout_ref.actor.policy_loss.loss_mode=spear_vanilla`; LOSSES
lists the names. `...external_lib=spear_fast.integrations.verl.fused` puts the fused head in place too, for runs with
`use_fused_kernels=True` and `fused_kernel_options.impl_backend=torch` under actor_rollout_ref.model.

By hand, anywhere that verl is installed:

    from spear_fast.integrations.verl import patch_fused_head

    with patch_fused_head():  # until here and below, verl's FusedLinearForPPO runs on spear_kernels.linear_logprob
        output = model(input_ids=input_ids, temperature=0.7, return_dict=True)
    loss, metrics = get_policy_loss_fn("spear_clip_cov")(old_log_prob, log_prob, advantages, mask, "token-mean", actor)

Replay and self-imitation are not here: they need rows of earlier steps in a mini-batch, for which verl has no hook.
"""

from __future__ import annotations

from spear_fast.integrations.verl.head import FusedHeadPatch, patch_fused_head
from spear_fast.integrations.verl.losses import LOSSES, register

__all__ = ["LOSSES", "FusedHeadPatch", "patch_fused_head", "register"]

register()
