"""The final answer of a message: what its last \\boxed{} holds."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t\n]*(?P<brace>\{)?|\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"(?:[^\s${}]|\{[^{}]*\})+")
_ENDS_SENTENCE = ".,;:!?"


def boxed_answer(text: str) -> str | None:
    r"""Return the stripped content of the last complete `\boxed{...}` or `\fbox{...}`, or None where there is none.

    Only what follows the last `</think>` counts, the whole text where there is none: a value that the policy tries out
    while it thinks is no answer. (The authors look at the last 100 characters of the response, whatever they are.)
    Braces may be nested, `\{` and `\}` are no braces, of nested boxes the inner one counts, and `\boxed 42` without
    braces takes the next word. An empty box is no answer. Takes linear time.
    """
    text = text.rpartition("</think>")[2]
    openings: list[int | None] = []
    start, found = -1, None
    for token in _TOKEN.finditer(text):
        if token["brace"] or token[0] == "{":
            openings.append(token.end() if token["brace"] else None)
        elif token[0] == "}":
            opening = openings.pop() if openings else None
            if opening is not None and opening > start:
                start, found = opening, text[opening : token.start()]
        elif token[0].startswith(("\\boxed", "\\fbox")) and (bare := _BARE.match(text, token.end())):
            start, found = token.end(), bare[0].rstrip(_ENDS_SENTENCE)
    found = (found or "").strip()
    return found or None
