"""The expert: the next command towards the goal from any state, with full knowledge of where things are."""

from __future__ import annotations

from spear_fast.errors import TaskError

from .house import STATIONS, House
from .state import State, can_reach_into, contents, counts_for_goal, placed_for_goal

Advice = tuple[str, str, dict[str, str]]
"""A thought, an action of the domain in lower case, and the names in its command."""
_TREATMENTS = {"clean": "cleanobject", "hot": "heatobject", "cool": "coolobject"}


def advise(house: House, state: State) -> Advice:
    """Return what to do next. Raises TaskError if the goal cannot be reached."""
    goal = house.goal
    if state.held is None or house.kind[state.held] != goal.object or not _can_serve(house, state, state.held):
        return _get_one(house, state)
    if goal.lamp:
        return _use_lamp(house, state)
    if not counts_for_goal(house, state, state.held):
        station = _nearest(
            house, state, [name for name in house.receptacles if house.kind[name] == STATIONS[goal.quality]]
        )
        thought = f"It must be {goal.quality}."
        return _go(house, state, station, thought) or _act(
            house, thought, _TREATMENTS[goal.quality], station, state.held
        )
    return _put(house, state, _target(house, state), f"It belongs in the {goal.receptacle}.")


def _get_one(house: House, state: State) -> Advice:
    """Take another object of the goal's kind, with an empty hand."""
    if state.held is not None:
        return _free_hand(house, state, state.held)
    thought = f"I need the {house.goal.object}."
    name = _wanted(house, state)
    place = state.place[name]
    return (
        _go(house, state, place, thought)
        or _open(house, state, place, thought)
        or _act(house, thought, "pickupobject", place, name)
    )


def _wanted(house: House, state: State) -> str:
    """An object to take: one that counts already if there is one, else one here."""
    done = set() if house.goal.lamp else set(_counted_in(house, state, _target(house, state)))
    fit = [
        name
        for name in house.objects
        if name in state.place
        and name in house.pickupable
        and name not in done
        and house.kind[name] == house.goal.object
        and _can_serve(house, state, name)
    ]
    if not fit:
        raise TaskError(f"the game cannot be solved: no {house.goal.object} is left to take")
    here = house.at.get(state.location, ())
    return min(fit, key=lambda name: (not counts_for_goal(house, state, name), state.place[name] not in here))


def _counted_in(house: House, state: State, receptacle: str) -> list[str]:
    return [name for name in contents(house, state, receptacle) if counts_for_goal(house, state, name)]


def _can_serve(house: House, state: State, name: str) -> bool:
    """Whether an object counts for the goal, or can be made to."""
    quality = house.goal.quality
    return not quality or name in house.able[quality] or counts_for_goal(house, state, name)


def _use_lamp(house: House, state: State) -> Advice:
    """Go to a lamp, rather one that is on, and turn it on."""
    lamps = [name for name in house.objects if house.kind[name] == house.goal.lamp and name in state.place]
    if not lamps:
        raise TaskError(f"the game cannot be solved: there is no {house.goal.lamp}")
    lamp = min(lamps, key=lambda name: name not in state.are["toggled"])
    place, thought = state.place[lamp], f"I need the {house.goal.lamp}."
    return _go(house, state, place, thought) or _act(house, thought, "toggleobject", place, lamp)


def _target(house: House, state: State) -> str:
    """The receptacle of the goal that holds the most of what it needs, rather the one here."""
    counts = placed_for_goal(house, state)
    fit = [
        name
        for name in house.receptacles
        if house.kind[name] == house.goal.receptacle and house.goal.object in house.accepts.get(house.kind[name], ())
    ]
    if not fit:
        raise TaskError(f"the game cannot be solved: no {house.goal.receptacle} takes a {house.goal.object}")
    return min(fit, key=lambda name: (-counts[name], house.location[name] != state.location))


def _free_hand(house: House, state: State, held: str) -> Advice:
    """Put down what is of no use, where that takes the fewest steps."""
    fit = [name for name in house.receptacles if house.kind[held] in house.accepts.get(house.kind[name], ())]
    if not fit:
        raise TaskError(f"the game cannot be solved: no receptacle takes the {house.names[held]}")

    def steps(name: str) -> int:
        return (house.location[name] != state.location) + (not can_reach_into(house, state, name))

    return _put(house, state, min(fit, key=steps), "My hand must be free.")


def _put(house: House, state: State, receptacle: str, thought: str) -> Advice:
    if state.held is None:
        raise TaskError("the expert has nothing to put down")
    return (
        _go(house, state, receptacle, thought)
        or _open(house, state, receptacle, thought)
        or _act(house, thought, "putobject", receptacle, state.held)
    )


def _nearest(house: House, state: State, receptacles: list[str]) -> str:
    if not receptacles:
        raise TaskError(f"the game cannot be solved: nothing makes a {house.goal.object} {house.goal.quality}")
    return min(receptacles, key=lambda name: house.location[name] != state.location)


def _go(house: House, state: State, receptacle: str, thought: str) -> Advice | None:
    if house.location[receptacle] == state.location:
        return None
    return _act(house, thought, "gotolocation", receptacle)


def _open(house: House, state: State, receptacle: str, thought: str) -> Advice | None:
    if can_reach_into(house, state, receptacle):
        return None
    return _act(house, thought, "openobject", receptacle)


def _act(house: House, thought: str, action: str, receptacle: str, name: str | None = None) -> Advice:
    names = {"r": house.names[receptacle]}
    if name is not None:
        names["o"] = house.names[name]
    return thought, action, names
