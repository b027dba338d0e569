"""What a loaded model is compared with a reference by."""

import keras
import numpy as np

from attention import call_with_cache, create_cache
from attention.testing.backends import compile_call
from tests.helpers import to_numpy

LENGTHS = (11, 5, 8)
PREFILLED = 4
VOCABULARY_SIZE = 61


def prompts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY_SIZE, (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, tokens, 0).astype("int32")
    return {"token_ids": tokens, "padding_mask": mask.astype("int32")}


def randomize(model):
    """Gives a torch model weights large enough that tokens differ in what follows."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (x for x in model.parameters() if x.requires_grad):
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter += 0.1 * noise
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def check_logits(lm, expected_logits):
    """Checks logits through padding and a cache.

    `expected_logits` is called with a row of tokens, and returns `(length, vocabulary)`.
    The largest difference is returned.
    """

    def cached_logits(inputs, cache, index):
        hidden, cache = call_with_cache(lm.backbone, inputs, cache, index)
        return lm.compute_logits(hidden), cache

    call = lm
    if keras.config.backend() == "jax":
        # Eagerly, each operation would be compiled on its own.
        call, cached_logits = map(compile_call, (lm, cached_logits))
    x = prompts()
    outputs = to_numpy(call(x))
    # A padded prefill, then the rest of each row, a token at a time.
    cache = create_cache(lm.backbone, len(LENGTHS), max(LENGTHS))
    lengths = np.minimum(LENGTHS, PREFILLED) - np.array([0, 1, 0])
    first = {
        "token_ids": x["token_ids"][:, :PREFILLED],
        "padding_mask": (np.arange(PREFILLED) < lengths[:, None]).astype("int32"),
    }
    logits, cache = cached_logits(first, cache, np.int32(0))
    cached = [[*row[:n]] for row, n in zip(to_numpy(logits), lengths)]
    for step in range(3):
        index = (lengths + step).astype("int32")
        token = np.take_along_axis(x["token_ids"], index[:, None], axis=1)
        inputs = {"token_ids": token, "padding_mask": np.ones_like(token)}
        logits, cache = cached_logits(inputs, cache, index)
        for row, new in zip(cached, to_numpy(logits)):
            row.append(new[0])
    largest = 0.0
    for i, length in enumerate(LENGTHS):
        expected = expected_logits(x["token_ids"][i, :length])
        assert expected.std() > 0.1
        difference = np.abs(outputs[i, :length] - expected).max()
        steps = min(len(cached[i]), length)
        by_steps = np.abs(np.array(cached[i])[:steps] - expected[:steps]).max()
        assert difference < 1e-4, (i, difference)
        assert by_steps < 1e-4, (i, by_steps)
        largest = max(largest, difference, by_steps)
    return largest


def check_greedy(lm, expected_logits, new=8):
    """Checks the tokens that `generate` chooses; arguments as for `check_logits`."""
    x = prompts()
    lm.compile(sampler="greedy")
    for i, length in enumerate(LENGTHS[:2]):
        row = x["token_ids"][i, :length]
        outputs = lm.generate(row[None], max_new_tokens=new, stop_token_ids=None)
        for _ in range(new):
            row = np.append(row, expected_logits(row)[-1].argmax())
        assert outputs["token_ids"][0].tolist() == row.tolist()
