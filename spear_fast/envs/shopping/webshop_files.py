"""Readers of WebShop's own data: its products, and its synthetic and human instructions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spear_fast.envs.splits import unit_hash
from spear_fast.errors import TaskError

from .goals import Request
from .product import Product, plain

LONGEST_ID = 10
"""Products with longer ids are left out, as in WebShop."""
CATEGORY_SEPARATOR = "\u203a"
"""Between the parts of `product_category`."""
DEFAULT_PRICE = 100.0
"""Price in dollars of a product without one, as in WebShop."""


def read_products(products_file: Path, attributes_file: Path, limit: int) -> list[Product]:
    """Return the first `limit` products of a file such as items_shuffle_1000.json, without repeated ids.

    A row has `asin`, `name`, `query`, `product_category`, `full_description`, `small_description` (bullet points), and
    may have `pricing` and `customization_options`. Of a price range, one price is taken by a hash of the id, where
    WebShop draws it anew in each process. Raises TaskError naming file, row and field.
    """
    rows = _read(products_file)
    if not isinstance(rows, list):
        raise TaskError(f"{products_file} holds a JSON {type(rows).__name__}; it must hold a list of products")
    attributes = {asin: _attributes(place, entry) for asin, place, entry in _entries(attributes_file)}
    found: dict[str, Product] = {}
    for number, row in enumerate(rows[:limit], start=1):
        place = f"{products_file} row {number}"
        if not isinstance(row, dict):
            raise TaskError(f"{place} is a JSON {type(row).__name__}; it must be an object")
        asin = _text(place, row, "asin")
        if asin != "nan" and len(asin) <= LONGEST_ID and asin not in found:
            found[asin] = _product(place, row, asin, attributes.get(asin, ()))
    if not found:
        raise TaskError(f"{products_file} holds no products with an id of at most {LONGEST_ID} characters")
    return list(found.values())


def read_requests(instructions_file: Path, products: Sequence[Product]) -> list[Request]:
    """Return the instructions for `products` in a file such as items_ins_v2.json or items_human_ins.json.

    The file maps ids to one object with `instruction` and `instruction_attributes`, or to a list of such objects that
    also have `instruction_options`. Entries without an instruction or attributes are left out, as in WebShop. Raises
    TaskError naming file, entry and field, or if nothing is left.
    """
    known = {product.asin: product for product in products}
    found = []
    for asin, place, entry in _entries(instructions_file):
        if asin not in known:
            continue
        if isinstance(entry, list):
            numbered = [(f"{place}[{number}]", each) for number, each in enumerate(entry)]
            requests = [_request(each_place, each, known[asin], is_human=True) for each_place, each in numbered]
        else:
            requests = [_request(place, entry, known[asin], is_human=False)]
        found += [request for request in requests if request is not None]
    if not found:
        raise TaskError(
            f"{instructions_file} has no instruction with attributes for a product of task.params.products_file; "
            "check that the two files belong together, or raise task.params.num_products"
        )
    return found


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TaskError(f"{file} does not exist; check task.params") from error
    except json.JSONDecodeError as error:
        raise TaskError(f"{file}: not valid JSON ({error.msg} at line {error.lineno})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{file} cannot be read: {error}") from error


def _entries(file: Path) -> Iterator[tuple[str, str, Any]]:
    """(id, place for messages, entry) of a file that maps ids to entries."""
    entries = _read(file)
    if not isinstance(entries, dict):
        raise TaskError(f"{file} holds a JSON {type(entries).__name__}; it must map product ids to instructions")
    return ((asin, f"{file} entry {asin!r}", entry) for asin, entry in entries.items())


def _product(place: str, row: Mapping[str, Any], asin: str, attributes: tuple[str, ...]) -> Product:
    bullets = row.get("small_description") or []
    return Product(
        asin=asin,
        title=_text(place, row, "name"),
        kind=plain(_text(place, row, "query")),
        category=tuple(plain(each) for each in _text(place, row, "product_category").split(CATEGORY_SEPARATOR)),
        price=_price(place, row, asin),
        attributes=attributes,
        options=_options(place, row),
        features=tuple(_strings(place, "small_description", [bullets] if isinstance(bullets, str) else bullets)),
        description=_text(place, row, "full_description") if row.get("full_description") else "",
    )


def _price(place: str, row: Mapping[str, Any], asin: str) -> float:
    pricing = row.get("pricing")
    if not pricing:
        return DEFAULT_PRICE
    try:
        prices = [float(re.sub(r"[^\d.]", "", each)) for each in pricing.split("$")[1:3]]
    except (AttributeError, ValueError) as error:
        raise _wrong(place, "pricing", pricing, 'text such as "$9.99" or "$9.99$19.99"') from error
    if not prices:
        raise _wrong(place, "pricing", pricing, 'text such as "$9.99" or "$9.99$19.99"')
    return round(prices[0] + unit_hash(asin) * (prices[-1] - prices[0]), 2)


def _options(place: str, row: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    options = row.get("customization_options") or {}
    if not isinstance(options, dict):
        raise _wrong(place, "customization_options", options, "an object of lists")
    found = {}
    for name, contents in options.items():
        if not contents:
            continue
        try:
            values = [plain(each["value"].strip().replace("/", " | ")) for each in contents]
        except (AttributeError, KeyError, TypeError) as error:
            field = f"customization_options.{name}"
            raise _wrong(place, field, contents, 'a list of objects with a text "value"') from error
        found[plain(name)] = tuple(dict.fromkeys(value for value in values if value))
    return found


def _request(place: str, entry: Any, target: Product, is_human: bool) -> Request | None:
    if not isinstance(entry, dict):
        raise TaskError(f"{place} is a JSON {type(entry).__name__}; it must be an object")
    if not entry.get("instruction") or not entry.get("instruction_attributes"):
        return None
    text = _text(place, entry, "instruction").strip().rstrip(".")
    attributes = _phrases(place, entry, "instruction_attributes")
    options = _phrases(place, entry, "instruction_options") if is_human else None
    return Request(target, text, attributes, options)


def _attributes(place: str, entry: Any) -> tuple[str, ...]:
    """Attributes of a product: of its one entry, or of all its human instructions together."""
    entries = entry if isinstance(entry, list) else [entry]
    if not all(isinstance(each, dict) for each in entries):
        raise TaskError(f"{place} holds something other than objects; it must be one object or a list of them")
    return tuple(dict.fromkeys(phrase for each in entries for phrase in _phrases(place, each, "attributes")))


def _phrases(place: str, row: Mapping[str, Any], field: str) -> tuple[str, ...]:
    return tuple(plain(each) for each in _strings(place, field, row.get(field) or []))


def _strings(place: str, field: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _wrong(place, field, value, "a list of texts")
    return value


def _text(place: str, row: Mapping[str, Any], field: str) -> str:
    if not isinstance(row.get(field), str):
        raise _wrong(place, field, row.get(field), "a text")
    return row[field]


def _wrong(place: str, field: str, value: Any, wanted: str) -> TaskError:
    return TaskError(f"{place}: {field}={value!r:.200} is not {wanted}; correct the file")
