"""The generated shop: pages as WebShop's, a reward that is 1 only for what was asked, an expert who always gets it."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from random import Random
from typing import Any

import pytest

from spear_fast.envs.registry import make_task_set
from spear_fast.envs.shopping import ShoppingTasks
from spear_fast.envs.shopping.game import SEARCH_SHOWN, Shopping
from spear_fast.envs.shopping.product import Goal, Product
from spear_fast.envs.shopping.reward import ALIKE, has_attribute, score, similarity, type_score
from spear_fast.envs.shopping.search_index import SearchIndex
from spear_fast.envs.shopping.vocabulary import KINDS
from spear_fast.envs.splits import SHARES
from spear_fast.errors import ConfigError, MissingDependencyError


def make(seed: int = 0, **params: Any) -> ShoppingTasks:
    small = {"num_products": 240, "results_per_page": 5, "num_train": 200, "num_eval": 20, "num_demo": 50}
    tasks = make_task_set("shopping", small | params, seed)
    assert isinstance(tasks, ShoppingTasks)
    return tasks


@pytest.fixture(scope="module")
def tasks() -> ShoppingTasks:
    return make()


def product(**changed: Any) -> Product:
    fields: dict[str, Any] = {
        "asin": "B01", "title": "Fellbound Wide Fit Running Shoes", "kind": "running shoes",
        "category": ("clothing", "footwear"), "price": 40.0, "attributes": ("wide fit", "rubber sole"),
        "options": {"color": ("black", "navy"), "size": ("large", "x-large")}, "features": (), "description": "",
    }  # fmt: skip
    return Product(**fields | changed)


GOAL = Goal(product(), "", ("wide fit", "rubber sole"), ("black", "large"), 50.0)
ALL_CHOSEN = {"color": "black", "size": "large"}


@pytest.mark.parametrize(
    ("bought", "chosen", "expected"),
    [
        (product(), ALL_CHOSEN, 1.0),
        (product(), {}, 3 / 5),
        (product(), {"color": "navy", "size": "large"}, 4 / 5),
        (product(), {"color": "black", "size": "x-large"}, 4 / 5),
        (product(price=50.0), ALL_CHOSEN, 1.0),
        (product(price=50.01), ALL_CHOSEN, 4 / 5),
        (product(attributes=("wide fit", "arch support")), ALL_CHOSEN, 4 / 5),
        (product(attributes=("rubber soles",)), ALL_CHOSEN, 1.0),  # the other one stands in the title
        (product(attributes=(), description="With a Rubber Sole."), ALL_CHOSEN, 1.0),
        (product(title="Nestlery Throw Pillow", kind="throw pillow", category=("home", "decor")), ALL_CHOSEN, 0.0),
    ],
)
def test_reward_is_the_share_of_the_goal_that_is_met(bought: Product, chosen: dict[str, str], expected: float) -> None:
    assert score(GOAL, bought, chosen) == pytest.approx(expected, abs=0)


def test_an_option_is_met_once_and_the_reward_never_exceeds_one() -> None:
    goal = Goal(product(), "", ("wide fit",), ("black",), None)
    assert score(goal, product(), {"color": "black", "trim": "black", "size": "large"}) == 1.0


@pytest.mark.parametrize(
    ("title", "kind", "expected"),
    [
        ("Other Running Shoes", "running shoes", 1.0),
        ("Other Running Sandals", "sandals", 1.0),
        ("Shoes Alpha Beta", "lamp", 0.5),
        ("Rug", "running shoes", 0.0),
    ],
)
def test_type_score_falls_with_the_words_that_titles_share(title: str, kind: str, expected: float) -> None:
    target = product(title="One Two Three Shoes Four" if kind == "lamp" else "Fellbound Running Shoes")
    assert type_score(target, product(title=title, kind=kind, category=("x",))) == expected


def test_type_score_ignores_attributes_and_options_in_titles() -> None:
    lamp = product(title="Wide Fit Black Lamp", kind="lamp", category=("x",))
    assert type_score(product(title="Wide Fit Black Shoes"), lamp) == 0.0


def test_similarity_is_that_of_word_sets() -> None:
    assert similarity("tea tree", "tree tea oil") == 1.0
    assert similarity("essential oil", "essential oils") > ALIKE
    assert similarity("water resistant", "water proof") < ALIKE
    assert similarity("large", "x-large") < 1.0


def test_words_of_a_kind_are_never_taken_for_each_other() -> None:
    for kind in KINDS:
        for first, second in combinations(kind.attributes, 2):
            assert similarity(first, second) <= ALIKE, (first, second)
        values = [(name, value) for name, values in kind.options for value in values]
        for (name, first), (other, second) in combinations(values, 2):
            assert first != second
            if (name, other) != ("size", "size"):
                assert similarity(first, second) <= ALIKE, (first, second)
    words = Counter(word for kind in KINDS for word in {*kind.name.replace("-", " ").split(), *kind.brands})
    assert max(words.values()) == 1
    assert len({kind.category for kind in KINDS}) == len(KINDS)


def test_a_product_mentions_its_own_attributes_only(tasks: ShoppingTasks) -> None:
    for kind in KINDS:
        for each in (each for each in tasks.shop.products if each.kind == kind.name):
            assert {attribute for attribute in kind.attributes if has_attribute(each, attribute)} == {*each.attributes}


def test_search_ranks_by_words_and_is_the_same_for_the_same_products(tasks: ShoppingTasks) -> None:
    products = tasks.shop.products
    index, again = SearchIndex(products), SearchIndex(products)
    for query in ("machine washable curtains", "backpacks", "color black size", products[7].title):
        assert index.search(query) == again.search(query)
    assert products[index.search("backpacks")[0]].kind == "backpack"  # stemmed
    assert products[7].title == products[index.search(products[7].title)[0]].title
    twins = [product(asin=f"B{number:02}") for number in range(30)]
    assert SearchIndex(twins).search("shoes") == list(range(30))


@pytest.mark.parametrize(
    "query", ['"', "title:*", "((", "AND OR NOT", "+ - ! ^2 ~", "a AND", "shoes\\", "x" * 9000, "-", "a " * 999]
)
def test_a_query_has_no_syntax(tasks: ShoppingTasks, query: str) -> None:
    game = tasks.start("train", 0)
    outcome = game.act(f"search[{query}]")
    assert outcome is not None and "Total results" in outcome.text
    assert game.place.kind == "results"


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"num_attributes": 5, "num_options": 0, "title_attributes": 0},
        {"num_attributes": 1, "price_limit": False, "show_attributes": True, "repeat_instruction": False},
        {"num_products": 1000, "id_chars": 4, "results_per_page": 3, "max_steps": 6},
    ],
)
def test_expert_meets_every_goal(params: dict[str, Any], play: Callable[..., Any]) -> None:
    tasks = make(**params)
    for split in SHARES:
        for index in range(20):
            episode = play(tasks, split, index)
            assert episode.won and episode.rewards[-1] == 1.0, episode.messages
            assert sum(episode.rewards) == 1.0
            assert all(info.get("action_valid", True) for info in episode.infos)
            assert len(episode.messages) <= tasks.params.max_steps


def test_expert_finds_the_way_from_wherever_random_steps_lead(tasks: ShoppingTasks) -> None:
    random = Random(0)
    for index in range(40):
        game = tasks.start("train", index)
        for _ in range(random.randrange(12)):
            action = random.choice([each for each in game.actions() if each != "click[buy now]"])
            assert game.act(random.choice(["search[black]", "search[zzz]"]) if action == SEARCH_SHOWN else action)
        outcome = None
        for _ in range(25):
            outcome = game.act(game.expert()[1])
            assert outcome is not None
            if outcome.over:
                break
        assert outcome is not None and outcome.won


def test_reward_of_one_means_that_everything_is_met(tasks: ShoppingTasks) -> None:
    random, rewards = Random(0), []
    for index in range(150):
        game = tasks.start("train", index)
        goal, outcome = game.goal, None
        while outcome is None or not outcome.over:
            action = game.expert()[1] if random.random() < 0.5 else random.choice(game.actions())
            outcome = game.act(action.replace("<your query>", goal.instruction))
            assert outcome is not None
        bought, chosen = tasks.shop.product(game.place.asin), dict(game.place.chosen)
        is_met = (
            bought.kind == goal.target.kind
            and {*goal.attributes} <= {*bought.attributes}
            and {*goal.options} <= {*chosen.values()}
            and (goal.price_limit is None or bought.price <= goal.price_limit)
        )
        assert is_met == outcome.won == (outcome.reward == 1.0)
        assert 0.0 <= outcome.reward <= 1.0
        rewards.append(outcome.reward)
    assert 10 < rewards.count(1.0) < 140 and len(set(rewards)) > 3


def test_goals_are_what_the_instruction_says(tasks: ShoppingTasks) -> None:
    for index in range(30):
        goal = tasks.goal("train", index)
        target = goal.target
        limit = f"{goal.price_limit:.2f}"
        assert goal.instruction.startswith(f"Find me {', '.join(goal.attributes)} {target.kind} with ")
        assert goal.instruction.endswith(f", and price lower than {limit} dollars")
        assert all(value in goal.instruction for value in goal.options)
        assert set(goal.attributes) <= set(target.attributes) and len(goal.attributes) == len(goal.options) == 2
        assert goal.price_limit is not None and goal.price_limit > target.price


def test_there_are_near_misses(tasks: ShoppingTasks) -> None:
    """Most goals have a product of the same kind that lacks one attribute only."""
    count = 0
    for index in range(30):
        goal = tasks.goal("train", index)
        shared = [
            len({*goal.attributes} & {*each.attributes})
            for each in tasks.shop.products
            if each.kind == goal.target.kind
        ]
        count += shared.count(len(goal.attributes) - 1) > 1
    assert count > 20


def visit(tasks: ShoppingTasks) -> Shopping:
    """A visit that stands on the page of the first result."""
    game = tasks.start("train", 0)
    assert game.act("search[black size 10 running shoes]")
    assert game.act(next(action for action in game.actions() if action.startswith("click[b") and "back" not in action))
    return game


def test_pages_offer_what_webshop_offers(tasks: ShoppingTasks) -> None:
    game = tasks.start("train", 0)
    assert game.actions() == [SEARCH_SHOWN]
    assert game.opening() == f"Instruction: {game.goal.instruction}\nSearch"
    assert game.act("search[running shoes]")
    assert game.actions()[:2] == ["click[back to search]", "click[next >]"] and len(game.actions()) == 2 + 5
    assert game.act("click[next >]")
    assert game.actions()[:3] == ["click[back to search]", "click[< prev]", "click[next >]"]
    assert game.act("search[again]") is None
    game = visit(tasks)
    shown = tasks.shop.product(game.place.asin)
    values = [f"click[{value}]" for values in shown.options.values() for value in values]
    pages = ["click[description]", "click[features]", "click[reviews]"]
    assert game.actions() == ["click[back to search]", "click[< prev]", *values, *pages, "click[buy now]"]
    for action, text in zip(pages, (shown.description, shown.features[-1], shown.reviews[0]), strict=True):
        outcome = game.act(action)
        assert outcome is not None and text in outcome.text
        assert game.actions() == ["click[back to search]", "click[< prev]"]
        assert game.act("click[< prev]") and game.place.kind == "item"
    assert game.act("click[attributes]") is None
    assert game.act("click[< prev]") and game.place.kind == "results"
    assert game.act("click[back to search]") and game.place.kind == "search"


def test_pages_of_results_show_all_of_them_once(tasks: ShoppingTasks) -> None:
    game = tasks.start("train", 0)
    assert game.act("search[black]")
    seen = []
    while True:
        seen += [each.asin for each in tasks.shop.on_page(game.place)]
        if "click[next >]" not in game.actions():
            break
        assert game.act("click[next >]")
    assert seen == [each.asin for each in tasks.shop.results("black")]
    assert len(seen) == len(set(seen)) == 50


def test_choosing_again_replaces_the_option(tasks: ShoppingTasks) -> None:
    game = visit(tasks)
    name, values = next(iter(tasks.shop.product(game.place.asin).options.items()))
    for value in (values[0], values[1]):
        outcome = game.act(f"click[{value}]")
        assert outcome is not None and f"{value} (chosen)" in outcome.text and outcome.text.count("(chosen)") == 1
    assert game.place.chosen == ((name, values[1]),)
    assert game.act("click[< prev]") and game.place.chosen == ()


@pytest.mark.parametrize(
    "action", ["", "search[]", "search[ ]", "click[]", "buy now", "click[buy now]", "click[zzz]", "search x"]
)
def test_commands_that_the_page_lacks_change_nothing(tasks: ShoppingTasks, action: str) -> None:
    game = tasks.start("train", 0)
    before = game.anchor()
    assert game.act(action) is None
    assert game.anchor() == before


def test_commands_may_be_written_loosely(tasks: ShoppingTasks) -> None:
    async def walk() -> Any:
        env = tasks.make()
        await env.reset(seed=0, options={"split": "train", "index": 0})
        await env.step("<action>Search[Running  Shoes]</action>")
        return await env.step("<action> CLICK[Next >]\n</action>")

    observation, reward, terminated, _, info = asyncio.run(walk())
    assert info["action_valid"] and "Page 2" in observation and (reward, terminated) == (0.0, False)


def test_equal_anchors_are_equal_states(tasks: ShoppingTasks) -> None:
    random, anchors = Random(0), {}
    for index in range(20):
        game = tasks.start("train", 0)
        for _ in range(25):
            action = random.choice([each for each in game.actions() if each != "click[buy now]"])
            game.act(f"search[{random.choice(['backpack', 'black backpack'])}]" if action == SEARCH_SHOWN else action)
            state = (game.place.kind, game.place.asin, game.place.chosen, tuple(game.actions()))
            assert anchors.setdefault(game.anchor(), state) == state, index
    assert len(set(anchors.values())) == len(anchors)


def test_chosen_options_tell_anchors_of_sub_pages_apart(tasks: ShoppingTasks) -> None:
    chosen, plain = visit(tasks), visit(tasks)
    assert chosen.act(next(iter(chosen.actions()[2:3])))
    assert chosen.act("click[features]") and plain.act("click[features]")
    assert chosen.anchor() != plain.anchor()


def test_splits_share_no_target_and_eval_is_distinct() -> None:
    tasks = make(num_eval=60, num_train=60, num_demo=60)
    targets = {split: {tasks.goal(split, index).target.asin for index in range(60)} for split in SHARES}
    assert not targets["train"] & targets["eval"]
    assert not targets["train"] & targets["demo"]
    assert not targets["eval"] & targets["demo"]
    assert len({tasks.goal("eval", index).identity for index in range(60)}) == 60


def test_goals_depend_on_seed_and_index_only_and_the_shop_on_its_own_seed(tasks: ShoppingTasks) -> None:
    again, other, other_shop = make(num_train=5), make(seed=1), make(catalogue_seed=1)
    assert [tasks.goal("train", index) for index in (4, 2)] == [again.goal("train", index) for index in (4, 2)]
    assert tasks.goal("eval", 3) == again.goal("eval", 3)
    assert tasks.goal("train", 0) != other.goal("train", 0)
    assert tasks.shop.products == other.shop.products
    assert tasks.shop.products != other_shop.shop.products


def test_task_type_is_the_kind_of_product(tasks: ShoppingTasks) -> None:
    assert {tasks.start("train", index).task_type for index in range(60)} <= {kind.name for kind in KINDS}
    assert len({tasks.start("train", index).task_type for index in range(60)}) > 5


def test_visit_without_a_purchase_is_truncated(tasks: ShoppingTasks, play: Callable[..., Any]) -> None:
    episode = play(tasks, "train", 0, lambda *_: "<action>wait</action>")
    assert (len(episode.messages), episode.truncated, episode.won) == (15, True, False)
    assert episode.rewards == [-0.1] * 15


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_steps": 3}, r"num_eval=20: only 0 different"),
        ({"id_chars": 3, "num_products": 700}, r"num_products=700 is above 648, the most for id_chars=3"),
        ({"products_file": "a.json"}, "instructions_file together"),
        ({"attributes_file": "a.json"}, "with task.params.products_file only"),
    ],
)
def test_params_that_do_not_fit_are_errors(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**params)


def test_missing_tantivy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tantivy", None)
    with pytest.raises(MissingDependencyError, match=r"spear-fast\[shopping\]"):
        make()
