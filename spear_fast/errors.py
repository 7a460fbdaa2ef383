"""Errors a user can act on: each names the field, the value and the remedy."""

from __future__ import annotations


class SpearError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""


class ConfigError(SpearError):
    """A configuration value is unknown, of the wrong type, or does not fit the others."""


class TaskError(SpearError):
    """A task set, environment or prompt file cannot be used."""


class EngineError(SpearError):
    """The rollout engine failed or was used wrongly."""


class LogProbGapError(SpearError):
    """The sampler and the trainer disagree on log-probabilities (stale weights look like this)."""


class CheckpointError(SpearError):
    """A checkpoint is missing, incomplete or does not belong to this configuration."""


class RankError(SpearError):
    """Another process of a job on several ranks ended or does not answer."""


class MissingDependencyError(SpearError):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'spear-fast[{extra}]'")
