"""How the pages of the shop read: one line for each thing shown, in the order of WebShop's text mode."""

from __future__ import annotations

from .shop import BACK_TO_SEARCH, BUY_NOW, NEXT_PAGE, PREVIOUS_PAGE, Place, Shop

BUTTONS = {BACK_TO_SEARCH: "Back to Search", NEXT_PAGE: "Next >", PREVIOUS_PAGE: "< Prev", BUY_NOW: "Buy Now"}
CHOSEN = " (chosen)"
"""Follows an option value that is chosen."""


def render(shop: Shop, place: Place) -> str:
    """Return the text of a page, without the instruction."""
    if place.kind == "search":
        return "Search"
    lines = [BUTTONS[click] for click in shop.clicks(place) if click in BUTTONS and click != BUY_NOW]
    if place.kind == "results":
        lines.insert(1, f"Page {place.page} (Total results: {len(shop.results(place.query))})")
        for product in shop.on_page(place):
            lines += [product.asin, product.title, f"${product.price:.2f}"]
    elif place.kind == "item":
        lines += _item(shop, place)
    else:
        lines += _sub_page(shop, place)
    return "\n".join(lines)


def _item(shop: Shop, place: Place) -> list[str]:
    product, chosen = shop.product(place.asin), dict(place.chosen)
    lines = []
    for name, values in product.options.items():
        shown = [value + CHOSEN if chosen.get(name) == value else value for value in values]
        lines.append(f"{name}: {', '.join(shown)}")
    lines += [product.title, f"Price: ${product.price:.2f}", f"Rating: {product.rating}"]
    return [*lines, *(each.capitalize() for each in shop.sub_pages), BUTTONS[BUY_NOW]]


def _sub_page(shop: Shop, place: Place) -> list[str]:
    product = shop.product(place.asin)
    if place.kind == "description":
        return [product.description or "No description"]
    if place.kind == "features":
        return list(product.features) or ["No features"]
    if place.kind == "attributes":
        return list(product.attributes) or ["No attributes"]
    return [f"Rating: {product.rating}", *(product.reviews or ("No reviews",))]
