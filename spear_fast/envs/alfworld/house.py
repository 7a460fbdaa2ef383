"""What never changes within a game: things, their names, kinds and abilities, and where receptacles stand."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .goals import Goal, parse_goal
from .problem import Problem

KNIVES = ("knife", "butterknife")
STATIONS = {"clean": "sinkbasin", "hot": "microwave", "cool": "fridge"}
"""The kind of receptacle that makes an object so."""
_ABILITIES = {"clean": "cleanable", "hot": "heatable", "cool": "coolable"}


@dataclass(frozen=True)
class House:
    """Things by their PDDL names; kinds in lower case without "type"."""

    goal: Goal
    names: Mapping[str, str]
    """The name shown for each receptacle and object: kind and number."""
    receptacles: Sequence[str]
    """In the order in which they are listed."""
    objects: Mapping[str, int]
    """All objects, with their place in lists."""
    location: Mapping[str, str]
    """Of each receptacle."""
    at: Mapping[str, Sequence[str]]
    """The receptacles at each location."""
    kind: Mapping[str, str]
    """Of each receptacle and object."""
    accepts: Mapping[str, frozenset[str]]
    """Kinds of objects that fit into a kind of receptacle."""
    openable: frozenset[str]
    pickupable: frozenset[str]
    toggleable: frozenset[str]
    sliceable: frozenset[str]
    containers: frozenset[str]
    """Objects that can hold others."""
    inside: Mapping[str, Sequence[str]]
    """Objects in such an object; no command changes it."""
    able: Mapping[str, frozenset[str]]
    """Objects that can become "clean", "hot", "cool"."""


def house_of(problem: Problem) -> House:
    """Return the house of a game. Raises TaskError if its goal is of no known task type."""
    facts: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for predicate, *arguments in problem.facts:
        facts[predicate].append(tuple(arguments))
    receptacles = sorted(name for name, kind in problem.objects.items() if kind == "receptacle")
    objects = sorted(name for name, kind in problem.objects.items() if kind == "object")
    location = {fact[0]: fact[1] for fact in facts["receptacleatlocation"]}
    at: dict[str, list[str]] = defaultdict(list)
    for receptacle in receptacles:
        at[location[receptacle]].append(receptacle)
    accepts: dict[str, set[str]] = defaultdict(set)
    for receptacle, kind in facts["cancontain"]:
        accepts[_kind(receptacle)].add(_kind(kind))
    inside: dict[str, list[str]] = defaultdict(list)
    for inner, outer in sorted(facts["inreceptacleobject"]):
        inside[outer].append(inner)
    return House(
        goal=parse_goal(problem.goal),
        names=shown_names([*receptacles, *objects]),
        receptacles=receptacles,
        objects={name: place for place, name in enumerate(objects)},
        location=location,
        at=dict(at),
        kind={name: _kind(kind) for name, kind in [*facts["receptacletype"], *facts["objecttype"]]},
        accepts={kind: frozenset(kinds) for kind, kinds in accepts.items()},
        openable=_firsts(facts["openable"]),
        pickupable=_firsts(facts["pickupable"]),
        toggleable=_firsts(facts["toggleable"]),
        sliceable=_firsts(facts["sliceable"]),
        containers=_firsts(facts["isreceptacleobject"]),
        inside=dict(inside),
        able={quality: _firsts(facts[predicate]) for quality, predicate in _ABILITIES.items()},
    )


def shown_names(identifiers: Iterable[str]) -> dict[str, str]:
    """Return the name of each thing: kind and number, numbers falling in the order of identifiers, as ALFWorld does."""
    ordered = sorted(identifiers)
    left = Counter(_family(identifier) for identifier in ordered)
    names = {}
    for identifier in ordered:
        family = _family(identifier)
        names[identifier] = f"{family} {left[family]}"
        left[family] -= 1
    return names


def _family(identifier: str) -> str:
    return identifier.split("_bar_", 1)[0] + ("basin" if "basin" in identifier else "")


def _kind(type_name: str) -> str:
    return type_name.removesuffix("type")


def _firsts(facts: Iterable[tuple[str, ...]]) -> frozenset[str]:
    return frozenset(fact[0] for fact in facts)
