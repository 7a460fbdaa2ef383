"""The tags in which a policy writes its answer or action, and the messages experts write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def tagged(text: str, tag: str) -> str | None:
    """Return the stripped content of the last innermost `<tag>...</tag>` in `text`, or None."""
    found = re.findall(rf"<{tag}>((?:(?!</?{tag}>).)*)</{tag}>", text, flags=re.DOTALL)
    return found[-1].strip() if found else None


def tool_call_message(thought: str, name: str, arguments: Mapping[str, Any]) -> str:
    """Return a message that calls tool `name`, in the Hermes format."""
    call = json.dumps({"name": name, "arguments": dict(arguments)})
    return f"<think>{thought}</think><tool_call>{call}</tool_call>"


def tagged_message(thought: str, tag: str, content: str) -> str:
    """Return a message that ends with `<tag>content</tag>`."""
    return f"<think>{thought}</think><{tag}>{content}</{tag}>"
