"""`spear-fast plan`: memory and step time on GPUs that need not be here."""

from __future__ import annotations

import argparse

from spear_fast.errors import ConfigError

from .pages import print_sections


def plan(args: argparse.Namespace) -> int:
    """Print the plan."""
    from spear_fast.config.load import load_config
    from spear_fast.planning import elsewhere, shape_of_run

    if args.gpus < 1 or (args.nodes or 1) < 1:
        raise ConfigError(f"--gpus {args.gpus} --nodes {args.nodes}: there must be at least one of each")
    config = load_config(args.config, args.overrides)
    sections = elsewhere(
        config,
        shape_of_run(config, args.config, args.shape),
        num_gpus=args.gpus,
        gpu_name=args.gpu,
        num_nodes=args.nodes,
        coefficients=args.coefficients,
        tokens=args.tokens,
        sampled=args.sampled,
    )
    print_sections(sections)
    return 0
