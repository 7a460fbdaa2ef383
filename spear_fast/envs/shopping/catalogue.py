"""A generated catalogue: seeded products of several kinds, many of which differ from another in one property only."""

from __future__ import annotations

from random import Random

from spear_fast.seeds import derive_seed

from .product import Product
from .vocabulary import DESCRIPTIONS, FEATURE_ENDINGS, KINDS, REVIEWS, Kind

ID_CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ATTRIBUTES_OF_A_PRODUCT = 5
VALUES_OF_AN_OPTION = (3, 4)
"""Fewest and most values that a product offers of an option."""
SIBLING_SHARE = 0.5
"""Share of products that have the attributes of an earlier one but for a single attribute, as distractors."""


def largest_catalogue(id_chars: int) -> int:
    """Return how many products ids of this length can tell apart, with half of the ids left free."""
    return len(ID_CHARACTERS) ** (id_chars - 1) // 2


def generate_products(seed: int, num_products: int, title_attributes: int, id_chars: int) -> list[Product]:
    """Return `num_products` products that follow from the arguments alone.

    Args:
        title_attributes: Attributes named in a title; the features name all of them.
        id_chars: Length of ids; `num_products` is at most `largest_catalogue(id_chars)`.
    """
    random = Random(derive_seed(seed, "catalogue", num_products, title_attributes, id_chars))
    ids: dict[str, None] = {}
    while len(ids) < num_products:
        ids["B" + "".join(random.choices(ID_CHARACTERS, k=id_chars - 1))] = None
    known: dict[str, list[tuple[str, ...]]] = {kind.name: [] for kind in KINDS}
    products = []
    for number, asin in enumerate(ids):
        kind = KINDS[number % len(KINDS)]
        attributes = _attributes(random, kind, known[kind.name])
        known[kind.name].append(attributes)
        products.append(_product(random, kind, asin, attributes, title_attributes))
    return products


def _attributes(random: Random, kind: Kind, known: list[tuple[str, ...]]) -> tuple[str, ...]:
    if known and random.random() < SIBLING_SHARE:
        kept = list(random.choice(known))
        others = [each for each in kind.attributes if each not in kept]
        kept[random.randrange(len(kept))] = random.choice(others)
        random.shuffle(kept)
        return tuple(kept)
    return tuple(random.sample(kind.attributes, ATTRIBUTES_OF_A_PRODUCT))


def _product(random: Random, kind: Kind, asin: str, attributes: tuple[str, ...], title_attributes: int) -> Product:
    brand = random.choice(kind.brands)
    options = {}
    for name, values in kind.options:
        chosen = random.sample(values, min(random.randint(*VALUES_OF_AN_OPTION), len(values)))
        options[name] = tuple(sorted(chosen, key=values.index))
    listed = ", ".join(attributes[:-1]) + f" and {attributes[-1]}"
    return Product(
        asin=asin,
        title=" ".join((brand, *(each.title() for each in attributes[:title_attributes]), kind.name.title())),
        kind=kind.name,
        category=kind.category,
        price=round(random.uniform(*kind.prices), 2),
        attributes=attributes,
        options=options,
        features=tuple(f"{each.capitalize()}: {random.choice(FEATURE_ENDINGS)}" for each in attributes),
        description=random.choice(DESCRIPTIONS).format(brand=brand, name=kind.name, use=kind.use, listed=listed),
        rating=f"{random.uniform(2.5, 5.0):.1f}",
        reviews=tuple(random.sample(REVIEWS, 2)),
    )
