"""Calls that are repeated on torch do what the function does."""

import keras
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="torch alone repeats calls"
)


def repeated(function, variables=()):
    from blocks.generation.backends.torch_steps import RepeatedCalls

    return RepeatedCalls(function, list(variables))


def is_recorded(calls):
    return any(graph is not None for graph in calls._graphs.values())


def run_often(function, inputs, recorded, variables=()):
    """Compares each call with the function itself, on copies."""
    calls = repeated(function, variables)
    for i, given in enumerate(inputs):
        copies = [[x.clone() for x in given] for _ in range(2)]
        assert torch.equal(calls(*copies[0]), function(*copies[1]))
        # An input that is written to is the same, but in the call that is recorded.
        if i != 1 or not recorded:
            assert all(map(torch.equal, *copies))
    assert is_recorded(calls) == recorded
    return calls


def several(*shapes, count=5):
    rng = np.random.default_rng(0)
    make = lambda shape: torch.tensor(rng.normal(size=shape).astype("float32"))  # noqa: E731
    return [[make(shape) for shape in shapes] for _ in range(count)]


def through_keras(x, y):
    y = keras.ops.softmax(keras.ops.einsum("ab,cb->ac", x, y))
    best, places = torch.topk(y, 2)
    parts = keras.ops.split(best * keras.ops.cast(places, "float32"), [1], axis=-1)
    return keras.ops.concatenate(
        [2.0 ** -parts[0], np.float32(0.5) * parts[1]], axis=-1
    )


def through_a_view(x, y):
    x[:, 1:].narrow(1, 0, 2).copy_(y[:, :2])
    x += 1
    return x.T.sum(dim=0) + keras.ops.arange(3)


def by_a_value(x, y):
    return x - y if x.sum() > 0 else x * y


def by_a_number(x, y):
    return x * float(y[0, 0])


def of_another_shape(x, y):
    return x[x > 0].sum() + torch.nonzero(y).sum()


def into_a_constant(x, y):
    zeros = torch.zeros(3, 4)
    zeros[0] = x[0]
    return zeros + y


def by_slices(x, y):
    end = (x[0, 0] > 0).int() + 1
    return y[:, :end].sum()


def drawn(x, y):
    torch.manual_seed(0)
    return x + torch.randn(4)


def of_a_size(x, y):
    return y.reshape(-1)[: 0 + x.shape[0]].expand((x[0, 0] > 0).int() + 1, 3).sum()


ELSEWHERE = [torch.ones(4)]


def of_elsewhere(x, y):
    return x + ELSEWHERE[0]


@pytest.mark.parametrize("function", [through_keras, through_a_view])
def test_calls_are_repeated(function):
    run_often(function, several((3, 4), (3, 4)), recorded=True)


@pytest.mark.parametrize(
    "function",
    [
        by_a_value,
        by_a_number,
        of_another_shape,
        into_a_constant,
        by_slices,
        of_a_size,
        drawn,
        of_elsewhere,
    ],
)
def test_calls_that_can_not_be_repeated(function):
    run_often(function, several((3, 4), (3, 4)), recorded=False)


def test_a_call_that_fails_to_be_recorded_writes_once():
    def add(x, y):
        x += y
        return x if x[0, 0] > 0 else -x

    run_often(add, several((2, 2), (2, 2)), recorded=False)


def test_constants_may_be_looked_at():
    def function(x):
        count = int(keras.ops.max(keras.ops.arange(3)))
        return x * count

    run_often(function, several((2,)), recorded=True)


def test_outputs_may_be_written_to():
    def function(x):
        return x + 1, keras.ops.zeros((2,)), x * 2, x * 2

    calls = repeated(function)
    for _ in range(4):
        x = torch.ones(2)
        first, *others = calls(x)
        assert first.tolist() == [2, 2]
        zeros, *twice = others
        assert zeros.tolist() == [0, 0]
        assert [x.tolist() for x in twice] == [[2, 2]] * 2
        zeros += 5
        twice[0] += 5
        assert twice[1].tolist() == [2, 2]
    assert is_recorded(calls)


def test_new_values_of_weights_count():
    dense = keras.layers.Dense(2, bias_initializer="ones")
    dense.build((None, 4))
    calls = run_often(dense, several((3, 4)), True, dense.variables)
    dense.set_weights([x + 1 for x in dense.get_weights()])
    x = several((3, 4))[0][0]
    assert torch.equal(calls(x), dense(x))


def test_each_shape_has_its_own():
    def length(x):
        return x * x.shape[0]

    calls = run_often(length, several((2,)) + several((3,)), recorded=True)
    assert len(calls._graphs) == 2
