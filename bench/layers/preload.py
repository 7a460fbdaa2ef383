"""Imports what contenders need, for the process that those who measure memory are forked from."""

from __future__ import annotations

from contextlib import suppress

import torch

from bench.layers.levels import LEVELS

for _level in LEVELS.values():
    for _contender in _level.contenders:
        if "cpu" in _contender.devices:
            with suppress(Exception):  # the one that measures it will say what is wrong
                _contender.build(torch.device("cpu"))
