"""The commands and texts of a game, from ALFWorld's grammar file.

The file is a small context-sensitive grammar. A rule's condition names predicates that must hold of the things in its
text; its text has places for names `{o.name}`, lists `[...| query]` and other rules `#rule#`. Whoever asks for a text
says which predicates hold, what the names are, and what each rule's list holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache

from spear_fast.errors import TaskError

_PART = re.compile(r"#([\w.-]+)#|\[(.*?\|.*?)\]|\{(\w+)(?:\.name)?\}")
_ACTION = re.compile(r"^action (\w+) \{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
_TEMPLATE = re.compile(r'template :: "(.*?)";')
_FEEDBACK = re.compile(r'feedback :: "#(.*?)#";')
_RULES = re.compile(r'grammar :: """(.*?)"""', re.DOTALL)
_PREDICATE = re.compile(r"(\w+)\(")


@dataclass(frozen=True)
class _Part:
    """A piece of a text: exactly one of the fields is set."""

    text: str = ""
    rule: str = ""
    name: str = ""
    list_of: str = ""


_Text = tuple[_Part, ...]


@dataclass
class Words:
    """What fills the places of a text."""

    names: Mapping[str, str] = field(default_factory=dict)
    """By the variable of the grammar: "o", "r", "co", "ko"."""
    holds: Set[str] = frozenset()
    """Predicates that hold."""
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names in the list of each rule."""


class Wording:
    """A parsed grammar."""

    def __init__(self, grammar: str) -> None:
        """Raises TaskError if `grammar` cannot be read."""
        self._commands: dict[str, _Text] = {}
        self._answers: dict[str, str] = {}
        self._rules: dict[str, list[tuple[frozenset[str], _Text]]] = {}
        for action, body in _ACTION.findall(grammar):
            template, feedback = _TEMPLATE.search(body), _FEEDBACK.search(body)
            if not (template and feedback):
                raise TaskError(
                    f"the game's grammar has no template or feedback for action {action}; is the file whole?"
                )
            self._commands[action.lower()] = _parts(template[1])
            self._answers[action.lower()] = feedback[1]
        for block in _RULES.findall(grammar):
            try:
                rules = json.loads(block)
            except json.JSONDecodeError as error:
                raise TaskError(
                    f"the game's grammar holds a block that is not JSON ({error}); is the file whole?"
                ) from error
            for rule, choices in rules.items():
                self._rules[rule] = [
                    # The real engine's parser skips white space at the beginning.
                    (frozenset(_PREDICATE.findall(choice.get("condition", ""))), _parts(choice["rhs"].lstrip()))
                    for choice in choices
                ]

    def command(self, action: str, names: Mapping[str, str]) -> str:
        """Return the command of an action ("pickupobject") with these names in it."""
        try:
            parts = self._commands[action]
        except KeyError:
            raise _unknown(action) from None
        return "".join([part.text or names["r" if part.list_of else part.name] for part in parts])

    def answer(self, action: str, words: Words) -> str:
        """Return what the game says after an action."""
        return self.say(self._answers[action], words)

    def say(self, rule: str, words: Words) -> str:
        """Return the text of the first variant of `rule` whose condition holds. Raises TaskError if there is none."""
        holds = words.holds
        for condition, text in self._rules.get(rule, ()):
            if condition <= holds:
                return "".join([part.text or self._fill(rule, part, words) for part in text])
        raise _unknown(rule)

    def _fill(self, rule: str, part: _Part, words: Words) -> str:
        if part.name:
            return words.names[part.name]
        if part.rule:
            return self.say(part.rule, words)
        article = "a " if "indefinite" in part.list_of or "#overview" in part.list_of else ""
        return self._listed([article + name for name in words.lists[rule]])

    def _listed(self, names: Sequence[str]) -> str:
        nothing = Words()
        if not names:
            return self.say("list_empty", nothing)
        if len(names) == 1:
            return names[0]
        separator, last = self.say("list_separator", nothing), self.say("list_last_separator", nothing)
        return f"{separator.join(names[:-1])}{last}{names[-1]}"


@lru_cache(maxsize=8)
def wording(grammar: str) -> Wording:
    """Return `grammar` parsed; the last few are kept."""
    return Wording(grammar)


def _parts(text: str) -> _Text:
    parts, end = [], 0
    for found in _PART.finditer(text):
        if found.start() > end:
            parts.append(_Part(text=text[end : found.start()]))
        parts.append(_Part(rule=found[1] or "", list_of=found[2] or "", name=found[3] or ""))
        end = found.end()
    if end < len(text):
        parts.append(_Part(text=text[end:]))
    return tuple(parts)


def _unknown(name: str) -> TaskError:
    return TaskError(f"the game's grammar has nothing to say for {name!r}; play the game with engine: textworld")
