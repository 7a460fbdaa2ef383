"""What changes within a game, and whether it is won."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .house import House
from .problem import Problem

_QUALITY_FACTS = {"isclean": "clean", "ishot": "hot", "iscool": "cool", "issliced": "sliced", "istoggled": "toggled"}


@dataclass
class State:
    """Where the agent is, what it holds, and how things are. Things by their PDDL names."""

    location: str = ""
    held: str | None = None
    opened: set[str] = field(default_factory=set)
    place: dict[str, str] = field(default_factory=dict)
    """The receptacle of each object that lies in one."""
    object_location: dict[str, str] = field(default_factory=dict)
    """The location of each object that is not held."""
    left: set[tuple[str, str]] = field(default_factory=set)
    """Objects with receptacles that they were taken out of and not put back into."""
    are: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in _QUALITY_FACTS.values()})
    """Objects that are "clean", "hot", "cool", "sliced", "toggled"."""


def start_of(problem: Problem) -> State:
    """Return the state at the beginning of a game."""
    state = State()
    for predicate, *arguments in problem.facts:
        if predicate == "atlocation":
            state.location = arguments[1]
        elif predicate == "holds":
            state.held = arguments[1]
        elif predicate == "opened":
            state.opened.add(arguments[0])
        elif predicate == "inreceptacle":
            state.place[arguments[0]] = arguments[1]
        elif predicate == "objectatlocation":
            state.object_location[arguments[0]] = arguments[1]
        elif predicate in _QUALITY_FACTS:
            state.are[_QUALITY_FACTS[predicate]].add(arguments[0])
    return state


def can_reach_into(house: House, state: State, receptacle: str) -> bool:
    """Return whether a receptacle is open or has no door."""
    return receptacle not in house.openable or receptacle in state.opened


def contents(house: House, state: State, receptacle: str) -> list[str]:
    """Return the objects in a receptacle, in the order in which they are listed."""
    found = [name for name, place in state.place.items() if place == receptacle]
    return sorted(found, key=house.objects.__getitem__)


def counts_for_goal(house: House, state: State, name: str) -> bool:
    """Return whether an object is of the goal's kind and quality, wherever it lies."""
    goal = house.goal
    if house.kind[name] != goal.object:
        return False
    return not goal.quality or (name in state.are[goal.quality] and name in house.able[goal.quality])


def placed_for_goal(house: House, state: State) -> Counter[str]:
    """Return how many objects that count lie in each receptacle of the goal's kind."""
    return Counter(
        place
        for name, place in state.place.items()
        if house.kind[place] == house.goal.receptacle and counts_for_goal(house, state, name)
    )


def lamps_here(house: House, state: State) -> list[str]:
    """Return the goal's lamps that lie in a receptacle at the agent's location."""
    here = house.at.get(state.location, ())
    return [name for name, place in state.place.items() if place in here and house.kind[name] == house.goal.lamp]


def is_won(house: House, state: State) -> bool:
    """Return whether the goal holds."""
    if house.goal.lamp:
        holds = state.held is not None and house.kind[state.held] == house.goal.object
        return holds and any(name in state.are["toggled"] for name in lamps_here(house, state))
    return max(placed_for_goal(house, state).values(), default=0) >= house.goal.count
