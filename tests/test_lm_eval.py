"""What lm-eval says of a model is what it says of the same model in transformers."""

import numpy as np
import pytest

from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone, JsonTokenizer
from blocks.models.llama import LlamaBackbone
from tests.helpers import load_example
from tests.made_tokenizers import byte_level

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LIMIT = 12
SIZES = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "intermediate_dim": 64}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend("examples")
    return load_example("lm_eval_harness")


def make_lm(cls, start, **options):
    """The same model on each backend, whose weights are large enough to vary answers."""
    rng = np.random.default_rng(3)
    tokenizer = JsonTokenizer(byte_level(start))
    end = tokenizer.token_to_id("<|end|>")
    preprocessor = CausalLMPreprocessor(tokenizer, 512, end_token=end)
    backbone = cls(tokenizer.vocabulary_size(), **SIZES, **options)
    for weight in backbone.weights:
        if len(weight.shape) > 1:
            weight.assign(rng.normal(scale=0.12, size=weight.shape))
    lm = CausalLM(backbone, preprocessor)
    lm.compile(sampler="greedy")
    return lm


CASES = {
    # Paragraphs are scored in windows, and prompts lose their beginnings. There is no
    # position for one token more.
    "gpt2": (CustomBackbone, None, {"max_sequence_length": 96}),
    "llama": (LlamaBackbone, "<s>", {"max_sequence_length": 512}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_same_model_in_transformers(example, case, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    cls, start, options = CASES[case]
    lm = make_lm(cls, start, **options)
    lm.export_to_transformers(str(tmp_path))
    reference = HFLM(str(tmp_path), device="cpu", dtype="float32", batch_size=4)
    ours = example.BlocksLM(lm, batch_size=4)
    assert ours.max_length == reference.max_length == options["max_sequence_length"]
    found, expected = (
        example.evaluate(x, limit=LIMIT, bootstrap_iters=0) for x in (ours, reference)
    )
    assert found["results"].keys() == expected["results"].keys()
    assert len(found["results"]) == 3
    for name, values in expected["results"].items():
        for metric, value in values.items():
            if isinstance(value, float):
                assert np.isclose(found["results"][name][metric], value, rtol=1e-4)
    answers = set()
    for name, samples in expected["samples"].items():
        assert len(samples) == LIMIT
        for one, other in zip(found["samples"][name], samples):
            assert one["arguments"] == other["arguments"]
            if name == "topics_copy":
                assert one["resps"] == other["resps"]
                answers.add(one["resps"][0][0])
            else:
                np.testing.assert_allclose(
                    np.array(one["resps"], "float64"),
                    np.array(other["resps"], "float64"),
                    rtol=1e-4,
                )
    assert len(answers) > 3
    starts = ["Line", "The", "In a", "Copy:", "of (", "is 1", "and", "12"]
    likeliest = lm.generate(starts, strip_prompt=True, max_new_tokens=1)
    pairs = [
        ("", "An object"),
        ("A ", "name"),
        *zip(starts, likeliest),
        *zip(starts, likeliest[::-1]),
    ]
    # Some become a part of the last token before them.
    pairs = [x for x in pairs if ours.encode_pair(*x)[1]]
    asked = [Instance("loglikelihood", {}, x, 0) for x in pairs]
    found, expected = (x.loglikelihood(asked) for x in (ours, reference))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert {is_greedy for _, is_greedy in expected} == {True, False}
