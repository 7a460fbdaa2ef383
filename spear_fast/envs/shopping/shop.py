"""A shop: its products, their search, and how its pages follow from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from .product import Product, plain
from .search_index import SearchIndex

SEARCHES_KEPT = 4096
"""Latest queries whose results are kept: the trajectories of a group often ask the same."""

BACK_TO_SEARCH = "back to search"
NEXT_PAGE = "next >"
PREVIOUS_PAGE = "< prev"
BUY_NOW = "buy now"

SubPage = Literal["description", "features", "reviews", "attributes"]
PageKind = Literal["search", "results", "item"] | SubPage
SUB_PAGES: tuple[SubPage, ...] = ("description", "features", "reviews", "attributes")


@dataclass(frozen=True)
class Place:
    """The page that is open, e.g. `Place("item", query="backpack", asin="b0k7", chosen=(("color", "black"),))`."""

    kind: PageKind = "search"
    query: str = ""
    """What was searched for."""
    page: int = 1
    """Page of the results, from 1 on."""
    asin: str = ""
    """Id of the product that is open, in lower case; empty for none."""
    chosen: tuple[tuple[str, str], ...] = ()
    """Options chosen of it, (name, value), sorted."""


class Shop:
    """Products and their index, shared by all environments of a task set."""

    def __init__(self, products: Sequence[Product], results_per_page: int, show_attributes: bool) -> None:
        """Raises MissingDependencyError without the library of the index."""
        self.products = list(products)
        self.results_per_page = results_per_page
        self.sub_pages = [each for each in SUB_PAGES if show_attributes or each != "attributes"]
        self._by_id = {plain(product.asin): product for product in products}
        self._index = SearchIndex(products)
        self._found = lru_cache(maxsize=SEARCHES_KEPT)(self._search)

    def product(self, asin: str) -> Product:
        """Return the product with this id, in lower case."""
        return self._by_id[asin]

    def results(self, query: str) -> list[Product]:
        """Return all results of a search, best first."""
        return self._found(query)

    def on_page(self, place: Place) -> list[Product]:
        """Return the results that the results page `place` shows."""
        first = (place.page - 1) * self.results_per_page
        return self.results(place.query)[first : first + self.results_per_page]

    def clicks(self, place: Place) -> list[str]:
        """Return what can be clicked on a page, in the order in which it is shown, each once."""
        if place.kind == "search":
            return []
        found = [BACK_TO_SEARCH]
        if place.kind != "results" or place.page > 1:
            found.append(PREVIOUS_PAGE)
        if place.kind == "results":
            if place.page * self.results_per_page < len(self.results(place.query)):
                found.append(NEXT_PAGE)
            found += [plain(product.asin) for product in self.on_page(place)]
        if place.kind == "item":
            found += [value for values in self.product(place.asin).options.values() for value in values]
            found += [*self.sub_pages, BUY_NOW]
        return list(dict.fromkeys(found))

    def after_search(self, query: str) -> Place:
        """Return the first page of results."""
        return Place("results", query=query)

    def after_click(self, place: Place, click: str) -> Place:
        """Return the page after a click that `clicks` allows, other than `BUY_NOW`."""
        if click == BACK_TO_SEARCH:
            return Place()
        if place.kind == "results":
            if click in (NEXT_PAGE, PREVIOUS_PAGE):
                return replace(place, page=place.page + (1 if click == NEXT_PAGE else -1))
            return replace(place, kind="item", asin=click)
        if click == PREVIOUS_PAGE:
            return replace(place, kind="item") if place.kind != "item" else Place("results", place.query, place.page)
        for sub_page in self.sub_pages:
            if click == sub_page:
                return replace(place, kind=sub_page)
        # A value that several options offer is a value of the first of them.
        name = next(name for name, values in self.product(place.asin).options.items() if click in values)
        return replace(place, chosen=tuple(sorted({**dict(place.chosen), name: click}.items())))

    def _search(self, query: str) -> list[Product]:
        return [self.products[number] for number in self._index.search(query)]
