"""The fast engine: plays a game's PDDL problem as ALFWorld's own text engine does, from its text to its commands.

Only the domain of the installed package is played, and only goals of the six task types. The oracle test compares
texts, rewards and commands with the real engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from spear_fast.errors import TaskError

from .house import KNIVES, STATIONS, House, house_of
from .installed import installed
from .problem import Problem, normal_pddl
from .state import State, can_reach_into, contents, is_won, start_of
from .wording import Wording, Words

NOTHING = "Nothing happens."
"""The engine's answer to a command that is not admissible; it is not in the grammar."""
_STATION_ACTIONS = {"clean": "cleanobject", "hot": "heatobject", "cool": "coolobject"}
_OPPOSITE = {"hot": "cool", "cool": "hot"}


@dataclass(frozen=True)
class Reply:
    """What the engine says to a command."""

    text: str
    reward: int
    """1 if the goal holds after the command, else 0."""
    done: bool


@dataclass(frozen=True)
class _Command:
    action: str
    """The action's name in the domain, in lower case."""
    objects: tuple[str, ...] = ()
    receptacle: str = ""


class Engine:
    """One running game."""

    def __init__(self, problem: Problem, wording: Wording) -> None:
        """Raises TaskError if the problem's goal is of no known task type."""
        self.house: House = house_of(problem)
        self.state: State = start_of(problem)
        self._wording = wording
        self._commands: dict[str, _Command] | None = None
        self._go = {self._say_command(command): command for command in map(_go_to, self.house.receptacles)}
        self._anywhere = {
            self._wording.command(action, {}): _Command(action) for action in ("look", "inventory", "help")
        }

    @property
    def won(self) -> bool:
        """Whether the goal holds."""
        return is_won(self.house, self.state)

    def opening(self) -> str:
        """Return the first observation, with the goal in it."""
        words = self._look_words()
        if not self._here():
            # The first look asks for receptacles at any location, a later one for those at the agent's.
            words = Words(
                holds={"receptacleatlocation"}, lists={"list_appliances": self._names(self.house.receptacles)}
            )
        return self._wording.say("intro", words)

    def actions(self) -> list[str]:
        """Return the admissible commands, sorted."""
        return sorted(self._admissible())

    def is_admissible(self, command: str) -> bool:
        """Return whether the engine would carry out a command."""
        return command in self._admissible()

    def step(self, command: str) -> Reply:
        """Carry out a command; one that is not admissible changes nothing."""
        found = self._admissible().get(command.strip())
        text = NOTHING
        if found is not None:
            self._commands = None
            words = _EFFECTS[found.action](self, found)
            text = self._wording.answer(found.action, words)
        won = self.won
        return Reply(text, int(won), won)

    def _here(self) -> Sequence[str]:
        return self.house.at.get(self.state.location, ())

    def _names(self, things: Sequence[str]) -> list[str]:
        return [self.house.names[thing] for thing in things]

    def _admissible(self) -> dict[str, _Command]:
        if self._commands is None:
            location, house = self.state.location, self.house
            found = self._anywhere | {
                text: command for text, command in self._go.items() if house.location[command.receptacle] != location
            }
            for command in self._commands_here():
                found[self._say_command(command)] = command
            self._commands = found
        return self._commands

    def _commands_here(self) -> list[_Command]:
        house, state = self.house, self.state
        held = state.held
        found = [] if held is None else [_Command("examineobject", (held,))]
        for receptacle in self._here():
            found.append(_Command("examinereceptacle", (), receptacle))
            if receptacle in house.openable:
                verb = "closeobject" if receptacle in state.opened else "openobject"
                found.append(_Command(verb, (), receptacle))
            lying = contents(house, state, receptacle)
            found += [_Command("toggleobject", (name,), receptacle) for name in lying if name in house.toggleable]
            if held is None and can_reach_into(house, state, receptacle):
                found += [_Command("pickupobject", (name,), receptacle) for name in lying if name in house.pickupable]
            elif held is not None:
                found += self._uses_of_held(held, receptacle)
        if held is not None and house.kind[held] in KNIVES:
            near = [name for name, place in state.object_location.items() if place == state.location]
            found += [_Command("sliceobject", (name, held)) for name in near if name in house.sliceable]
        return found

    def _uses_of_held(self, held: str, receptacle: str) -> list[_Command]:
        house, kind = self.house, self.house.kind[receptacle]
        found = []
        if can_reach_into(house, self.state, receptacle) and house.kind[held] in house.accepts.get(kind, ()):
            found.append(_Command("putobject", (held,), receptacle))
        for quality, station in STATIONS.items():
            if kind == station and held in house.able[quality]:
                found.append(_Command(_STATION_ACTIONS[quality], (held,), receptacle))
        return found

    def _say_command(self, command: _Command) -> str:
        return self._wording.command(command.action, self._slots(command))

    def _slots(self, command: _Command) -> dict[str, str]:
        names = self.house.names
        slots: dict[str, str] = dict(zip(("o", "ko"), self._names(command.objects), strict=False))
        if command.receptacle:
            slots["r"] = names[command.receptacle]
        if command.action == "sliceobject":
            slots["co"] = slots["o"]
        return slots

    def _look_words(self) -> Words:
        here = self._here()
        if not here:
            return Words(holds={"atlocation"}, lists={"list_appliances": []})
        state = self.state
        beside = sorted(
            (name, receptacle)
            for name, receptacle in state.left
            if receptacle in here and state.object_location.get(name) == state.location
        )
        holds = {"atlocation", "receptacleatlocation"}
        if beside:
            holds |= {"objectatlocation", "not_inreceptacle"}
        lists = {
            "look-variations": self._names(here),
            "list_objects_on_the_floor": [self.house.names[name] for name, _ in beside],
        }
        return Words(holds=holds, lists=lists)

    def _receptacle_words(self, command: _Command) -> Words:
        holds = set()
        if command.receptacle in self.house.openable:
            holds = {"openable", "opened"} if command.receptacle in self.state.opened else {"openable"}
        lying = self._names(contents(self.house, self.state, command.receptacle))
        return Words(self._slots(command), holds, {"examineReceptacle.feedback": lying})

    def _object_words(self, command: _Command) -> Words:
        house, (name, *_) = self.house, command.objects
        holds = {f"is{quality}" for quality, things in self.state.are.items() if name in things}
        abilities = {
            "isreceptacleobject": house.containers,
            "toggleable": house.toggleable,
            "sliceable": house.sliceable,
        }
        holds |= {predicate for predicate, things in abilities.items() if name in things}
        inside = self._names(house.inside.get(name, ()))
        return Words(self._slots(command), holds, {"examineObject.feedback": inside})

    def _look(self, command: _Command) -> Words:
        del command
        return self._look_words()

    def _inventory(self, command: _Command) -> Words:
        del command
        held = self.state.held
        if held is None:
            return Words()
        return Words(holds={"holdsany", "holds"}, lists={"inventory.feedback": self._names((held,))})

    def _help(self, command: _Command) -> Words:
        del command
        return Words()

    def _go_there(self, command: _Command) -> Words:
        self.state.location = self.house.location[command.receptacle]
        return self._receptacle_words(command)

    def _open(self, command: _Command) -> Words:
        self.state.opened.add(command.receptacle)
        return self._receptacle_words(command)

    def _close(self, command: _Command) -> Words:
        self.state.opened.remove(command.receptacle)
        return self._receptacle_words(command)

    def _take(self, command: _Command) -> Words:
        state, (name,) = self.state, command.objects
        state.held = name
        state.left.add((name, state.place.pop(name)))
        if state.object_location.get(name) == state.location:
            del state.object_location[name]
        return self._object_words(command)

    def _put(self, command: _Command) -> Words:
        state, (name,) = self.state, command.objects
        state.held = None
        state.place[name] = command.receptacle
        state.object_location[name] = state.location
        state.left.discard((name, command.receptacle))
        return self._object_words(command)

    def _toggle(self, command: _Command) -> Words:
        self.state.are["toggled"].add(command.objects[0])
        return self._object_words(command)

    def _slice(self, command: _Command) -> Words:
        self.state.are["sliced"].add(command.objects[0])
        return self._object_words(command)

    def _treat(self, command: _Command) -> Words:
        name = command.objects[0]
        quality = next(quality for quality, action in _STATION_ACTIONS.items() if action == command.action)
        self.state.are[quality].add(name)
        if quality in _OPPOSITE:
            self.state.are[_OPPOSITE[quality]].discard(name)
        return self._object_words(command)


_EFFECTS: dict[str, Callable[[Engine, _Command], Words]] = {
    "look": Engine._look,
    "inventory": Engine._inventory,
    "help": Engine._help,
    "gotolocation": Engine._go_there,
    "openobject": Engine._open,
    "closeobject": Engine._close,
    "examinereceptacle": Engine._receptacle_words,
    "examineobject": Engine._object_words,
    "pickupobject": Engine._take,
    "putobject": Engine._put,
    "toggleobject": Engine._toggle,
    "sliceobject": Engine._slice,
} | dict.fromkeys(_STATION_ACTIONS.values(), Engine._treat)
"""What each action does to the state; it returns what the answer needs."""


def check_domain(domain: str) -> None:
    """Raise TaskError unless `domain` has the rules that the engine plays, those of the installed package."""
    if normal_pddl(domain) != _played_domain():
        raise TaskError(
            "the game has other rules (pddl_domain) than the installed package alfworld, which the fast engine plays; "
            "set task.params.engine=textworld"
        )


@cache
def _played_domain() -> str:
    return normal_pddl(installed().domain)


def _go_to(receptacle: str) -> _Command:
    return _Command("gotolocation", (), receptacle)
