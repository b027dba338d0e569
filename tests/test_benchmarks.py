"""The benchmarks measure the same model everywhere, and count right."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import re

import keras
import numpy as np
import pytest

from benchmarks import cases, comparison, linear_cost, report, training_cases
from benchmarks.cases import Case, Goal, Plan, make_prompts
from benchmarks.generate import GENERATION
from benchmarks.generation_runner import GenerationRunner
from benchmarks.keras_contestants import KerasHub, Ours, assign_weights
from benchmarks.processes import WorkerPool
from benchmarks.tokens import Tokens
from benchmarks.weights import (
    ModelShape,
    load_weights,
    random_weights,
    save_weights,
    weight_shapes,
)
from benchmarks.worker import peak_memory, reset_peak_memory, until_stop

GPT2 = ModelShape("GPT-2", "gpt2", 2, 16, 2, 2, 32, 61, positions=64)
LLAMA = ModelShape("Llama", "llama", 2, 24, 6, 2, 40, 61, positions=64)
both_shapes = pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
# It starts processes on all backends by itself.
pytestmark = pytest.mark.skipif(
    keras.config.backend() == "jax", reason="twice is enough"
)
has_transformers = importlib.util.find_spec("transformers") is not None

TIMED = Case(
    "tiny", "time", (3, 3), 9, split=True, goals=(Goal("all", 1.0, "keras_hub"),)
)


def loaded(contestant, shape):
    contestant.load(shape, random_weights(shape), "float32")
    return contestant


@both_shapes
def test_all_libraries_have_the_same_model(shape):
    row = make_prompts((7,), shape.vocabulary_size, 3)[0]
    contestants = [Ours(), KerasHub()]
    if has_transformers:
        from benchmarks.torch_contestants import Transformers

        contestants.append(Transformers())
    first, *others = (loaded(x, shape).logits(row) for x in contestants)
    assert np.abs(first).max() > 0.05
    for logits in others:
        np.testing.assert_allclose(logits, first, atol=1e-5)


@pytest.mark.skipif(not has_transformers, reason="needs transformers")
def test_ragged_rows_of_transformers_are_ours():
    from benchmarks.torch_contestants import Transformers

    tokens = []
    prompts = make_prompts((3, 3, 6), LLAMA.vocabulary_size, 3)
    for contestant in (Ours(), Transformers()):
        loaded(contestant, LLAMA)
        inputs = contestant.prepare(prompts, 12)
        for new in (None, 4):
            outputs = contestant.generate(inputs, 12, new, None)
            tokens.append(contestant.new_tokens(prompts, outputs))
    assert tokens[:2] == tokens[2:]
    assert [len(row) for row in tokens[0]] == [9, 9, 6]
    assert [len(row) for row in tokens[1]] == [4, 4, 4]


@both_shapes
def test_sizes_are_those_of_the_model(shape):
    ours = loaded(Ours(), shape)
    prompts = make_prompts((5, 5), shape.vocabulary_size, 1)
    assert ours.cache_elements(prompts, 16) == shape.cache_elements(2, 16)
    count = sum(int(np.prod(x)) for x in weight_shapes(shape).values())
    assert ours.lm.count_params() == count
    read = shape.elements_read_per_step(2, 8.0)
    positions = 64 * 16 if shape is GPT2 else 0
    assert read == count - positions + shape.cache_elements(2, 8)


def test_weights_come_back_from_a_file(tmp_path):
    weights = random_weights(GPT2)
    save_weights(tmp_path / "w.npz", weights)
    found = load_weights(tmp_path / "w.npz")
    assert set(found) == set(weights) == set(weight_shapes(GPT2))
    for name, value in random_weights(GPT2).items():
        np.testing.assert_array_equal(found[name], value)
    with pytest.raises(ValueError, match="names differ"):
        assign_weights(loaded(Ours(), GPT2).lm.backbone, random_weights(LLAMA))


# === Tokens ===


class Gap:
    """Processes that only know a gap of two logits."""

    def worker(self, name):
        return self

    def call(self, operation, **arguments):
        self.asked = (operation, arguments)
        return {"gap": 0.01}


FIRST = [[7, 8], [7, 9]]


def compare(second, case=TIMED, near_tie=0.0):
    pool = Gap()
    tokens = Tokens(pool, case, [[1, 2, 3], [4, 5, 6]], near_tie)
    tokens.compare("all", "a", {"tokens": FIRST})
    tokens.compare("all", "b", {"tokens": second})
    return tokens, pool


def test_other_tokens_void_the_row_unless_nearly_tied_or_limited():
    tokens, pool = compare([[7, 8], [7, 5]])
    assert tokens.void.startswith("void: tokens differ at row 1, new token 2: b, a")
    assert "0.01 apart" in tokens.void
    assert pool.asked == ("gap", {"row": [4, 5, 6, 7], "first": 9, "second": 5})
    tokens, _ = compare([[7, 8], [7, 5]], near_tie=0.02)
    assert tokens.void is None
    assert tokens.notes[0].startswith("near tie: tokens differ at row 1")
    tokens, _ = compare([[7, 8], [7]])
    assert tokens.void == "void: b gave 1 new tokens in row 1, a 2"
    limited = dataclasses.replace(TIMED, max_new_tokens=2)
    tokens, _ = compare([[7, 8, 3], [7, 9, 5]], limited)
    assert tokens.void is None
    assert until_stop([4, 5, 6, 0, 0], [5, 6]) == [4, 5]
    assert until_stop([4, 5], None) == [4, 5]


def test_a_later_run_replaces_its_own_cases():
    def a_run(*rows, dtype="float32"):
        settings = {"quick": True, "device": "cpu", "dtype": dtype, "rounds": 2}
        return {
            "settings": {**settings, "contestants": ["ours/jax"]},
            "machine": {"processor": "p", "cores": 2, "gpu": "", "versions": {}},
            "rows": list(rows),
            "minutes": 2.0,
            "finished": True,
        }

    first = a_run(row(case="a", metric="old"), row(case="b"))
    merged = comparison.merge(first, a_run(row(case="a", metric="new")))
    found = [(x["case"], x["metric"]) for x in merged["rows"]]
    assert found == [("b", "all"), ("a", "new")]
    assert merged["minutes"] == 4.0
    with pytest.raises(ValueError, match="`dtype` was float32 and is bfloat16"):
        comparison.merge(first, a_run(dtype="bfloat16"))
    # KerasHub does not run twice what it can not limit.
    same = functools.partial(GenerationRunner.is_same_call, None)
    assert same("few", "keras_hub/jax")
    assert not same("all", "keras_hub/jax")
    assert not same("few", "ours/jax")


# === Ratios and tables ===


def test_ratio_is_the_median_of_pairs():
    # The ratio of the medians would be 4 / 2.
    assert report.paired_ratio([1.0, 2.0, 4.0], [3.0, 4.0, 20.0]) == 3.0
    assert report.paired_ratio([6.0, 8.0], [3.0, 2.0], more_is_better=True) == 3.0
    assert report.paired_ratio([None, 2.0], [3.0, 5.0]) == 2.5
    assert report.paired_ratio([None, 2.0], [3.0, None]) is None


def row(**fields):
    return {
        "model": "m",
        "case": "c",
        "metric": "all",
        "unit": "s",
        "more_is_better": False,
        "values": {
            "ours/tensorflow": [1.0, 1.0],
            "keras_hub/tensorflow": [6.0, 6.0],
            "keras_hub/tensorflow-xla": [3.0, 3.0],
        },
        "errors": {},
        "void": None,
        "notes": [],
        "goals": [dataclasses.asdict(Goal("all", 4.0, "keras_hub"))],
        **fields,
    }


def test_keras_hubs_faster_setting_counts():
    found = report.ratios(row())
    expected = {"keras_hub": ("keras_hub/tensorflow-xla", 3.0)}
    assert found == {"ours/tensorflow": expected}
    assert report.goal_text(row()) == "4x keras_hub: tensorflow MISSED"
    faster = {**row()["values"], "ours/tensorflow": [0.5, 0.75]}
    assert report.goal_text(row(values=faster)) == "4x keras_hub: tensorflow met"
    disturbed = row(notes=["BUSY MACHINE: cores in use by others: ..."])
    assert report.goal_text(disturbed).endswith("not reliable: BUSY MACHINE")
    assert report.ratios(row(void="void: x")) == {}
    assert "not measured" in report.goal_text(row(void="void: x"))


def test_goals_without_an_opponent():
    share = [dataclasses.asdict(Goal("share of bandwidth", 0.7))]
    values = {"ours/jax": [0.69, 0.75]}
    percent = row(unit="%", more_is_better=True, values=values, goals=share)
    assert report.goal_text(percent) == ">= 70%: jax met"
    most = [dataclasses.asdict(Goal("compiled steps", at_most=8.0))]
    steps = row(values={"ours/jax": [9], "keras_hub/jax": [5]}, goals=most)
    assert report.goal_text({**steps, "comparable": False}) == "<= 8: jax MISSED"


def test_goals_of_some_backends_and_for_a_part_of_the_other():
    goals = [Goal("all", 2.0, "keras_hub", backends=("jax",))]
    goals.append(Goal("all", at_most=0.6, against="keras_hub"))
    values = {"ours/jax": [1.0], "keras_hub/jax": [1.5]}
    values |= {"ours/torch": [1.0], "keras_hub/torch": [2.0]}
    found = row(values=values, goals=[dataclasses.asdict(goal) for goal in goals])
    assert report.goal_text(found) == (
        "2x keras_hub: jax MISSED; <= 0.6x keras_hub: jax MISSED, torch met"
    )


# === The whole ===


def tiny_plan(*cases):
    return Plan((GPT2,), {GPT2.name: cases}, "float32", together=1)


@pytest.mark.slow
def test_a_run_has_all_rows_and_a_table(tmp_path, capsys):
    cases = (
        TIMED,
        Case("tiny ragged", "time", (2, 3), 9, few=2),
        Case("tiny stop", "stop", (3,), 40),
        Case("tiny lengths", "compilations", (1, 3), 6, max_new_tokens=3),
        Case("tiny cache", "cache", (3,), 16),
        Case("elsewhere", "time", (3,), 9),
    )
    names = ["ours/tensorflow", "keras_hub/tensorflow"]
    plan = tiny_plan(*cases)
    tiny_report = GENERATION.run(plan, names, rounds=2, quick=True, only=["tiny"])
    path = tmp_path / "report.json"
    path.write_text(json.dumps(tiny_report), encoding="utf-8")
    GENERATION.main(["--table", str(path)])
    text = capsys.readouterr().out
    assert text.rstrip("\n") == GENERATION.table(tiny_report).rstrip("\n")
    heads = [line for line in text.splitlines() if line.startswith("| case |")]
    assert len(heads) == 1
    assert "ours/tensorflow | keras_hub/tensorflow | tensorflow: vs" in heads[0]
    bars = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(bars) == 1
    rows = {(row["case"], row["metric"]): row for row in tiny_report["rows"]}
    assert {metric for case, metric in rows if case == "tiny"} >= {"prefill", "all"}
    for found in rows.values():
        assert found["void"] is None
        assert found["errors"] == {}
    for metric in ("prefill", "all"):
        for values in rows["tiny", metric]["values"].values():
            assert len(values) == 2
    filled = rows["tiny ragged", "all"]["values"]
    few = rows["tiny ragged", "only 2 new each"]["values"]
    assert few["keras_hub/tensorflow"] == filled["keras_hub/tensorflow"]
    assert few["ours/tensorflow"] != filled["ours/tensorflow"]
    assert ("elsewhere", "all") not in rows
    assert "stops at new token" in rows["tiny stop", "all"]["notes"][0]
    cache = rows["tiny cache", "numbers in the cache"]["values"]["ours/tensorflow"]
    assert cache == [GPT2.cache_elements(1, 16)]
    steps = rows["tiny lengths", "compiled steps"]["values"]
    # KerasHub compiles for each length.
    assert steps["keras_hub/tensorflow"] == [2]
    assert 0 < steps["ours/tensorflow"][0] <= 3


@pytest.mark.slow
def test_what_fails_and_what_differs_is_told(monkeypatch, tmp_path):
    load = WorkerPool.load

    def load_others(pool, worker):
        if worker.contestant == "keras_hub/tensorflow":
            pool.weights = tmp_path / "others.npz"
            save_weights(pool.weights, random_weights(GPT2, seed=1))
        load(pool, worker)

    monkeypatch.setattr(WorkerPool, "load", load_others)
    names = ["ours/tensorflow", "keras_hub/tensorflow", "keras_hub/nothing"]
    case = dataclasses.replace(TIMED, split=False)
    found = GENERATION.run(tiny_plan(case), names, rounds=1)
    assert len(found["rows"]) == 1
    row = found["rows"][0]
    assert list(row["values"]) == names[:2]
    assert row["void"].startswith("void: tokens differ at row 0, new token 1")
    assert "apart" in row["void"]
    assert list(row["errors"]) == names[2:]
    text = GENERATION.table(found)
    assert "| void |" in text
    assert row["void"] in text
    assert f"{names[2]}: {row['errors'][names[2]]}" in text


def test_peak_memory_is_that_of_now():
    reset_peak_memory()
    before = peak_memory()["bytes"]
    array = np.ones((64, 2**20), "uint8")
    assert peak_memory()["bytes"] >= before + 0.9 * array.nbytes


def test_plans_fit_their_models():
    for quick, device in itertools.product((False, True), ("cpu", "gpu")):
        plan = training_cases.make_plan(quick, device)
        for shape in plan.models:
            names = [case.name for case in plan.cases[shape.name]]
            assert len(names) == len(set(names))
            for case in plan.cases[shape.name]:
                assert case.length <= shape.positions
        plan = cases.make_plan(quick, device)
        for shape in plan.models:
            names = [case.name for case in plan.cases[shape.name]]
            assert len(names) == len(set(names))
            for case in plan.cases[shape.name]:
                assert max(case.lengths) < case.max_length <= shape.positions


def test_linear_cost_is_printed(monkeypatch, capsys):
    command = ["linear_cost", "--lengths", "40", "80", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--layers", "retention", "--whole"])
    linear_cost.main()
    printed = capsys.readouterr().out
    assert re.search(r"retention: 40: [\d.]+ s, 80: [\d.]+ s; times [\d.]+", printed)
