"""An expert shopper: the shortest way from any page to a purchase that meets the whole goal."""

from __future__ import annotations

from .product import Goal, Product, plain
from .reward import has_attribute, is_value, price_fits, type_score
from .shop import BACK_TO_SEARCH, BUY_NOW, NEXT_PAGE, PREVIOUS_PAGE, Place, Shop


class Expert:
    """Knows which products meet one goal, also before it reads so, and the query that brings up one of them soonest."""

    def __init__(self, shop: Shop, goal: Goal) -> None:
        self._shop = shop
        self._goal = goal
        self._fits: dict[str, bool] = {}
        described = f"{' '.join(goal.attributes)} {goal.target.kind}"
        queries = [plain(described), plain(f"{described} {' '.join(goal.options)}")]
        pages = {query: self._first_page(query) for query in queries}
        found = {query: page for query, page in pages.items() if page is not None}
        self.query: str | None = min(found, key=lambda query: found[query]) if found else None
        """What to search for; None if no query made from the goal finds a product that meets it."""
        self._first = found[self.query] if self.query is not None else 0

    def next_step(self, place: Place) -> tuple[str, str]:
        """Return a thought and the command for the page that is open."""
        if place.kind == "search":
            return "I search for what is asked.", f"search[{self.query or plain(self._goal.target.kind)}]"
        if place.kind == "results":
            return self._on_results(place)
        if not self._meets(self._shop.product(place.asin)):
            return "This one does not fit.", f"click[{PREVIOUS_PAGE}]"
        if place.kind != "item":
            return "It fits, back to the product.", f"click[{PREVIOUS_PAGE}]"
        chosen = dict(place.chosen)
        for name, value in (choices(self._shop.product(place.asin), self._goal) or {}).items():
            if chosen.get(name) != value:
                return f"The {name} must be {value}.", f"click[{value}]"
        return "All is as asked.", f"click[{BUY_NOW}]"

    def _on_results(self, place: Place) -> tuple[str, str]:
        for product in self._shop.on_page(place):
            if self._meets(product):
                return f"I look at {product.asin}.", f"click[{plain(product.asin)}]"
        page = self._nearest_page(place)
        # Searching anew takes two steps, and as many as there are pages before the first product that fits.
        if page is None or (place.query != self.query and abs(page - place.page) > 1 + self._first):
            return "I try another search.", f"click[{BACK_TO_SEARCH}]"
        if page > place.page:
            return "Nothing here fits, I look further.", f"click[{NEXT_PAGE}]"
        return "I have passed one that fits.", f"click[{PREVIOUS_PAGE}]"

    def _nearest_page(self, place: Place) -> int | None:
        """The page nearest to the open one with a product that fits, among the results of its query."""
        size = self._shop.results_per_page
        results = self._shop.results(place.query)
        pages = {number // size + 1 for number, product in enumerate(results) if self._meets(product)}
        return min(pages, key=lambda page: (abs(page - place.page), page)) if pages else None

    def _first_page(self, query: str) -> int | None:
        for number, product in enumerate(self._shop.results(query)):
            if self._meets(product):
                return number // self._shop.results_per_page + 1
        return None

    def _meets(self, product: Product) -> bool:
        if product.asin not in self._fits:
            self._fits[product.asin] = _meets(product, self._goal)
        return self._fits[product.asin]


def choices(product: Product, goal: Goal) -> dict[str, str] | None:
    """Return the options (name to value) of `product` that meet those of the goal; None if it lacks one."""
    found: dict[str, str] = {}
    for asked in goal.options:
        offers = [
            (value != asked, name, value)
            for name, values in product.options.items()
            for value in values
            if name not in found and is_value(name, value, asked)
        ]
        if not offers:
            return None
        _, name, value = min(offers)
        found[name] = value
    return found


def _meets(product: Product, goal: Goal) -> bool:
    return (
        price_fits(goal, product)
        and choices(product, goal) is not None
        and all(has_attribute(product, each) for each in goal.attributes)
        and type_score(goal.target, product) == 1.0
    )
