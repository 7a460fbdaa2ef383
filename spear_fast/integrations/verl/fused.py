"""Importing this module registers the losses and puts the fused head in place for the rest of the process.

It is meant for verl's `external_lib`, which imports modules and calls nothing; code calls `patch_fused_head`.
"""

from __future__ import annotations

from spear_fast.integrations.verl.head import patch_fused_head

patch = patch_fused_head()
"""`patch.undo()` gives verl its own head back."""
