"""The example `write_once.py`: it runs, and its recurrence and generation are right."""

import numpy as np
import pytest
from keras import ops

import tests.models
from attention.testing import check_cached_layer
from blocks import CausalLM
from tests.helpers import assert_close, load_example, randomize, sample, to_numpy

example = load_example("write_once")


def test_the_demonstrations_pass(capsys):
    example.functional_model()
    example.compound_layer()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("Passed: ") for line in lines)


def test_the_recurrence_keeps_the_contract_and_equals_its_formula():
    checks = ["chunks", "padding", "low_precision", "gradients"]
    check_cached_layer(lambda: example.Recurrence(4), max_length=9, checks=checks)
    layer, x = example.Recurrence(num_heads=4), sample()
    layer.build(x.shape)
    randomize(layer)
    full = to_numpy(layer(x))
    state = np.zeros((3, 4, 4), "float32")
    keep = to_numpy(ops.sigmoid(layer.keep(x)))[..., None]
    value = to_numpy(layer.value(x)).reshape((3, 12, 4, 4))
    for t in range(12):
        state = keep[:, t] * state + (1 - keep[:, t]) * value[:, t]
        expected = layer.project(ops.reshape(state, (3, 16)) * layer.gate(x[:, t]))
        assert_close(full[:, t], expected)


@pytest.mark.slow
def test_generation_equals_the_model_without_a_cache():
    model = example.language_model(16, 2, 1)
    tests.models.randomize(model)
    lm = CausalLM(model)
    lm.compile(sampler="greedy")
    prompts = example.padded(example.PROMPTS, 40)
    outputs = lm.generate(prompts, stop_token_ids=None, max_new_tokens=6)
    pairs = zip(*(outputs[name] for name in example.INPUTS))
    rows = [tokens[mask].tolist() for tokens, mask in pairs]
    assert rows == example.greedy_without_cache(lm, example.PROMPTS, 6)
    assert len({tuple(row[-6:]) for row in rows}) > 1
