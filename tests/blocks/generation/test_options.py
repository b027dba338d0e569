"""Options of one call: each row's are its own, on every way of generating."""

import keras
import numpy as np
import pytest
from keras import ops

from blocks import CausalLM, LogitsProcessor, PromptLookup
from tests.helpers import EAGER, raises, to_numpy
from tests.models import (
    RAGGED,
    generated,
    log_softmax,
    make_backbone,
    make_small_lm,
    make_text_lm,
    make_variant,
    next_token_logits,
    prompts,
)

OPTIONS = {"stop_token_ids": None, "max_new_tokens": 9}
EACH = {
    "temperature": [0.7, 1.5, 0],
    "top_k": [0, 5, 0],
    "top_p": [0.9, 1.0, 1.0],
    "min_p": [0.0, 0.05, 0.0],
    "seed": [3, 2**40, 5],
    "repetition_penalty": [1.0, 1.3, 2.0],
    "presence_penalty": [0.3, 0.0, 0.0],
    "frequency_penalty": [0.0, 0.2, 0.0],
    "no_repeat_ngram_size": [0, 2, 3],
    "logit_bias": [None, {4: 1.0}, {6: -np.inf, 9: 0.5}],
}


@pytest.fixture(scope="module")
def lm():
    return make_small_lm(make_backbone(num_layers=1))


def alone(lm, **options):
    """Each prompt by itself, with its own options."""
    rows = []
    for i, row in enumerate(RAGGED):
        own = {name: values[i] for name, values in options.items()}
        rows += generated(lm, [row], **OPTIONS, **own)
    return rows


@pytest.mark.parametrize(
    "mixer", ["mha", pytest.param("retention", marks=pytest.mark.slow)]
)
def test_a_row_depends_on_its_own_options_alone(mixer):
    lm = make_small_lm(make_variant(mixer, num_layers=1))
    if mixer == "mha":
        lm.compile(sampler="greedy", run_eagerly=EAGER)
    expected = alone(lm, **EACH)
    assert generated(lm, **OPTIONS, **EACH) == expected
    # The greedy row is another without its penalty; the others draw.
    assert expected != generated(lm, **OPTIONS)
    other = {**EACH, "seed": [4, 3, 5]}
    found = generated(lm, **OPTIONS, **other)
    assert found[0] != expected[0] and found[1] != expected[1]
    assert found[2] == expected[2]
    # With guesses, streamed, in a session, and in a loop of one's own.
    guess = {"speculation": PromptLookup(3)}
    assert generated(lm, **OPTIONS, **EACH, **guess) == expected
    pieces = list(lm.stream(prompts(RAGGED), **OPTIONS, **EACH))
    joined = [np.concatenate(x).tolist() for x in zip(*pieces)]
    assert joined == expected
    session = lm.start(prompts(RAGGED))
    session.generate(**OPTIONS, **EACH)
    assert [row.tolist() for row in session.tokens] == expected
    state = lm.prefill(prompts(RAGGED), max_length=32, **EACH)
    rows = [list(row) for row in RAGGED]
    for _ in range(OPTIONS["max_new_tokens"]):
        tokens, state = lm.sample(state, **EACH)
        _, state = lm.decode_step(tokens, state)
        rows = [[*row, int(token)] for row, token in zip(rows, to_numpy(tokens))]
    assert rows == expected


def test_penalties_are_those_of_the_model_without_a_cache(lm):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    rows, penalties, sizes = [list(row) for row in RAGGED], [1.2, 2.0, 1.0], [2, 3, 1]
    for _ in range(OPTIONS["max_new_tokens"]):
        logits = next_token_logits(lm, rows, 32)
        for i, row in enumerate(rows):
            scores = torch.tensor(logits[i : i + 1])
            for processor in (
                transformers.RepetitionPenaltyLogitsProcessor(penalties[i]),
                transformers.NoRepeatNGramLogitsProcessor(sizes[i]),
            ):
                scores = processor(torch.tensor([row]), scores)
            rows[i] = [*row, int(scores.argmax())]
    found = generated(
        lm, **OPTIONS, repetition_penalty=penalties, no_repeat_ngram_size=sizes
    )
    assert found == rows


@pytest.mark.skipif(keras.config.backend() == "torch", reason="torch compiles nothing")
def test_other_numbers_compile_nothing(lm):
    generated(lm, **OPTIONS, **EACH)
    before = lm.compilations
    other = {name: values[::-1] for name, values in EACH.items()}
    generated(lm, **OPTIONS, **other)
    generated(lm, **OPTIONS, **{**EACH, "temperature": 0.3, "top_k": 7, "seed": 1})
    assert lm.compilations == before


def test_continuations_of_one_prompt_differ(lm):
    options = {**OPTIONS, "temperature": 2.0, "seed": 7, "num_return_sequences": 3}
    found = lm.generate(prompts(RAGGED[:1]), **options)["token_ids"][0].tolist()
    assert found[0] != found[1] != found[2]
    assert found[0] == generated(lm, RAGGED[:1], **OPTIONS, temperature=2.0, seed=7)[0]
    assert found == lm.generate(prompts(RAGGED[:1]), **options)["token_ids"][0].tolist()


def test_large_and_negative_seeds_of_one_batch_are_exact(lm):
    seeds = [2**63 + 5, -3, 2**64 - 1]
    found = generated(lm, **OPTIONS, temperature=2.0, seed=seeds)
    assert found == alone(lm, temperature=[2.0] * 3, seed=seeds)


def test_numbers_that_are_not_given_are_the_samplers():
    lm = make_small_lm(make_backbone(num_layers=1))
    for sampler, numbers in (
        (keras_sampler("TopPSampler", p=0.3, k=4, temperature=0.7), (0.7, 4, 0.3)),
        (keras_sampler("TopKSampler", k=2), (1.0, 2, 1.0)),
        (keras_sampler("RandomSampler", temperature=1.7), (1.7, 0, 1.0)),
        (keras_sampler("GreedySampler"), (1.0, 0, 1.0)),
    ):
        lm.compile(sampler=sampler)
        named = dict(zip(("temperature", "top_k", "top_p"), numbers))
        found = generated(lm, **OPTIONS, seed=3, min_p=0.01)
        assert found == generated(lm, **OPTIONS, seed=3, min_p=0.01, **named)


def keras_sampler(name, **kwargs):
    import keras_hub

    return getattr(keras_hub.samplers, name)(**kwargs)


class NotAgain(LogitsProcessor):
    """Allows each token once: the state is what was chosen."""

    def create_state(self, tokens):
        return np.zeros((len(tokens.lengths), 60), "float32")

    def call(self, logits, tokens, state):
        last = ops.take_along_axis(
            tokens.token_ids, tokens.lengths[:, None] - 1, axis=1
        )
        new = (tokens.lengths > tokens.prompt_lengths)[:, None]
        chosen = ops.logical_and(last == ops.arange(60)[None], new)
        state = ops.maximum(state, ops.cast(chosen, "float32"))
        return ops.where(state > 0, -float("inf"), logits), state


def test_a_processor_of_ones_own_keeps_a_state(lm):
    processors = [NotAgain()]
    expected = [list(row) for row in RAGGED]
    for _ in range(OPTIONS["max_new_tokens"]):
        logits = next_token_logits(lm, expected, 32)
        for i, row in enumerate(expected):
            logits[i, row[len(RAGGED[i]) :]] = -np.inf
            expected[i] = [*row, int(logits[i].argmax())]
    options = {**OPTIONS, "processors": processors}
    assert generated(lm, **options) == expected
    assert generated(lm, **options, speculation=PromptLookup(4)) == expected
    before = lm.compilations
    assert generated(lm, [*RAGGED[1:], RAGGED[0]], **options)[0] == expected[1]
    assert lm.compilations == before


def test_log_probabilities_are_those_of_the_model_without_a_cache(lm):
    found = lm.generate(
        prompts(RAGGED), **OPTIONS, temperature=0.8, seed=2, return_logprobs=3
    )
    for prompt, x in zip(RAGGED, found):
        row = [*prompt, *x.token_ids.tolist()]
        outputs = to_numpy(lm(prompts([row], 32)))[0]
        expected = log_softmax(outputs)[len(prompt) - 1 : len(row) - 1]
        chosen = np.take_along_axis(expected, x.token_ids[:, None], 1)[:, 0]
        np.testing.assert_allclose(x.logprobs.chosen, chosen, atol=1e-4)
        best = np.sort(expected, axis=1)[:, ::-1][:, :3]
        np.testing.assert_allclose(x.logprobs.best, best, atol=1e-4)
        at = np.take_along_axis(expected, x.logprobs.best_ids, 1)
        np.testing.assert_allclose(at, best, atol=1e-4)
        assert (x.finish_reason, x.prompt_length, x.text) == (
            "length",
            len(prompt),
            None,
        )
        assert len(x.token_ids) == 9


def test_scores_are_those_of_the_model_without_a_cache(lm):
    rows = [*RAGGED, list(range(30))]
    found = lm.score(rows, return_logprobs=2, batch_size=3)
    sums = lm.score(rows)
    for row, score, total in zip(rows, found, sums):
        expected = log_softmax(to_numpy(lm(prompts([row], 32)))[0])[: len(row) - 1]
        chosen = expected[np.arange(len(row) - 1), row[1:]]
        assert score.token_ids.tolist() == row
        np.testing.assert_allclose(score.logprobs.chosen, chosen, atol=1e-4)
        np.testing.assert_allclose(total, chosen.sum(), atol=1e-3)
        best = np.sort(expected, axis=1)[:, ::-1][:, :2]
        np.testing.assert_allclose(score.logprobs.best, best, atol=1e-4)
    assert np.isclose(lm.score(rows[1]), sums[1], atol=1e-4)
    # The last token needs no position; a row of one token has nothing to score.
    whole = [i % 7 for i in range(65)]
    (sums, nothing), alone = lm.score([whole, [3]]), lm.score(whole[:-1])
    last = log_softmax(to_numpy(lm(prompts([whole[:-1]])))[0])[-1, whole[-1]]
    assert np.isclose(sums, alone + last, atol=1e-3) and nothing == 0
    with raises(ValueError, "has learned 64 positions", "row 0 has 66 tokens"):
        lm.score([[1] * 66])


@pytest.mark.slow
def test_a_models_own_options_are_defaults(tmp_path):
    defaults = {"temperature": 0.6, "top_k": 3, "repetition_penalty": 1.4}
    lm = make_small_lm(make_backbone(num_layers=1), generation_options=defaults)
    base = CausalLM(lm.backbone, generation_sizes=lm.generation_sizes)
    base.compile(sampler="greedy")
    # A sampler that is given takes the place of what says how to draw.
    penalty = {"repetition_penalty": 1.4}
    assert generated(lm, **OPTIONS) == generated(base, **OPTIONS, **penalty)
    assert generated(lm, **OPTIONS, repetition_penalty=1) == generated(base, **OPTIONS)
    lm.save_to_preset(str(tmp_path))
    loaded = CausalLM.from_preset(str(tmp_path), generation_sizes=lm.generation_sizes)
    loaded.compile()
    expected = generated(base, **OPTIONS, **defaults, seed=3)
    assert generated(loaded, **OPTIONS, seed=3) == expected
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
    assert generated(loaded, **OPTIONS, **greedy) == generated(base, **OPTIONS)
    loaded.compile(sampler="greedy")
    assert generated(loaded, **OPTIONS) == generated(lm, **OPTIONS)


def test_bad_options_are_errors(lm):
    for kind, parts, options in (
        (
            TypeError,
            ["no option `temprature`", "temperature, top_k"],
            {"temprature": 1},
        ),
        (ValueError, ["`temperature` must be at least 0", "-1"], {"temperature": -1}),
        (ValueError, ["`top_p`", "2.0 for prompt 1"], {"top_p": [1, 2, 1]}),
        (ValueError, ["`top_k`", "one for each of 3"], {"top_k": [1, 2]}),
        (TypeError, ["`top_k` must be integer"], {"top_k": 1.5}),
        (TypeError, ["`seed` must be integer"], {"seed": "a"}),
        (ValueError, ["`seed`", "2**64 - 1", "prompt 1"], {"seed": [1, 2**64, 3]}),
        (ValueError, ["`top_k`", "2**31 - 1"], {"top_k": 2**31}),
        (TypeError, ["`min_p` must be number"], {"min_p": True}),
        (
            ValueError,
            ["`repetition_penalty`", "larger than 0"],
            {"repetition_penalty": 0},
        ),
        (
            ValueError,
            ["`logit_bias`", "vocabulary of 60", "60"],
            {"logit_bias": {60: 1}},
        ),
        (TypeError, ["`logit_bias` must be a dict"], {"logit_bias": 3}),
        (
            ValueError,
            ["values of `logit_bias`", "token 3"],
            {"logit_bias": {3: np.nan}},
        ),
        (TypeError, ["`processors`", "LogitsProcessor"], {"processors": [print]}),
        (ValueError, ["`stop` is text", "preprocessor"], {"stop": "a"}),
        (ValueError, ["`return_logprobs`", "from 0 to 60"], {"return_logprobs": 61}),
        (TypeError, ["`return_logprobs`"], {"return_logprobs": True}),
    ):
        with raises(kind, *parts):
            lm.generate(prompts(RAGGED), **OPTIONS, **options)
    with raises(ValueError, "`stream` yields text or tokens only", "`generate`"):
        lm.stream(prompts(RAGGED), **OPTIONS, return_logprobs=1)
    with raises(ValueError, "Pass the same options to both"):
        lm.sample(lm.prefill(prompts(RAGGED), 20), repetition_penalty=2)
    with raises(TypeError, "no option `stop` here"):
        CausalLM(lm.backbone, generation_options={"stop": "a"})
    with raises(TypeError, "must be a string that is not empty"):
        make_text_lm().generate("ab", stop=[""])


def test_samplers_with_a_loop_take_no_options():
    lm = make_small_lm(make_backbone(num_layers=1), sampler="beam")
    with raises(ValueError, "BeamSampler", "does not go with `temperature`"):
        lm.generate(prompts(RAGGED), **OPTIONS, temperature=1.0)
    lm.compile(sampler=keras_sampler("ContrastiveSampler"))
    with raises(ValueError, "ContrastiveSampler", "does not go with `stop`"):
        lm.generate(prompts(RAGGED), **OPTIONS, stop="a")
