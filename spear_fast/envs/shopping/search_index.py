"""Full-text search over products: BM25 by tantivy, in memory, with the same ranking for the same products."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from spear_fast.errors import MissingDependencyError

from .product import Product

MOST_RESULTS = 50
"""Products that a search finds at most, as in WebShop."""
MOST_WORDS = 64
"""Words of a query that count. A policy may write any length, and each further word costs time."""
HEAP_BYTES = 256 << 20
"""Memory of the index writer before it writes out a segment."""
FIELDS = ["title", "text"]


class SearchIndex:
    """Title, description, features and options of products, stemmed as English."""

    def __init__(self, products: Sequence[Product]) -> None:
        """Raises MissingDependencyError without tantivy."""
        tantivy = _import_tantivy()
        builder = tantivy.SchemaBuilder()
        for name in FIELDS:
            builder.add_text_field(name, tokenizer_name="en_stem", index_option="freq")
        builder.add_integer_field("number", fast=True)
        self._index = tantivy.Index(builder.build())
        # One thread, so that the order of documents, which decides between equal scores, is that of the products.
        writer = self._index.writer(heap_size=HEAP_BYTES, num_threads=1)
        for number, product in enumerate(products):
            writer.add_document(tantivy.Document(title=product.title, text=_text(product), number=number))
        writer.commit()
        writer.wait_merging_threads()
        self._index.reload()
        self._searcher = self._index.searcher()

    def search(self, query: str) -> list[int]:
        """Return the numbers of up to `MOST_RESULTS` products that have a word of `query`, best first.

        Punctuation separates words and has no other meaning.
        """
        words = re.findall(r"[^\W_]+", query.lower())[:MOST_WORDS]
        if not words:
            return []
        parsed = self._index.parse_query(" ".join(words), FIELDS)
        hits = self._searcher.search(parsed, limit=MOST_RESULTS, count=False).hits
        numbers = self._searcher.fast_field_values("number", [address for _, address in hits])
        ranked = sorted(zip(hits, numbers, strict=True), key=lambda found: (-found[0][0], found[1]))
        return [int(number) for _, number in ranked]


def _text(product: Product) -> str:
    options = [f"{name}: {', '.join(values)}" for name, values in product.options.items()]
    return " ".join((product.description, *product.features, *product.attributes, *options))


def _import_tantivy() -> Any:
    try:
        import tantivy
    except ImportError as error:
        raise MissingDependencyError("tantivy", "shopping", "task.name=shopping") from error
    return tantivy
