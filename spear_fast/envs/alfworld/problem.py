"""A game's start and goal as a PDDL problem: the text that ALFWorld's game files hold, and its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spear_fast.errors import TaskError

ESCAPES = (("-", "_minus_"), ("#", "-"), ("|", "_bar_"), ("+", "_plus_"), (".", "_dot_"), (",", "_comma_"))
"""How the package writes identifiers ("Mug|+00.10|-01.20") as PDDL names, in this order."""


@dataclass(frozen=True)
class Problem:
    """Names are in lower case: PDDL does not tell cases apart, and the games show lower case."""

    name: str
    objects: Mapping[str, str]
    """Type of each thing: agent, location, object, receptacle, otype, rtype."""
    facts: tuple[tuple[str, ...], ...]
    """What holds at the start: a predicate and the names of its arguments."""
    goal: str
    """The `(:goal ...)` part, single spaces between all tokens."""

    def text(self) -> str:
        """Return it in PDDL."""
        objects = "\n  ".join(f"{name} - {kind}" for name, kind in self.objects.items())
        facts = "\n  ".join(f"({' '.join(fact)})" for fact in self.facts)
        return (
            f"(define (problem {self.name})\n(:domain alfred)\n(:objects\n  {objects}\n)\n"
            f"(:init\n  (= (total-cost) 0)\n  {facts}\n)\n{self.goal}\n)\n"
        )


def pddl_name(identifier: str) -> str:
    """Return an identifier of the package as a name in PDDL."""
    for sign, word in ESCAPES:
        identifier = identifier.replace(sign, word)
    return identifier.lower()


def parse_problem(text: str) -> Problem:
    """Return the parts of a PDDL problem. Raises TaskError if one is missing."""
    tokens = normal_pddl(text)
    name = re.search(r"\( problem (\S+) \)", tokens)
    objects = re.search(r"\( :objects (.*?) \)", tokens)
    start = re.search(r"\( :init (.*?) \) \( :goal", tokens)
    goal = re.search(r"(\( :goal .*\)) \)", tokens)
    if not (name and objects and start and goal):
        raise TaskError("the game's pddl_problem has no problem name, :objects, :init or :goal; is the file whole?")
    facts = (tuple(fact.split()) for fact in re.findall(r"\( ([^()]+) \)", start[1]))
    return Problem(
        name=name[1],
        objects=_objects(objects[1].split()),
        facts=tuple(fact for fact in facts if fact[0] not in ("total-cost", "distance")),
        goal=re.split(r" \( :metric", goal[1])[0],
    )


def normal_pddl(text: str) -> str:
    """Return PDDL in lower case without comments, one space between all tokens."""
    return " ".join(re.findall(r"[()]|[^\s()]+", re.sub(r";[^\n]*", "", text).lower()))


def _objects(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting: list[str] = []
    position = 0
    while position < len(words):
        if words[position] == "-" and position + 1 < len(words):
            found |= dict.fromkeys(waiting, words[position + 1])
            waiting = []
            position += 2
        else:
            waiting.append(words[position])
            position += 1
    return found
