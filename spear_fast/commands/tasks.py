"""`spear-fast tasks`: the task sets there are, one in detail, and files of demonstrations or games of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from spear_fast.errors import ConfigError, SpearError, TaskError

if TYPE_CHECKING:
    from spear_fast.envs.base import TaskSet


def tasks(args: argparse.Namespace) -> int:
    """List task sets, show one, or write demonstrations or games of it."""
    _check(args)
    if args.name is None:
        _print_list()
    elif args.demos is not None:
        _write_demos(args)
    elif args.games is not None:
        _write_games(args)
    else:
        _print_task_set(args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError if the options do not go together."""
    wanted = [option for option in ("demos", "games") if getattr(args, option) is not None]
    if len(wanted) > 1:
        raise ConfigError("--demos and --games are two commands; give one of them")
    if args.name is None and (wanted or args.out is not None):
        raise ConfigError("--demos, --games and --out need the name of a task set; `spear-fast tasks` lists them")
    if bool(wanted) != (args.out is not None):
        raise ConfigError("--out is where --demos or --games write; give both or neither")
    for option in wanted:
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option} {getattr(args, option)}: there must be at least one")
    if args.max_turns < 1:
        raise ConfigError(f"--max-turns {args.max_turns}: there must be at least one")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed} must not be negative")


def _print_list() -> None:
    from spear_fast.envs.listing import listings

    found = listings()
    width = max(len(listing.name) for listing in found)
    for listing in found:
        extra = f" (extra {listing.extra})" if listing.extra else ""
        print(f"{listing.name.ljust(width)}  {listing.summary}{extra}")
        if listing.missing:
            missing = ", ".join(listing.missing)
            print(f"{'':{width}}  not installed: {missing}; pip install 'spear-fast[{listing.extra}]'")
    print("Your own: package.module:Class. More of one: spear-fast tasks NAME [key=value ...]")


def _params(overrides: Sequence[str]) -> dict[str, Any]:
    from spear_fast.config.overrides import parse_overrides

    # Under their full name: a parameter called like a section of the configuration is no section.
    settings = parse_overrides([f"task.params.{override}" for override in overrides])
    return settings["task"]["params"] if settings else {}


def _open(args: argparse.Namespace) -> TaskSet:
    """The task set as a run with this seed would have it."""
    from spear_fast.envs.registry import make_task_set
    from spear_fast.seeds import derive_seed

    return make_task_set(args.name, _params(args.overrides), derive_seed(args.seed, "tasks"))


def _print_task_set(args: argparse.Namespace) -> None:
    from spear_fast.config.fields import fields_of
    from spear_fast.envs.registry import task_set_class

    found = task_set_class(args.name)
    print(f"{args.name}: {' '.join((found.__doc__ or '').split())}")
    print("\nParameters: task.params.KEY in a configuration, KEY=VALUE here")
    for field in fields_of(found.Params):
        if not field.is_section:
            print(f"  {field.key} ({field.type}, {_default(field.default)})")
            if field.description:
                print(f"      {' '.join(field.description.split())}")
    try:
        _print_opened(args)
    except SpearError as error:
        # Without parameters it is only an offer: some sets need one, a file say.
        if args.overrides:
            raise
        print(f"\nNothing of it can be shown as it is: {error}")


def _default(text: str) -> str:
    return text if text == "required" else f"default {text}"


def _print_opened(args: argparse.Namespace) -> None:
    from spear_fast.assemble import close_tasks

    task_set = _open(args)
    try:
        sizes = ", ".join(f"{split} {size}" for split, size in _sizes(task_set))
        print(f"\nTasks: {sizes}")
        _print_opening(task_set, args.seed)
    finally:
        close_tasks(task_set)


def _sizes(task_set: TaskSet) -> Iterator[tuple[str, int | str]]:
    for split in ("train", "eval", "demo"):
        try:
            yield split, task_set.size(split)
        except TaskError:
            yield split, "none"


def _print_opening(task_set: TaskSet, seed: int) -> None:
    from spear_fast.envs.tool_schema import tool_schema
    from spear_fast.rollout.demos import opening

    task, messages = opening(task_set, seed)
    print(f"\nThe first task of split {task.split}, seed {seed}:")
    for tool in task_set.tools:
        function = tool_schema(tool)["function"]
        print(
            f"[tool] {function['name']}({', '.join(function['parameters']['properties'])}): {function['description']}"
        )
    for message in messages:
        role = "the expert" if message["role"] == "assistant" else message["role"]
        print(f"[{role}] {message['content']}")
    if messages[-1]["role"] != "assistant":
        print("This task set has no expert.")


def _write_demos(args: argparse.Namespace) -> None:
    from spear_fast.assemble import close_tasks
    from spear_fast.rollout.demo_file import demo_record, write_demos
    from spear_fast.rollout.demos import demo_split, demonstrations

    task_set = _open(args)
    try:
        split, size = demo_split(task_set)
        if args.demos > size:
            raise TaskError(f"--demos {args.demos}: split {split!r} of {task_set.name!r} has only {size} tasks")
        made = demonstrations(task_set, args.demos, max_turns=args.max_turns, seed=args.seed)
        count = write_demos(args.out, (demo_record(task_set, task, messages, args.seed) for task, messages in made))
    finally:
        close_tasks(task_set)
    print(f"{count} demonstrations: {args.out}")


def _write_games(args: argparse.Namespace) -> None:
    from spear_fast.envs.base import GameWriter
    from spear_fast.envs.listing import listings
    from spear_fast.envs.registry import checked_params, task_set_class

    found = task_set_class(args.name)
    if not isinstance(found, GameWriter):
        writers = ", ".join(listing.name for listing in listings() if listing.writes_games) or "none of the built-in"
        raise ConfigError(f"--games: task set {args.name!r} has no games to write; those that have: {writers}")
    params = checked_params(args.name, _params(args.overrides))
    for line in found.write_games(params, count=args.games, seed=args.seed, out=args.out):
        print(line)
