"""The fast ALFWorld engine shows what the real one showed, and refuses what it cannot play."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from spear_fast.envs.alfworld.engine import NOTHING, Engine, check_domain
from spear_fast.envs.alfworld.expert import advise
from spear_fast.envs.alfworld.game_files import GameText
from spear_fast.envs.alfworld.generator import Sizes
from spear_fast.envs.alfworld.goals import goal_text, parse_goal
from spear_fast.envs.alfworld.house import shown_names
from spear_fast.envs.alfworld.installed import TASK_TYPES, installed
from spear_fast.envs.alfworld.problem import parse_problem, pddl_name
from spear_fast.envs.alfworld.wording import Words, wording
from spear_fast.errors import TaskError
from tests.envs.alfworld_replay import Seen, digest, fast_seen
from tests.envs.alfworld_variants import command, game, is_bent

TRACES = json.loads((Path(__file__).parent / "alfworld_traces.json").read_text())
SMALL = Sizes((3, 8), 7)


def traced(number: int) -> tuple[GameText, Engine]:
    trace = TRACES[number]
    text = GameText(parse_problem(trace["problem"]), installed().domain, installed().grammar, trace["sentence"])
    return text, Engine(text.problem, wording(text.grammar))


@pytest.mark.parametrize("number", range(len(TRACES)))
def test_real_engine_is_reproduced(number: int) -> None:
    """The traces were recorded by alfworld_oracle.py with textworld's own environment."""
    text, engine = traced(number)
    shown = [fast_seen(text, engine)]
    steps = TRACES[number]["steps"]
    for step in steps[1:]:
        reply = engine.step(step[0])
        shown.append(Seen(reply.text, reply.reward, reply.done, engine.actions()))
    assert [[*seen[:3], digest(seen.actions)] for seen in shown] == [step[1:] for step in steps]


def test_traces_cover_types_commands_and_endings() -> None:
    types = {parse_goal(parse_problem(trace["problem"]).goal).task_type for trace in TRACES}
    assert types == set(TASK_TYPES)
    steps = [step for trace in TRACES for step in trace["steps"][1:]]
    said = {step[0].split()[0] for step in steps if step[1] != NOTHING}
    some = {"go", "open", "close", "take", "move", "examine", "use", "heat", "clean", "cool", "look", "inventory"}
    assert said >= some
    assert any(step[1] == NOTHING for step in steps)
    assert sum(step[3] for step in steps) >= 6
    assert any("Next to it, you see a" in step[1] for step in steps), "the game of `beside` is missing"


def test_rest_of_the_commands() -> None:
    """What a short random game hardly reaches: slicing, help, and how treated objects look."""
    problem = game(2, SMALL).problem
    facts = [fact for fact in problem.facts if fact[0] not in ("inreceptacle", "objectatlocation")]
    place, location = next(fact[1:] for fact in facts if fact[0] == "receptacleatlocation" and "countertop" in fact[1])
    for name, kind in (("knife_bar_1", "knifetype"), ("apple_bar_1", "appletype")):
        facts += [("objecttype", name, kind), ("inreceptacle", name, place), ("objectatlocation", name, location)]
        facts += [("pickupable", name), ("cancontain", "countertoptype", kind)]
    facts += [("sliceable", "apple_bar_1")]
    objects = {**problem.objects, "knife_bar_1": "object", "apple_bar_1": "object"}
    engine = Engine(type(problem)("p", objects, tuple(facts), problem.goal), wording(installed().grammar))
    assert engine.step("help").text.startswith("Available commands:\n  look:")
    engine.step(f"go to {engine.house.names[place]}")
    names = engine.house.names
    engine.step(f"take {names['knife_bar_1']} from {names[place]}")
    apple, knife = names["apple_bar_1"], names["knife_bar_1"]
    assert engine.step(f"slice {apple} with {knife}").text == f"You sliced the {apple} with the {knife}."
    engine.step(f"move {knife} to {names[place]}")
    engine.step(f"take {apple} from {names[place]}")
    assert engine.step(f"examine {apple}").text == f"This is a sliced {apple}."
    engine.state.are["clean"].add("apple_bar_1")
    engine.state.are["hot"].add("apple_bar_1")
    assert engine.step(f"examine {apple}").text == f"This is a hot and clean sliced {apple}."


def test_heated_things_are_no_longer_cool_and_cooled_ones_no_longer_hot() -> None:
    for seed, before, after in ((3, "cool", "hot"), (4, "hot", "cool")):
        text = game(seed, SMALL)
        engine, words = Engine(text.problem, wording(text.grammar)), wording(text.grammar)
        for name in engine.house.able[after]:
            engine.state.are[before].add(name)
        while not engine.won:
            _, action, names = advise(engine.house, engine.state)
            engine.step(words.command(action, names))
        assert engine.state.are[after] and not engine.state.are[after] & engine.state.are[before]


def test_command_that_is_not_admissible_changes_nothing() -> None:
    _, engine = traced(0)
    before = engine.actions()
    reply = engine.step("take the moon")
    assert (reply.text, reply.reward, reply.done) == (NOTHING, 0, False)
    assert engine.actions() == before


def test_expert_wins_from_wherever_a_policy_got_to() -> None:
    wins = 0
    for seed in range(60):
        if is_bent(seed):  # It may have no solution.
            continue
        text, random = game(seed, SMALL), Random(seed)
        engine, words = Engine(text.problem, wording(text.grammar)), wording(text.grammar)
        for _ in range(25):
            if not engine.won:
                engine.step(command(random, engine, None))
        steps = 0
        while not engine.won and steps < 20:
            _, action, names = advise(engine.house, engine.state)
            said = words.command(action, names)
            assert said in engine.actions(), said
            engine.step(said)
            steps += 1
        wins += engine.won
        assert engine.won, (seed, text.problem.goal)
    assert wins == 30


def test_problem_survives_being_written() -> None:
    problem = game(1).problem
    assert parse_problem(problem.text()) == problem


def test_problem_is_read_as_official_files_write_it() -> None:
    problem = parse_problem(
        """(define (problem plan_trial) ; a comment (with parentheses)
        (:domain alfred)
        (:objects agent1 - agent
            Mug_bar_1 Mug_bar_2 - object
            loc_bar_1 - location)
        (:init (= (total-cost) 0) (= (distance loc_bar_1 loc_bar_1) 3)
            (atLocation agent1 loc_bar_1) (objectType Mug_bar_1 MugType))
        (:goal (and (exists (?r - receptacle) (inReceptacle Mug_bar_1 ?r))))
        (:metric minimize (total-cost)))"""
    )
    assert problem.name == "plan_trial"
    assert problem.objects == {"agent1": "agent", "mug_bar_1": "object", "mug_bar_2": "object", "loc_bar_1": "location"}
    assert problem.facts == (("atlocation", "agent1", "loc_bar_1"), ("objecttype", "mug_bar_1", "mugtype"))
    assert problem.goal == "( :goal ( and ( exists ( ?r - receptacle ) ( inreceptacle mug_bar_1 ?r ) ) ) )"


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_goal_is_recognised(task_type: str) -> None:
    text = goal_text(task_type, obj="SoapBar", receptacle="Cabinet", lamp="DeskLamp")
    assert text.count("(") == text.count(")")
    goal = parse_goal(text)
    lamp = task_type == "look_at_obj_in_light"
    quality = {"pick_clean": "clean", "pick_heat_": "hot", "pick_cool_": "cool"}.get(task_type[:10], "")
    assert (goal.task_type, goal.object, goal.quality) == (task_type, "soapbar", quality)
    assert (goal.receptacle, goal.lamp) == (("", "desklamp") if lamp else ("cabinet", ""))
    assert goal.count == (2 if task_type == "pick_two_obj_and_place" else 1)


def test_goal_with_two_receptacles_is_refused() -> None:
    text = goal_text("pick_two_obj_and_place", obj="Mug", receptacle="Cabinet", lamp="")
    with pytest.raises(TaskError, match="none of the six task types"):
        parse_goal(text.replace("cabinettype", "desktype", 1))


def test_numbers_of_names_fall_in_the_order_of_identifiers() -> None:
    identifiers = [pddl_name(text) for text in ("Mug|+00.10", "Mug|-00.10", "Sink|-01|SinkBasin", "Cup|1,5")]
    assert identifiers[0] == "mug_bar__plus_00_dot_10"
    assert shown_names(identifiers) == {
        "mug_bar__minus_00_dot_10": "mug 2",
        "mug_bar__plus_00_dot_10": "mug 1",
        "sink_bar__minus_01_bar_sinkbasin": "sinkbasin 1",
        "cup_bar_1_comma_5": "cup 1",
    }


def test_other_rules_are_refused() -> None:
    domain = installed().domain
    check_domain(domain + "\n; a comment")
    with pytest.raises(TaskError, match="engine=textworld"):
        check_domain(domain.replace("(isClean ?o)", "(isHot ?o)"))


def test_wording_comes_from_the_grammar() -> None:
    """A file of another version of the package says "put" where the installed one says "move"."""
    other = wording(installed().grammar.replace('"move {o} to {r}"', '"put {o} in/on {r}"'))
    assert other.command("putobject", {"o": "mug 1", "r": "desk 2"}) == "put mug 1 in/on desk 2"
    with pytest.raises(TaskError, match="nothing to say for 'dance'"):
        other.say("dance", Words())
    with pytest.raises(TaskError, match="not JSON"):
        wording(installed().grammar.replace('"intro": [', '"intro": ', 1))
