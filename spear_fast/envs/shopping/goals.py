"""What shall be bought: goals drawn from a catalogue, in the words of WebShop's instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from .product import Goal, Product

PRICE_STEP = 10
"""Price limits are multiples of this many dollars."""
PRICE_CHOICES = 4
"""A limit is the larger of two that are drawn from this many multiples above the price."""
PRICE_CAP = 1000
"""Products from this price on get no limit, as in WebShop."""


class GoalSource(Protocol):
    """Where goals come from."""

    def draw(self, random: Random) -> Goal:
        """Return a goal that follows from the state of `random`."""
        ...


@dataclass(frozen=True)
class GeneratedGoals:
    """Goals for any product of a generated catalogue."""

    products: Sequence[Product]
    num_attributes: int
    num_options: int
    with_price_limit: bool

    def draw(self, random: Random) -> Goal:
        """Return a goal for a random product."""
        target = random.choice(self.products)
        attributes = tuple(random.sample(target.attributes, self.num_attributes))
        names = sorted(random.sample(sorted(target.options), self.num_options))
        options = {name: random.choice(target.options[name]) for name in names}
        request = f"Find me {', '.join(attributes)} {target.kind}"
        limit = draw_price_limit(random, target.price) if self.with_price_limit else None
        return make_goal(target, request, attributes, options, limit)


@dataclass(frozen=True)
class Request:
    """An instruction from a file. Without `options` a value is drawn of every option that the product offers."""

    target: Product
    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...] | None


@dataclass(frozen=True)
class RequestedGoals:
    """Goals from the instructions of a file."""

    requests: Sequence[Request]
    with_price_limit: bool

    def draw(self, random: Random) -> Goal:
        """Return the goal of a random request."""
        request = random.choice(self.requests)
        limit = draw_price_limit(random, request.target.price) if self.with_price_limit else None
        if request.options is not None:
            return Goal(request.target, request.text + _price_text(limit), request.attributes, request.options, limit)
        offered = request.target.options
        options = {name: random.choice(offered[name]) for name in sorted(offered) if offered[name]}
        return make_goal(request.target, request.text, request.attributes, options, limit)


def make_goal(
    target: Product, request: str, attributes: tuple[str, ...], options: Mapping[str, str], limit: float | None
) -> Goal:
    """Return the goal whose instruction is `request` with the options (name to value) and the price limit added."""
    listed = ", and ".join(f"{name}: {value}" for name, value in options.items())
    text = f"{request} with {listed}" if listed else request
    return Goal(target, text + _price_text(limit), attributes, tuple(options.values()), limit)


def draw_price_limit(random: Random, price: float) -> float | None:
    """Return a multiple of `PRICE_STEP` above `price`, in dollars; None from `PRICE_CAP` on."""
    first = int(price // PRICE_STEP) + 1
    choices = [PRICE_STEP * (first + each) for each in range(PRICE_CHOICES)]
    choices = [each for each in choices if each < PRICE_CAP]
    return float(max(random.sample(choices, 2))) if len(choices) >= 2 else None


def _price_text(limit: float | None) -> str:
    return "" if limit is None else f", and price lower than {limit:.2f} dollars"
