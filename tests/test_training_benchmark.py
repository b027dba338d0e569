"""The benchmark of training counts right, and compares equal work."""

import keras
import numpy as np
import pytest

from benchmarks import training_cases
from benchmarks.cases import Plan, make_prompts
from benchmarks.keras_contestants import KerasHub, Ours
from benchmarks.processes import WorkerError
from benchmarks.train import TRAINING
from benchmarks.training_runner import Losses
from tests.test_benchmarks import GPT2, LLAMA, both_shapes, has_transformers, loaded

# It starts processes on all backends by itself.
pytestmark = pytest.mark.skipif(
    keras.config.backend() == "jax", reason="twice is enough"
)


def test_operations_of_products_are_counted_by_hand():
    # Each of 2 layers: queries, keys, values and outputs 16 x 16, two layers of 16 x 32,
    # and 2 x 10 x 16 for queries with keys, and for weights with values.
    layer = 4 * 16 * 16 + 2 * 16 * 32 + 2 * 10 * 16
    assert GPT2.training_operations(3, 10) == 6 * 3 * 10 * (2 * layer + 61 * 16)
    # 6 query heads of 4, 2 key/value heads, three layers of 24 x 40.
    layer = 2 * 24 * 24 + 2 * 24 * 8 + 3 * 24 * 40 + 2 * 10 * 24
    assert LLAMA.training_operations(3, 10) == 6 * 3 * 10 * (2 * layer + 61 * 24)


@pytest.mark.skipif(not has_transformers, reason="needs transformers")
@both_shapes
def test_operations_of_products_are_those_that_torch_counts(shape):
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.torch_contestants import Transformers

    contestant = loaded(Transformers(), shape)
    # The kernel for CPUs is not counted.
    contestant.model.set_attn_implementation("eager")
    tokens = np.array(make_prompts((11,) * 3, 61, 0))
    with FlopCounterMode(display=False) as counter:
        contestant.train(tokens, rows=3)
    assert counter.get_total_flops() == shape.training_operations(3, 10)
    assert 0 < contestant.products_part(tokens, rows=3) < 1


def test_other_losses_void_the_row_and_compiling_again_is_an_error():
    losses = Losses()
    for name, value in (("a", 5.0), ("b", 5.004), ("b", 4.0), ("a", 4.0)):
        losses.compare("all", name, {"loss": value, "compiled": value == 5.0})
    assert losses.void is None
    assert losses.notes[0].endswith("4.0000 last; the others differ by 8.0e-04 at most")
    with pytest.raises(WorkerError, match="call 3 of fit compiled anew"):
        losses.compare("all", "a", {"loss": 3.0, "compiled": 2})
    for value in (3.01, float("nan")):
        losses.losses["b"][2:] = [value]
        assert losses.void.startswith("void: losses differ in call 3: b ")


@both_shapes
def test_all_libraries_train_alike(shape):
    contestants = [Ours(), KerasHub()]
    if has_transformers:
        from benchmarks.torch_contestants import Transformers

        contestants.append(Transformers())
    tokens = np.array(make_prompts((9,) * 6, shape.vocabulary_size, 0))
    checks = Losses()
    for contestant in contestants:
        loaded(contestant, shape)
        name, traced = type(contestant).__name__, 0
        for _ in range(3):
            loss = contestant.train(tokens, rows=2)
            compiled = contestant.traced_steps() - traced
            traced += compiled
            checks.compare("all", name, {"loss": loss, "compiled": compiled})
        # In the first call, where steps are compiled.
        if name != "Transformers" and keras.config.backend() != "torch":
            assert traced > 0
        first, _, last = checks.losses[name]
        assert last < first - 0.001
    assert max(x for x, _ in checks.differences) < 1e-5


@pytest.mark.slow
def test_a_run_of_training_has_all_rows():
    timed = training_cases.time_case(2, 16, 2)
    memory = training_cases.memory_case(2, 16, GPT2)
    names = ["ours/tensorflow", "keras_hub/tensorflow", "keras_hub/nothing"]
    names += ["transformers/torch"] if has_transformers else []
    plan = Plan((GPT2,), {GPT2.name: (timed, memory)}, "float32", together=1)
    found = TRAINING.run(plan, names, rounds=2)
    metrics = ["training", "share of matrix limit", "peak memory"]
    assert [row["metric"] for row in found["rows"]] == metrics
    for row in found["rows"]:
        assert row["void"] is None
        assert list(row["errors"]) == ["keras_hub/nothing"]
        assert set(row["values"]) == set(names) - set(row["errors"])
    speed, share, _ = (row["values"]["ours/tensorflow"] for row in found["rows"])
    assert len(speed) == 2
    # The operations of a token, and the same limit of the machine for all.
    rates = [x / y for x, y in zip(speed, share)]
    other = [row["values"]["keras_hub/tensorflow"] for row in found["rows"][:2]]
    assert other[0][0] / other[1][0] == pytest.approx(rates[0]) == rates[1]
    assert found["rows"][1]["goals"][0]["at_least"] < (0.9 if has_transformers else 1)
    assert "# Training" in TRAINING.table(found)
