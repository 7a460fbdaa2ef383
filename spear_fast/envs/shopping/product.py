"""What is sold and what is asked for, whichever catalogue they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Product:
    """One article of the shop.

    Example: `Product("B0K7", "Aldermoor Water Resistant Backpack", "backpack", "Luggage > Backpacks", 39.5, ...)`.
    """

    asin: str
    """The id that is shown and clicked."""
    title: str
    kind: str
    """What it is, WebShop's `query`, e.g. "backpack"."""
    category: tuple[str, ...]
    """Path in the shop's departments, from the most general on."""
    price: float
    """In dollars."""
    attributes: tuple[str, ...]
    """Properties in lower case that a goal may ask for."""
    options: Mapping[str, tuple[str, ...]]
    """What can be chosen: name to values, in lower case with single spaces."""
    features: tuple[str, ...]
    description: str
    rating: str = "N.A."
    reviews: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All that is written about the product, in lower case."""
        return " ".join((self.title, *self.features, self.description)).lower()


@dataclass(frozen=True)
class Goal:
    """What shall be bought. `target` is one product that fits; others may fit as well."""

    target: Product = field(repr=False)
    instruction: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    """Values to choose. Their names are not part of the goal, as in WebShop."""
    price_limit: float | None
    """Highest price in dollars; None for any."""

    @property
    def identity(self) -> str:
        """A text that differs between different goals."""
        return f"{self.target.asin} {self.instruction} {self.attributes} {self.options}"


def plain(text: str) -> str:
    """Return `text` in lower case with single spaces, as commands reach a game."""
    return " ".join(text.lower().split())
