"""The task set "shopping": a generated shop, or WebShop's own data where the user has it."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import Field, model_validator

from spear_fast.config.schema import NonNegative, Positive
from spear_fast.envs.game import GameParams, GameTasks
from spear_fast.envs.pools import Pools
from spear_fast.envs.splits import Split, split_of
from spear_fast.seeds import derive_seed

from .catalogue import ATTRIBUTES_OF_A_PRODUCT, generate_products, largest_catalogue
from .game import Shopping, expert_wins
from .goals import GeneratedGoals, GoalSource, RequestedGoals
from .product import Goal, Product
from .shop import Shop
from .webshop_files import read_products, read_requests

SYSTEM_PROMPT = "Buy what is asked. Act with <action>search[words]</action> or <action>click[button]</action>."


class ShoppingParams(GameParams):
    """The shop, what is asked for, and WebShop's files if there are any."""

    num_products: Annotated[int, Field(ge=12)] = 1000
    """Products of the shop; with products_file, the first so many of it. More are harder to search."""
    catalogue_seed: NonNegative = 0
    """Decides the generated products. The run's seed does not: the shop is the same whoever learns in it."""
    num_attributes: Annotated[int, Field(ge=1, le=ATTRIBUTES_OF_A_PRODUCT)] = 2
    """Attributes that a generated goal asks for; more are harder to read, and leave fewer products that fit."""
    num_options: Annotated[int, Field(ge=0, le=2)] = 2
    """Options that a generated goal asks for; each takes a click."""
    price_limit: bool = True
    """Ask for a price below a limit."""
    title_attributes: Annotated[int, Field(ge=0, le=ATTRIBUTES_OF_A_PRODUCT)] = 2
    """Attributes of a generated product that its title names. The others have to be looked up on its pages."""
    results_per_page: Positive = 10
    """Products on a page of results."""
    id_chars: Annotated[int, Field(ge=3, le=10)] = 10
    """Length of generated product ids; short ones are easier to copy."""
    show_attributes: bool = False
    """Give products a page with their attributes."""
    repeat_instruction: bool = True
    """Show the instruction on every page, as WebShop does, or on the first only."""
    products_file: str | None = None
    """WebShop's products (items_shuffle*.json) instead of generated ones."""
    instructions_file: str | None = None
    """WebShop's instructions for them: items_ins*.json (made by a template) or items_human_ins.json."""
    attributes_file: str | None = None
    """WebShop's attributes of products (items_ins*.json); by default those in instructions_file."""
    max_steps: Positive = 15
    """Messages after which a visit without a purchase is truncated. Goals that need more are not used."""
    system_prompt: str = SYSTEM_PROMPT
    """System message; empty for none."""

    @model_validator(mode="after")
    def _fit_together(self) -> ShoppingParams:
        if (self.products_file is None) != (self.instructions_file is None):
            raise ValueError("set task.params.products_file and task.params.instructions_file together, or neither")
        if self.attributes_file is not None and self.products_file is None:
            raise ValueError("task.params.attributes_file is used with task.params.products_file only; remove it")
        if self.products_file is None and self.num_products > largest_catalogue(self.id_chars):
            raise ValueError(
                f"task.params.num_products={self.num_products} is above {largest_catalogue(self.id_chars)}, the most "
                f"for id_chars={self.id_chars}; raise id_chars"
            )
        return self


class ShoppingTasks(GameTasks):
    """Visits to one shop in three splits without a common target product: train, eval and demo."""

    Params = ShoppingParams
    params: ShoppingParams

    def __init__(self, params: ShoppingParams, seed: int) -> None:
        """`seed` decides which goals are drawn, `params` alone the shop.

        Raises ConfigError if there are too few goals, TaskError if a file cannot be used, MissingDependencyError
        without the library of the index.
        """
        super().__init__("shopping", params)
        self._seed = seed
        products, self._goals = _source(params)
        self.shop = Shop(products, params.results_per_page, params.show_attributes)
        sizes = {"train": params.num_train, "eval": params.num_eval, "demo": params.num_demo}
        self._pools = Pools(self.name, sizes, self._generate, key=_target, identity=lambda goal: goal.identity)

    def size(self, split: str) -> int:
        """Return the number of goals in `split`. Raises TaskError for an unknown split."""
        return self._pools.size(split)

    def start(self, split: Split, index: int) -> Shopping:
        """Return a visit at its beginning. Raises TaskError if there is none."""
        return Shopping(self.shop, self.goal(split, index), self.params.repeat_instruction)

    def goal(self, split: Split, index: int) -> Goal:
        """Return a goal, the same for the same (params, seed, split, index). Raises TaskError if there is none."""
        return self._pools.get(split, index)

    def _generate(self, split: Split, draw: int) -> Goal | None:
        goal = self._goals.draw(Random(derive_seed(self._seed, self.name, split, draw)))
        # The split first: whether the expert succeeds takes searches.
        if split_of(_target(goal)) != split or not expert_wins(self.shop, goal, self.params.max_steps):
            return None
        return goal


def _target(goal: Goal) -> str:
    return goal.target.asin


def _source(params: ShoppingParams) -> tuple[list[Product], GoalSource]:
    """The products and the goals that ask for them."""
    if params.products_file is None or params.instructions_file is None:
        products = generate_products(
            params.catalogue_seed, params.num_products, params.title_attributes, params.id_chars
        )
        goals = GeneratedGoals(products, params.num_attributes, params.num_options, params.price_limit)
        return products, goals
    instructions = Path(params.instructions_file)
    attributes = instructions if params.attributes_file is None else Path(params.attributes_file)
    products = read_products(Path(params.products_file), attributes, params.num_products)
    return products, RequestedGoals(read_requests(instructions, products), params.price_limit)
