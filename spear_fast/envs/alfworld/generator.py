"""Draws games: a scene of the package, a goal that makes sense there, and objects put where the package allows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from random import Random

from .goals import QUALITIES, goal_text
from .installed import Installed, installed
from .problem import Problem, pddl_name
from .scenes import Receptacle, Scene, scene

_NEEDS = {"clean": ("Cleanable", "SinkBasin"), "hot": ("Heatable", "Microwave"), "cool": ("Coolable", "Fridge")}
"""What an object must be able to do to become so, and where."""
_LAMP_PLACES = ("CoffeeTable", "Desk", "DiningTable", "Dresser", "Shelf", "SideTable")
"""Where lamps stand; the package has no placement rule for them."""
_START = "loc|99|99|0|30"
"""Where the agent begins: away from all receptacles."""


@dataclass(frozen=True)
class Item:
    """An object of a game."""

    id: str
    kind: str
    receptacle: str
    """Id of the receptacle that it lies in at the start."""


@dataclass(frozen=True)
class Draft:
    """A game in the package's terms, before it is written in PDDL."""

    task_type: str
    scene: Scene
    receptacles: tuple[Receptacle, ...]
    items: tuple[Item, ...]
    object: str
    target: str
    """Class of the receptacle in the goal; empty if there is a lamp instead."""
    lamp: str
    sentence: str
    """The goal in words."""

    @cached_property
    def identity(self) -> str:
        """A text that tells games apart: all but ids of objects and the goal's wording."""
        receptacles = " ".join(receptacle.id for receptacle in self.receptacles)
        items = " ".join(sorted(f"{item.kind}@{item.receptacle}" for item in self.items))
        goal = f"{self.task_type} {self.object} {self.target}{self.lamp}"
        return f"{self.scene.number}: {goal}; {receptacles}; {items}"


@dataclass(frozen=True)
class Sizes:
    """How large a game is."""

    extra_objects: tuple[int, int]
    """Fewest and most objects beside those that the goal needs."""
    max_receptacles: int | None
    """Receptacles kept of a scene; those that the goal needs always are."""


@dataclass(frozen=True)
class _Goal:
    """A goal in a scene, with the receptacles that it needs."""

    task_type: str
    object: str
    target: str
    lamp: str
    needed: tuple[Receptacle, ...]
    lamp_place: Receptacle | None


def draw(random: Random, task_types: Sequence[str], scenes: Sequence[int], sizes: Sizes) -> Draft | None:
    """Return a game, or None if this draw ended in a goal that its scene does not allow."""
    data = installed()
    task_type = random.choice(list(task_types))
    fitting = [number for number in scenes if data.rooms[number] in data.goal_rooms[task_type]]
    place = scene(random.choice(fitting))
    goal = _draw_goal(data, random, task_type, place)
    if goal is None:
        return None
    receptacles = _keep(random, place, goal, sizes.max_receptacles)
    items = _place_items(data, random, place, goal, receptacles, sizes.extra_objects)
    names = {"obj": goal.object.lower(), "recep": goal.target.lower(), "toggle": goal.lamp.lower()}
    sentence = random.choice(data.sentences[task_type]).format(**names)
    return Draft(task_type, place, receptacles, items, goal.object, goal.target, goal.lamp, sentence)


def problem_of(draft: Draft, name: str) -> Problem:
    """Return a game in PDDL."""
    data = installed()
    receptacle_kinds = sorted({receptacle.kind for receptacle in draft.receptacles})
    # The domain names these kinds, so they are declared even where there is none.
    object_kinds = sorted({item.kind for item in draft.items} | {"Knife", "ButterKnife"})
    stations = {station for _, station in _NEEDS.values()}
    objects = {"agent1": "agent"}
    objects |= {pddl_name(item.id): "object" for item in draft.items}
    objects |= {pddl_name(receptacle.id): "receptacle" for receptacle in draft.receptacles}
    objects |= {pddl_name(receptacle.location): "location" for receptacle in draft.receptacles}
    objects |= {pddl_name(_START): "location"}
    objects |= {_type(kind): "otype" for kind in object_kinds}
    objects |= {_type(kind): "rtype" for kind in sorted(stations.union(receptacle_kinds))}
    facts = [("atlocation", "agent1", pddl_name(_START))]
    for receptacle in draft.receptacles:
        facts += _receptacle_facts(data, receptacle)
    location = {receptacle.id: pddl_name(receptacle.location) for receptacle in draft.receptacles}
    for item in draft.items:
        facts += _item_facts(data, item, location)
    facts += [
        ("cancontain", _type(receptacle), _type(kind))
        for receptacle in receptacle_kinds
        for kind in object_kinds
        if kind in data.holds.get(receptacle, ())
    ]
    goal = goal_text(draft.task_type, obj=draft.object, receptacle=draft.target, lamp=draft.lamp)
    return Problem(name, objects, tuple(facts), goal)


def _draw_goal(data: Installed, random: Random, task_type: str, place: Scene) -> _Goal | None:
    ability, station = _NEEDS.get(QUALITIES.get(task_type, ""), ("", ""))
    homes = _homes(place.number)
    kinds = [kind for kind in homes if not ability or kind in data.can_be[ability]]
    stations = [receptacle for receptacle in place.receptacles if receptacle.kind == station]
    if not kinds or (station and not stations):
        return None
    kind = random.choice(kinds)
    needed = stations[:1]
    if task_type == "look_at_obj_in_light":
        lamps = [lamp for lamp in place.kinds if lamp in data.can_be["Toggleable"]]
        surfaces = [receptacle for receptacle in place.receptacles if receptacle.kind in _LAMP_PLACES]
        if not lamps or not surfaces:
            return None
        surface = random.choice(surfaces)
        needed += [surface, random.choice(homes[kind])]
        return _Goal(task_type, kind, "", random.choice(lamps), tuple(needed), surface)
    targets = sorted({home.kind for home in homes[kind]} - {station})
    # The object must begin elsewhere, or the game could be won before it starts.
    targets = [target for target in targets if any(home.kind != target for home in homes[kind])]
    if not targets:
        return None
    target = random.choice(targets)
    needed.append(random.choice([home for home in homes[kind] if home.kind == target]))
    needed.append(random.choice([home for home in homes[kind] if home.kind != target]))
    return _Goal(task_type, kind, target, "", tuple(needed), None)


@cache
def _homes(number: int) -> Mapping[str, list[Receptacle]]:
    """Return the receptacles of a scene that each of its classes of objects fits into, lamps left out."""
    data, place = installed(), scene(number)
    found = {
        kind: [receptacle for receptacle in place.receptacles if kind in data.holds.get(receptacle.kind, ())]
        for kind in place.kinds
        if kind not in data.can_be["Toggleable"]
    }
    return {kind: homes for kind, homes in found.items() if homes}


def _keep(random: Random, place: Scene, goal: _Goal, most: int | None) -> tuple[Receptacle, ...]:
    """The receptacles of the game, in the scene's order."""
    if most is None or most >= len(place.receptacles):
        return place.receptacles
    needed = {receptacle.id for receptacle in goal.needed}
    others = [receptacle.id for receptacle in place.receptacles if receptacle.id not in needed]
    kept = needed.union(random.sample(others, max(0, most - len(needed))))
    return tuple(receptacle for receptacle in place.receptacles if receptacle.id in kept)


def _place_items(
    data: Installed,
    random: Random,
    place: Scene,
    goal: _Goal,
    receptacles: tuple[Receptacle, ...],
    extra: tuple[int, int],
) -> tuple[Item, ...]:
    kept = {receptacle.id for receptacle in receptacles}
    homes = {kind: [home for home in found if home.id in kept] for kind, found in _homes(place.number).items()}
    homes[goal.object] = [home for home in homes[goal.object] if home.kind != goal.target]
    kinds = [kind for kind, found in homes.items() if found]
    wanted = [goal.object] * (2 if goal.task_type == "pick_two_obj_and_place" else 1)
    wanted += [random.choice(kinds) for _ in range(random.randint(*extra))]
    items = [
        Item(_item_id(random, number, kind), kind, random.choice(homes[kind]).id) for number, kind in enumerate(wanted)
    ]
    if goal.lamp_place is not None:
        items.append(Item(_item_id(random, len(items), goal.lamp), goal.lamp, goal.lamp_place.id))
    return tuple(items)


def _item_id(random: Random, number: int, kind: str) -> str:
    """An id as of the package's objects, class and coordinates; they have no other meaning than to tell ids apart."""
    x, y, z = random.randrange(100), random.randrange(10), random.randrange(100)
    return f"{kind}|+{x:02d}.{number:02d}|+00.90|-{y:02d}.{z:02d}"


def _receptacle_facts(data: Installed, receptacle: Receptacle) -> list[tuple[str, ...]]:
    name = pddl_name(receptacle.id)
    facts: list[tuple[str, ...]] = [
        ("receptacletype", name, _type(receptacle.kind)),
        ("receptacleatlocation", name, pddl_name(receptacle.location)),
    ]
    if receptacle.kind in data.openable:
        facts.append(("openable", name))
    return facts


def _item_facts(data: Installed, item: Item, location: Mapping[str, str]) -> list[tuple[str, ...]]:
    name, is_lamp = pddl_name(item.id), item.kind in data.can_be["Toggleable"]
    facts: list[tuple[str, ...]] = [
        ("objecttype", name, _type(item.kind)),
        ("inreceptacle", name, pddl_name(item.receptacle)),
        ("objectatlocation", name, location[item.receptacle]),
        ("toggleable" if is_lamp else "pickupable", name),
    ]
    if item.kind in data.containers:
        facts.append(("isreceptacleobject", name))
    facts += [
        (ability.lower(), name)
        for ability in ("Cleanable", "Heatable", "Coolable", "Sliceable")
        if item.kind in data.can_be[ability]
    ]
    return facts


def _type(kind: str) -> str:
    return f"{kind.lower()}type"
