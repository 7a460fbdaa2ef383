"""ALFWorld: household text games, generated offline from what the package `alfworld` ships, or the official files.

Generated games are not the ALFWorld benchmark: they share its rules, wording, scenes and six task types, but not its
games. A result counts as the benchmark's only with `games` pointing to the official files and `engine: textworld`.

Source: Shridhar et al., "ALFWorld: Aligning Text and Embodied Environments for Interactive Learning", ICLR 2021.
"""

from .tasks import AlfworldParams, AlfworldTasks

__all__ = ["AlfworldParams", "AlfworldTasks"]
