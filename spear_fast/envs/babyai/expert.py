"""The expert of BabyAI: minigrid's bot, made anew from the present state when a policy did something else."""

from __future__ import annotations

from typing import Any

from spear_fast.errors import TaskError

from .library import make_bot
from .view import ACTIONS, possible_actions


class Expert:
    """Suggests commands in one level, from whatever state it is in.

    The bot keeps a stack of subgoals that assumes its advice is followed. It is followed for as long as that is so;
    after any other command a new bot plans from the state at hand, without the memory of cells seen before.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self._bot: Any = None
        self._advice: str | None = None
        """The bot's command for the present state, None where it has not been asked."""

    def told(self, command: str) -> None:
        """Take note of a command just before it is carried out."""
        if command != self._advice:
            self._bot = None
        self._advice = None

    def advise(self) -> str:
        """Return a command that is possible now.

        Raises TaskError where neither the bot nor putting down what is carried leads on.
        """
        if self._advice is None:
            self._advice = self._ask() or self._ask_anew() or self._empty_hands()
        return self._advice

    def _ask_anew(self) -> str | None:
        self._bot = None
        if self._env.carrying is None or _may_carry(_unfinished(self._env.instrs), self._env.carrying):
            self._bot = _new_bot(self._env)
        return self._ask()

    def _ask(self) -> str | None:
        """The bot's command; None without a bot, or where it has lost its way."""
        if self._bot is None:
            return None
        try:
            action = self._bot.replan()
        except Exception:
            # The bot checks its own assumptions by assertions, and indexes into what may be gone.
            self._bot = None
            return None
        command = next((command for command, name in ACTIONS.items() if self._env.actions[name] == action), None)
        return command if command in possible_actions(self._env) else None

    def _empty_hands(self) -> str:
        possible = possible_actions(self._env)
        if self._env.carrying is None:
            raise TaskError(
                f"the BabyAI bot finds no way to {self._env.mission!r} from here; what it needs may be destroyed"
            )
        return "drop" if "drop" in possible else "turn left"


def _new_bot(env: Any) -> Any:
    """A bot for what is left of the instructions."""
    whole = env.instrs
    env.instrs = _unfinished(whole)
    try:
        bot = make_bot(env)
    finally:
        env.instrs = whole
    if env.carrying is not None and hasattr(env.instrs, "desc_move"):
        # What is to be moved is in hand: going there and picking it up, on top of the stack, are done.
        del bot.stack[-2:]
    return bot


def _unfinished(instruction: Any) -> Any:
    """The part of a sequence that is still to be done; the whole where both parts are."""
    first, second = getattr(instruction, "a_done", None), getattr(instruction, "b_done", None)
    if first == "success":
        return _unfinished(instruction.instr_b)
    if second == "success":
        return _unfinished(instruction.instr_a)
    return instruction


def _may_carry(instruction: Any, carried: Any) -> bool:
    """Whether the bot can begin `instruction` with `carried` in hand."""
    kind = type(instruction).__name__
    if kind == "PutNextInstr":
        return any(carried is each for each in instruction.desc_move.obj_set)
    if kind == "GoToInstr":
        return all(carried is not each for each in instruction.desc.obj_set)
    return kind == "OpenInstr"
