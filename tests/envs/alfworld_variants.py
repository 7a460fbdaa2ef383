"""Games for comparing the two ALFWorld engines: generated ones, and ones bent to what only official files contain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from spear_fast.envs.alfworld.engine import Engine
from spear_fast.envs.alfworld.game_files import GameText, text_of
from spear_fast.envs.alfworld.generator import Sizes, draw
from spear_fast.envs.alfworld.house import house_of
from spear_fast.envs.alfworld.installed import TASK_TYPES, installed
from spear_fast.envs.alfworld.problem import Problem

Facts = list[tuple[str, ...]]
USUAL = Sizes((6, 14), None)
BUSY = ("take", "move", "open", "close", "heat", "cool", "clean", "use", "slice")
"""Commands that change things; half of the random ones are of these."""


def game(seed: int, sizes: Sizes = USUAL) -> GameText:
    """Return game `seed`: task types in turn, a third in test scenes, half of them bent."""
    data = installed()
    random = Random(seed)
    task_type = TASK_TYPES[seed % len(TASK_TYPES)]
    scenes = data.test_scenes if seed % 3 == 0 else data.train_scenes
    draft = None
    while draft is None:
        draft = draw(random, [task_type], scenes, sizes)
    text = text_of(draft, f"game-{seed}")
    return replace(text, problem=bent(text.problem, random)) if is_bent(seed) else text


def is_bent(seed: int) -> bool:
    """Return whether game `seed` is bent: every second round of the task types."""
    return seed // len(TASK_TYPES) % 2 == 1


def is_planned(seed: int) -> bool:
    """Return whether game `seed` is played towards its goal: two of every four rounds, one of them bent."""
    return seed // (2 * len(TASK_TYPES)) % 2 == 1


def bent(problem: Problem, random: Random) -> Problem:
    """Return a game with shared locations, open doors, full containers, treated objects, another beginning."""
    facts: Facts = list(problem.facts)
    for change in (_share_location, _open_some, _fill_container, _treat_some, _start_somewhere):
        facts = change(facts, random)
    return replace(problem, facts=tuple(facts))


def command(random: Random, engine: Engine, plan: Callable[[], str] | None) -> str:
    """Return what to try next: what `plan` says, else a random command, sometimes one that is not admissible."""
    draw = random.random()
    if plan is not None and draw < 0.8:
        return plan()
    if draw > 0.95:
        return random.choice(["take the moon", "go to", "", "look around", "examine fridge 99"])
    actions = engine.actions()
    busy = [action for action in actions if action.startswith(BUSY)]
    return random.choice(busy if busy and random.random() < 0.5 else actions)


def beside() -> tuple[GameText, list[str]]:
    """Return a game with commands that move an object between two receptacles at one location, looking in between.

    The real engine then lists the object as lying beside the first receptacle.
    """
    seed = 0
    while True:
        text = game(seed)
        house = house_of(text.problem)
        for _, name, first in (fact for fact in text.problem.facts if fact[0] == "inreceptacle"):
            for second in house.at[house.location[first]]:
                open_ones = not house.openable & {first, second}
                if open_ones and second != first and house.kind[name] in house.accepts.get(house.kind[second], ()):
                    item, one, other = house.names[name], house.names[first], house.names[second]
                    go = [f"go to {next(house.names[place] for place in house.receptacles if place != first)}"]
                    there = [f"take {item} from {one}", "look", f"move {item} to {other}", "look", f"examine {one}"]
                    back = [f"take {item} from {other}", f"move {item} to {one}", "look"]
                    return text, [*go, f"go to {one}", "look", *there, *back]
        seed += 1


def _of(facts: Facts, predicate: str) -> Facts:
    return [fact for fact in facts if fact[0] == predicate]


def _share_location(facts: Facts, random: Random) -> Facts:
    """Move some receptacles, with what lies in them, to the location of others."""
    locations = sorted({fact[2] for fact in _of(facts, "receptacleatlocation")})
    moved = dict(
        zip(random.sample(locations, len(locations) // 3), random.sample(locations, len(locations) // 3), strict=True)
    )
    return [
        (*fact[:2], moved.get(fact[2], fact[2])) if fact[0] in ("receptacleatlocation", "objectatlocation") else fact
        for fact in facts
    ]


def _open_some(facts: Facts, random: Random) -> Facts:
    return facts + [("opened", fact[1]) for fact in _of(facts, "openable") if random.random() < 0.3]


def _fill_container(facts: Facts, random: Random) -> Facts:
    containers = [fact[1] for fact in _of(facts, "isreceptacleobject")]
    others = [fact[1] for fact in _of(facts, "pickupable") if fact[1] not in containers]
    if not containers or not others:
        return facts
    return [*facts, ("inreceptacleobject", random.choice(others), random.choice(containers))]


def _treat_some(facts: Facts, random: Random) -> Facts:
    treated = {"cleanable": "isclean", "coolable": "iscool", "sliceable": "issliced"}
    return facts + [(treated[fact[0]], fact[1]) for fact in facts if fact[0] in treated and random.random() < 0.15]


def _start_somewhere(facts: Facts, random: Random) -> Facts:
    if random.random() < 0.5:
        return facts
    location = random.choice(_of(facts, "receptacleatlocation"))[2]
    return [(*fact[:2], location) if fact[0] == "atlocation" else fact for fact in facts]
