"""The package's scenes: which receptacles stand where, and which classes of objects occur."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from .installed import Installed, installed

View = tuple[float, float, float, float]
"""Where the agent stands before a receptacle: x and y in metres, rotation and horizon in degrees."""


@dataclass(frozen=True)
class Receptacle:
    """A receptacle of a scene."""

    id: str
    kind: str
    """Class, as "CounterTop"."""
    location: str
    """The place from which it is used; no two receptacles of a scene share one."""


@dataclass(frozen=True)
class Scene:
    """One of the package's rooms."""

    number: int
    room: str
    receptacles: tuple[Receptacle, ...]
    """Sorted by id."""
    kinds: tuple[str, ...]
    """Classes of the objects that occur, sorted."""


@cache
def scene(number: int) -> Scene:
    """Return scene `number` of the installed package."""
    data = installed()
    views = json.loads((data.layouts / f"FloorPlan{number}-openable.json").read_text())
    classes = json.loads((data.layouts / f"FloorPlan{number}-objects.json").read_text())
    room = data.rooms[number]
    kinds = {kind for kind in classes if kind in data.objects}
    if room == "LivingRoom" and not kinds & data.can_be["Toggleable"]:
        kinds.add("FloorLamp")
    return Scene(number, room, tuple(_receptacles(data, views, classes)), tuple(sorted(kinds)))


def _receptacles(data: Installed, views: dict[str, View], classes: list[str]) -> list[Receptacle]:
    known = {name: (_kind(name), view) for name, view in views.items() if _kind(name) in data.receptacles}
    listed = {kind for kind, _ in known.values()}
    # The layouts name these classes but give no view of them; each gets one away from the others.
    for place, kind in enumerate(sorted(set(classes) & data.receptacles - listed)):
        known[f"{kind}|+{place:02d}.00|+00.90|-{place:02d}.50"] = kind, (20 + place, -20, 0, 30)
    taken: set[str] = set()
    found = []
    for name, (kind, view) in sorted(known.items()):
        location = _location(view)
        turn = 0
        while location in taken:
            turn += 1
            location = _location((view[0], view[1], view[2], view[3] + turn))
        taken.add(location)
        found.append(Receptacle(name, kind, location))
    return found


def _kind(name: str) -> str:
    """Class of a receptacle: "Sink|+00.98|+00.77|+00.12|SinkBasin" is a SinkBasin."""
    first = name.split("|")[0]
    return f"{first}Basin" if "Basin" in name and not first.endswith("Basin") else first


def _location(view: View) -> str:
    x, y, rotation, horizon = view
    return f"loc|{round(x * 4)}|{round(y * 4)}|{round(rotation / 90)}|{round(horizon)}"
