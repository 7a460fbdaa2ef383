"""Compares the fast ALFWorld engine with the real one, and records what the real one does. Not part of the test run.

The real engine's installation compiles Fast Downward (over a minute), so it lives in an environment of its own:

    python3 -m venv .venv-alfworld && .venv-alfworld/bin/pip install -c constraints-alfworld.txt alfworld
    .venv-alfworld/bin/python tests/envs/alfworld_oracle.py compare
    .venv-alfworld/bin/python tests/envs/alfworld_oracle.py record

`record` writes tests/envs/alfworld_traces.json, which test_alfworld_engine.py replays on the fast engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from spear_fast.envs.alfworld import AlfworldParams, AlfworldTasks, textworld_game  # noqa: E402
from spear_fast.envs.alfworld.engine import Engine  # noqa: E402
from spear_fast.envs.alfworld.expert import advise  # noqa: E402
from spear_fast.envs.alfworld.game_files import GameText  # noqa: E402
from spear_fast.envs.alfworld.generator import Sizes  # noqa: E402
from spear_fast.envs.alfworld.wording import wording  # noqa: E402
from spear_fast.errors import TaskError  # noqa: E402
from tests.envs.alfworld_replay import Seen, digest, fast_seen  # noqa: E402
from tests.envs.alfworld_variants import beside, command, game, is_planned  # noqa: E402

Choose = Callable[[Engine], str]
TRACES = FOLDER / "alfworld_traces.json"
RECORDED_GAMES, RECORDED_STEPS, RECORDED_SIZES = 24, 20, Sizes((3, 8), 7)


@dataclass
class Tally:
    """What a comparison has seen, times in seconds of each engine."""

    games: int = 0
    steps: int = 0
    wins: int = 0
    mismatches: int = 0
    real_s: float = 0.0
    fast_s: float = 0.0


def real_seen(state: Any, score: int = 0, done: bool = False) -> Seen:
    """What the real engine shows."""
    return Seen(state.feedback, score, done, state.admissible_commands)


def play(real: Any, text: GameText, choose: Choose, num_steps: int, tally: Tally) -> list[tuple[str, Seen]]:
    """Play one game on both engines; return commands with what the real engine showed, up to the first difference."""
    fast = Engine(text.problem, wording(text.grammar))
    real.load(text.data())
    seen = [("", real_seen(real.reset()))]
    tally.games += 1
    if seen[0][1] != fast_seen(text, fast):
        report(tally, text, "", seen[0][1], fast_seen(text, fast))
        return seen
    for _ in range(num_steps):
        text_in = choose(fast)
        began = time.perf_counter()
        state, score, done = real.step(text_in)
        middle = time.perf_counter()
        reply = fast.step(text_in)
        mine = Seen(reply.text, reply.reward, reply.done, fast.actions())
        tally.fast_s += time.perf_counter() - middle
        tally.real_s += middle - began
        tally.steps += 1
        seen.append((text_in, real_seen(state, score, done)))
        if mine != seen[-1][1]:
            report(tally, text, text_in, seen[-1][1], mine)
            break
        if done:
            tally.wins += 1
            break
    return seen


def chooser(seed: int, text: GameText) -> Choose:
    """Return who plays game `seed`: at random, or towards the goal most of the time."""
    random, words = Random(seed), wording(text.grammar)

    def plan(fast: Engine) -> str:
        try:
            _, action, names = advise(fast.house, fast.state)
        except TaskError:  # A bent game may have no solution.
            return random.choice(fast.actions())
        return words.command(action, names)

    return lambda fast: command(random, fast, (lambda: plan(fast)) if is_planned(seed) else None)


def script(commands: list[str]) -> Choose:
    """Return a player of these commands."""
    left = iter(commands)
    return lambda _: next(left)


def report(tally: Tally, text: GameText, after: str, real: Seen, fast: Seen) -> None:
    tally.mismatches += 1
    only = sorted(set(real.actions) ^ set(fast.actions))
    print(f"{text.problem.name} differs after {after!r}\n  real: {real[:3]}\n  fast: {fast[:3]}\n  in one only: {only}")


def compare(args: argparse.Namespace) -> int:
    """Play games on both engines, then some through the task set; return the number of differences."""
    if not args.plain:
        textworld_game.cache_parsing()
    real = textworld_game.AlfredDemangler(textworld_game.PddlEnv(textworld_game.request()))
    tally = Tally()
    for seed in range(args.seed, args.seed + args.games):
        text = game(seed)
        play(real, text, chooser(seed, text), args.steps, tally)
    text, commands = beside()
    play(real, text, script(commands), len(commands), tally)
    different = asyncio.run(compare_task_sets(6))
    print(
        f"{tally.games} games, {tally.steps} steps, {tally.wins} won, {tally.mismatches} games differ; steps/s: "
        f"real {tally.steps / tally.real_s:.0f}, fast {tally.steps / tally.fast_s:.0f}; "
        f"through the task set, by the real planner: 6 games, {different} differ"
    )
    return tally.mismatches + different


async def compare_task_sets(num_games: int) -> int:
    """Play the real planner's commands through both engines' environments; count the games that differ."""
    sizes = {"num_train": num_games, "num_eval": 0, "num_demo": 0}
    real, fast = (AlfworldTasks(AlfworldParams(engine=engine, **sizes), seed=3) for engine in ("textworld", "fast"))
    different = 0
    for index in range(num_games):
        envs = [tasks.make() for tasks in (real, fast)]
        options = {"split": "train", "index": index}
        shown = [await env.reset(seed=0, options=options) for env in envs]
        over = False
        while not over and shown[0] == shown[1]:
            message = envs[0].expert()
            shown = [await env.step(message) for env in envs]
            over = shown[0][2] or shown[0][3]
        different += shown[0] != shown[1] or not shown[0][4].get("won")
        for env in envs:
            await env.close()
    return different


def record() -> int:
    """Write what the real engine does in small games of all types; return the number of differences."""
    real = textworld_game.AlfredDemangler(textworld_game.PddlEnv(textworld_game.request()))
    tally, traces = Tally(), []
    games = [game(seed, RECORDED_SIZES) for seed in range(RECORDED_GAMES)]
    players = [(text, chooser(seed, text), RECORDED_STEPS) for seed, text in enumerate(games)]
    scripted, commands = beside()
    players.append((scripted, script(commands), len(commands)))
    for text, choose, num_steps in players:
        steps = [
            [text_in, seen.text, seen.reward, seen.done, digest(seen.actions)]
            for text_in, seen in play(real, text, choose, num_steps, tally)
        ]
        traces.append({"sentence": text.sentence, "problem": text.problem.text(), "steps": steps})
    lines = ",\n".join(json.dumps(trace, separators=(",", ":")) for trace in traces)
    TRACES.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(traces)} games, {tally.steps} steps, {tally.mismatches} differ, {TRACES.stat().st_size} bytes")
    return tally.mismatches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "record"])
    parser.add_argument("--games", type=int, default=60, help="games to compare")
    parser.add_argument("--steps", type=int, default=50, help="most steps of a compared game")
    parser.add_argument("--seed", type=int, default=0, help="first game")
    parser.add_argument("--plain", action="store_true", help="compare with textworld as it is, without our caches")
    args = parser.parse_args()
    differences = compare(args) if args.what == "compare" else record()
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
