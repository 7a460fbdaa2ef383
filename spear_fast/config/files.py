"""Settings from a YAML file and from the files it is based on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spear_fast.errors import ConfigError

from .merge import merge
from .yaml_text import parse

BASE_KEY = "base"
"""Top-level key of a file, no option of a run: one path, or a list of them, relative to the file."""


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of a file on top of those of its bases; a later base is on top of an earlier one.

    Raises ConfigError if a file cannot be read, holds no mapping, names a base by anything but a path, or is based on
    itself.
    """
    return _read(path, ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    place = path.resolve()
    if place in above:
        chain = " -> ".join(file.name for file in (*above[above.index(place) :], place))
        raise ConfigError(f"configuration file {path} is based on itself ({chain}); remove one `{BASE_KEY}`")
    settings = _read_file(path)
    bases = settings.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise ConfigError(f"{path}: {BASE_KEY}={bases!r} must be the path of a YAML file, or a list of such paths")
    below: dict[str, Any] = {}
    for base in bases:
        try:
            below = merge(below, _read(path.parent / base, (*above, place)))
        except ConfigError as error:
            # The user named another file, so say how this one was reached.
            raise ConfigError(f"{error} (a base of {path})") from error
    return merge(below, settings)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"configuration file {path} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; name the YAML file in it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    settings: Any = parse(text, str(path))
    if settings is None:
        raise ConfigError(f"configuration file {path} is empty; it needs at least name, steps and task.name")
    if not isinstance(settings, dict):
        raise ConfigError(
            f"configuration file {path} holds a {type(settings).__name__}; it must hold `key: value` lines"
        )
    return settings
