"""Feed-forward layers, against torch's activations."""

import functools

import numpy as np
import pytest

from blocks import FeedForward, GatedFeedForward, gelu_approximate
from tests.helpers import assert_close, to_numpy
from tests.models import randomize

pytestmark = pytest.mark.same_everywhere

torch = pytest.importorskip("torch")
functional = torch.nn.functional
GELU_TANH = functools.partial(functional.gelu, approximate="tanh")
GELUS = [("gelu", functional.gelu), (gelu_approximate, GELU_TANH)]


@pytest.mark.parametrize(
    "layer", [FeedForward(24), GatedFeedForward(24, use_bias=True)]
)
def test_config_round_trip(layer):
    config = layer.get_config()
    assert type(layer).from_config(config).get_config() == config


@pytest.mark.parametrize("cls", [FeedForward, GatedFeedForward])
@pytest.mark.parametrize(
    ("activation", "reference"), [(None, None), ("relu", functional.relu), *GELUS]
)
def test_feed_forward_layers_are_what_they_say(cls, activation, reference):
    layer = cls(8, **({"activation": activation} if activation else {}))
    default = functional.gelu if cls is FeedForward else functional.silu
    layer.build((None, None, 16))
    randomize(layer)
    x = np.random.default_rng(0).normal(size=(2, 6, 16)).astype("float32")

    def project(name, x):
        return x @ to_numpy(getattr(layer, f"{name}_dense").kernel) + (
            to_numpy(getattr(layer, f"{name}_dense").bias) if layer.use_bias else 0
        )

    first = "intermediate" if cls is FeedForward else "gate"
    inner = (reference or default)(torch.from_numpy(project(first, x))).numpy()
    if cls is GatedFeedForward:
        inner = inner * project("intermediate", x)
    assert layer.use_bias == (cls is FeedForward)
    assert_close(layer(x), project("output", inner), atol=1e-5)


def test_the_two_gelus_differ():
    x = torch.linspace(-6, 6, 1001)
    found = [to_numpy(FeedForward(1, name).activation(x.numpy())) for name, _ in GELUS]
    for outputs, (_, reference) in zip(found, GELUS):
        assert_close(outputs, reference(x).numpy(), atol=1e-6)
    assert 4e-4 < np.abs(found[0] - found[1]).max() < 5e-4
