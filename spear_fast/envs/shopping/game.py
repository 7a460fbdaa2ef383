"""One visit to the shop, as a text game: it ends with a purchase, whose reward tells how much of the goal is met."""

from __future__ import annotations

import re

from spear_fast.envs.game import Outcome

from .expert import Expert
from .pages import render
from .product import Goal
from .reward import score
from .shop import BUY_NOW, Place, Shop

COMMAND = re.compile(r"(search|click)\[(.+)\]", flags=re.DOTALL)
SEARCH_SHOWN = "search[<your query>]"
"""How the list of valid commands shows that a search is possible."""


class Shopping:
    """A visit, from the search page on. Reward by `reward.score` at `click[buy now]`, won if it is 1.

    Two states are equal for step-level advantages if their pages and chosen options are; the query that led to a
    product's page is not part of it, since the best way on does not depend on it.
    """

    def __init__(self, shop: Shop, goal: Goal, repeat_instruction: bool = True) -> None:
        self._shop = shop
        self._repeat_instruction = repeat_instruction
        self._expert: Expert | None = None
        self.goal = goal
        self.task_type = goal.target.kind
        self.place = Place()

    def opening(self) -> str:
        """Return the search page with the instruction."""
        return self._shown(with_instruction=True)

    def actions(self) -> list[str]:
        """Return `SEARCH_SHOWN` where there is a search box, and every click."""
        if self.place.kind == "search":
            return [SEARCH_SHOWN]
        return [f"click[{click}]" for click in self._shop.clicks(self.place)]

    def act(self, action: str) -> Outcome | None:
        """Carry out `search[words]` or `click[what]`; None if the page does not have it."""
        command = COMMAND.fullmatch(action)
        if command is None:
            return None
        verb, argument = command[1], command[2].strip()
        if verb == "search":
            if self.place.kind != "search" or not argument:
                return None
            self.place = self._shop.after_search(argument)
        elif argument not in self._shop.clicks(self.place):
            return None
        elif argument == BUY_NOW:
            return self._purchase()
        else:
            self.place = self._shop.after_click(self.place, argument)
        return Outcome(self._shown(self._repeat_instruction))

    def anchor(self) -> str:
        """Return the page, and the options chosen, which pages below that of a product do not show."""
        chosen = ", ".join(f"{name}: {value}" for name, value in self.place.chosen)
        return f"{render(self._shop, self.place)}\n{chosen}"

    def expert(self) -> tuple[str, str]:
        """Return a thought and the command of the expert."""
        if self._expert is None:
            self._expert = Expert(self._shop, self.goal)
        return self._expert.next_step(self.place)

    def _purchase(self) -> Outcome:
        product = self._shop.product(self.place.asin)
        reward = score(self.goal, product, dict(self.place.chosen))
        text = f"Thank you for shopping with us. Your score (0 to 1): {reward:.2f}"
        return Outcome(text, reward=reward, won=reward == 1.0, over=True)

    def _shown(self, with_instruction: bool) -> str:
        page = render(self._shop, self.place)
        return f"Instruction: {self.goal.instruction}\n{page}" if with_instruction else page


def expert_wins(shop: Shop, goal: Goal, max_steps: int) -> bool:
    """Return whether the expert meets the whole goal within `max_steps` commands."""
    game = Shopping(shop, goal)
    for _ in range(max_steps):
        outcome = game.act(game.expert()[1])
        if outcome is None:
            return False
        if outcome.over:
            return outcome.won
    return False
