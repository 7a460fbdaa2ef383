"""The reward of a purchase: how much of the goal the product and the chosen options meet (arXiv 2207.01206, section 3).

    r = r_type * (attributes met + options met + [price within the limit]) / (attributes + options + 1)

WebShop finds the nouns of titles by a tagger, maps colours to basic ones, and counts chosen options that the product's
text mentions. Here the words of a title are compared that belong to no attribute, option or list of common words; an
option is met only by a chosen value, and once, so that the reward never exceeds 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from functools import lru_cache

from .product import Goal, Product

ALIKE = 0.85
"""Similarity above which two phrases count as the same."""
EXACT_OPTIONS = ("size",)
"""Options whose values must be equal: "large" is not "x-large"."""
COMMON_WORDS = frozenset(
    ["a", "an", "and", "by", "for", "from", "in", "of", "on", "or", "pack", "set", "the", "to", "with"]
)
FEW_WORDS_SHARED = 0.2
HARDLY_ANY_SHARED = 0.1


def score(goal: Goal, product: Product, chosen: Mapping[str, str]) -> float:
    """Return the reward in [0, 1] of buying `product` with the `chosen` options (name to value); 1 if all is met."""
    met = sum(has_attribute(product, each) for each in goal.attributes)
    met += sum(any(is_value(name, value, each) for name, value in chosen.items()) for each in goal.options)
    met += price_fits(goal, product)
    return type_score(goal.target, product) * met / (len(goal.attributes) + len(goal.options) + 1)


def price_fits(goal: Goal, product: Product) -> bool:
    """Return whether the price is within the limit of the goal."""
    return goal.price_limit is None or product.price <= goal.price_limit


def has_attribute(product: Product, attribute: str) -> bool:
    """Return whether the product has an attribute like this one, or its text mentions it."""
    return any(similarity(each, attribute) > ALIKE for each in product.attributes) or attribute in product.text


def is_value(name: str, value: str, asked: str) -> bool:
    """Return whether `value` of option `name` is what was asked for."""
    return value == asked or (name not in EXACT_OPTIONS and similarity(value, asked) > ALIKE)


def type_score(target: Product, product: Product) -> float:
    """Return r_type: 1 for the same sort of product, 0.5, 0.1 or 0 the less the titles have in common."""
    wanted = _title_words(target)
    shared = len(wanted & _title_words(product)) / len(wanted) if wanted else FEW_WORDS_SHARED
    if shared == 0.0:
        return 0.0
    if shared < HARDLY_ANY_SHARED:
        return 0.1
    same_department = len({*target.category} & {*product.category}) >= 2
    return 1.0 if target.kind == product.kind or same_department or shared > FEW_WORDS_SHARED else 0.5


@lru_cache(maxsize=1 << 16)
def similarity(first: str, second: str) -> float:
    """Return how alike two phrases are, in [0, 1], whatever the order of their words; 1 if one has all of the other's.

    The token set ratio: the words in common are compared with them and the rest of either phrase.
    """
    words, others = set(first.split()), set(second.split())
    common = " ".join(sorted(words & others))
    whole = [f"{common} {' '.join(sorted(rest))}".strip() for rest in (words - others, others - words)]
    pairs = [(whole[0], whole[1])]
    if common:
        pairs += [(common, each) for each in whole]
    return max(SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs)


@lru_cache(maxsize=1 << 12)
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W_]+", text.lower()))


def _title_words(product: Product) -> frozenset[str]:
    described = _all_words(product.attributes) | _all_words(
        each for values in product.options.values() for each in values
    )
    return _words(product.title) - described - COMMON_WORDS


def _all_words(texts: Iterable[str]) -> frozenset[str]:
    return frozenset().union(*(_words(each) for each in texts))
