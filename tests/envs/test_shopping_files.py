"""WebShop's own data: files in its shapes are read, and what is wrong in them is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spear_fast.envs.registry import make_task_set
from spear_fast.envs.shopping import ShoppingTasks
from spear_fast.envs.shopping.webshop_files import read_products, read_requests
from spear_fast.errors import TaskError

SEPARATOR = " \u203a "


def row(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "asin": f"B{number:09}",
        "name": f"Marlow Canvas Tote No {number}",
        "query": "Tote Bags",
        "category": "fashion",
        "product_category": SEPARATOR.join(("Clothing", "Bags", "Totes")),
        "full_description": "A roomy tote for the market.",
        "small_description": ["Washable cotton", f"Pocket count {number}"],
        "pricing": "$1,019.50" if number == 0 else "$12.00$18.00",
        "customization_options": {
            "Color": [{"value": "Red/Blue ", "image": None}, {"value": "Green"}],
            "Size": [{"value": "Large"}, {"value": "X-Large"}],
            "Fit": None,
        },
        "images": ["unused"],
    } | changed


def synthetic(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "attributes": ["washable cotton", f"model {number}"],
        "instruction": f"Find me washable cotton tote {number}.",
        "instruction_attributes": ["washable cotton"],
    } | changed


def human(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "asin": f"B{number:09}",
        "instruction": f"i want a green tote, model {number}, that i can wash.",
        "attributes": ["washable cotton"],
        "options": ["color: green"],
        "instruction_attributes": ["washable cotton"],
        "instruction_options": ["green", "large"],
        "worker_id": "x",
    } | changed


Written = Callable[[str, Any], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(name: str, content: Any) -> Path:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path / name

    return write


def named(entries: dict[int, Any]) -> dict[str, Any]:
    return {f"B{number:09}": entry for number, entry in entries.items()}


def test_products_are_read_in_webshops_shape(written: Written) -> None:
    rows = [row(0), row(1), row(1, name="repeated"), row(2, asin="nan"), row(3, asin="B" * 11), row(4, pricing=None)]
    rows[1]["small_description"] = "One bullet"
    rows[5] |= {"customization_options": "", "full_description": None}
    products = read_products(written("p.json", rows), written("a.json", named({1: synthetic(1)})), 100)
    assert [product.asin for product in products] == ["B000000000", "B000000001", "B000000004"]
    first, second, last = products
    assert first.price == 1019.5 and first.attributes == ()
    assert first.options == {"color": ("red | blue", "green"), "size": ("large", "x-large")}
    assert first.category == ("clothing", "bags", "totes") and first.kind == "tote bags"
    assert second.title == "Marlow Canvas Tote No 1"
    assert 12.0 <= second.price <= 18.0 and second.attributes == ("washable cotton", "model 1")
    assert second.features == ("One bullet",)
    assert (last.price, last.options, last.description) == (100.0, {}, "")


def test_requests_are_read_in_both_shapes(written: Written) -> None:
    rows = written("p.json", [row(number) for number in range(4)])
    both = written(
        "i.json",
        named(
            {
                0: synthetic(0),
                1: [human(1), human(1, instruction_attributes=[])],
                2: synthetic(2, instruction=None),
                9: [human(9)],
            }
        ),
    )
    products = read_products(rows, both, 100)
    found = read_requests(both, products)
    assert [(each.target.asin[-1], each.text, each.attributes, each.options) for each in found] == [
        ("0", "Find me washable cotton tote 0", ("washable cotton",), None),
        ("1", "i want a green tote, model 1, that i can wash", ("washable cotton",), ("green", "large")),
    ]
    assert products[1].attributes == ("washable cotton",)


@pytest.mark.parametrize("entry", [synthetic, lambda number: [human(number)]], ids=["synthetic", "human"])
def test_expert_meets_every_goal_of_files(written: Written, play: Callable[..., Any], entry: Any) -> None:
    params = {
        "products_file": str(written("p.json", [row(number) for number in range(60)])),
        "instructions_file": str(written("i.json", named({number: entry(number) for number in range(60)}))),
        "attributes_file": str(written("a.json", named({number: synthetic(number) for number in range(60)}))),
        "num_train": 20,
        "num_eval": 5,
        "num_demo": 10,
    }
    tasks = make_task_set("shopping", params, 0)
    assert isinstance(tasks, ShoppingTasks)
    for split, count in (("train", 20), ("eval", 5), ("demo", 10)):
        for index in range(count):
            episode = play(tasks, split, index)
            assert episode.won, episode.messages
            goal = tasks.goal(split, index)  # type: ignore[arg-type]
            assert goal.instruction in episode.observations[0] and len(goal.options) == 2
            limit = "" if goal.price_limit is None else f", and price lower than {goal.price_limit:.2f} dollars"
            assert goal.instruction.endswith(limit)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{", "p.json: not valid JSON"),
        ({}, "p.json holds a JSON dict; it must hold a list"),
        ([1], "p.json row 1 is a JSON int"),
        ([row(0), row(1, asin=None)], "p.json row 2: asin=None is not a text"),
        ([row(0, name=3)], "row 1: name=3 is not a text"),
        ([row(0, pricing="cheap")], "row 1: pricing='cheap' is not text such as"),
        ([row(0, pricing=3)], "row 1: pricing=3 is not text such as"),
        ([row(0, customization_options={"Color": ["red"]})], r"row 1: customization_options\.Color=\['red'\] is not"),
        ([row(0, small_description=[1])], r"row 1: small_description=\[1\] is not a list of texts"),
        ([row(0, full_description=1)], "row 1: full_description=1 is not a text"),
        ([row(0, asin="nan")], "holds no products"),
    ],
)
def test_wrong_product_is_named(written: Written, rows: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        read_products(written("p.json", rows), written("a.json", {}), 10)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "i.json holds a JSON list; it must map product ids"),
        ({"B000000000": 1}, "i.json entry 'B000000000' is a JSON int"),
        ({"B000000000": [1]}, r"entry 'B000000000'\[0\] is a JSON int"),
        ({"B000000000": synthetic(0, instruction=1)}, "entry 'B000000000': instruction=1 is not a text"),
        (
            {"B000000000": [human(0, instruction_options="green")]},
            r"instruction_options='green' is not a list of texts",
        ),
        ({"B000000007": synthetic(7)}, "no instruction with attributes for a product of"),
    ],
)
def test_wrong_instruction_is_named(written: Written, entries: Any, message: str) -> None:
    products = read_products(written("p.json", [row(0)]), written("a.json", {}), 10)
    with pytest.raises(TaskError, match=message):
        read_requests(written("i.json", entries), products)


def test_missing_file_is_named(written: Written, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.json does not exist"):
        read_products(tmp_path / "none.json", written("a.json", {}), 10)
