"""Published architectures beside transformers, with the same random weights.

A new architecture is a line in `CASES` of the table of its kind, such as
`llama_cases.py`; its unusual configurations are lines, too.
"""

import functools
import warnings

import keras
import numpy as np
import pytest

from attention.contract import axes_of_weights
from blocks import CausalLM
from tests.blocks.models import (
    experts_cases,
    gpt_cases,
    llama_cases,
    recurrent_cases,
)
from tests.blocks.models.cases import DECODER
from tests.blocks.models.checks import (
    check_greedy,
    check_logits,
    prompts,
    randomize,
)
from tests.helpers import to_numpy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = [
    *gpt_cases.CASES,
    *llama_cases.CASES,
    *experts_cases.CASES,
    *recurrent_cases.CASES,
]


@pytest.fixture(params=CASES, scope="module")
def models(request, tmp_path_factory):
    """A transformers model, and ours that is loaded from its folder."""
    name, arguments = request.param
    config = getattr(transformers, name)(**arguments)
    config._attn_implementation = arguments.get("attn_implementation", "eager")
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(reference)
    folder = tmp_path_factory.mktemp(name)
    reference.save_pretrained(folder)
    return reference, CausalLM.from_preset(str(folder))


def expected_logits(reference, row):
    with torch.no_grad():
        return reference(torch.tensor(row[None].astype("int64"))).logits[0].numpy()


def test_logits_through_padding_and_a_cache(models):
    reference, lm = models
    check_logits(lm, functools.partial(expected_logits, reference))


def test_weights_declare_their_axes(models):
    axes_of_weights(models[1])


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="compiles elsewhere")
def test_greedy_tokens_and_the_road_back(models, tmp_path):
    reference, lm = models
    check_greedy(lm, functools.partial(expected_logits, reference))
    lm.export_to_transformers(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            output_loading_info=True,
            attn_implementation=reference.config._attn_implementation,
        )
    assert type(exported) is type(reference)
    assert not any(info.values()), info
    row = prompts()["token_ids"][0]
    outputs, expected = (expected_logits(m, row) for m in (exported, reference))
    assert np.abs(outputs - expected).max() < 1e-5


@pytest.mark.slow
def test_the_language_model_of_gemma_3_with_images(tmp_path):
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    images = {"hidden_size": 16, "intermediate_size": 16, "image_size": 28, **heads}
    config = transformers.Gemma3Config(
        text_config={**DECODER, "head_dim": 10, "sliding_window": 3},
        vision_config={**images, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    reference = transformers.Gemma3ForConditionalGeneration(config).eval()
    randomize(reference)
    reference.save_pretrained(tmp_path / "images")
    lm = CausalLM.from_preset(str(tmp_path / "images"))
    x = prompts()
    expected = expected_logits(reference, x["token_ids"][0])
    assert np.abs(to_numpy(lm(x))[0] - expected).max() < 1e-4
    lm.export_to_transformers(str(tmp_path / "text"))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert type(exported) is transformers.Gemma3ForCausalLM
    outputs = expected_logits(exported, x["token_ids"][0])
    assert np.abs(outputs - expected).max() < 1e-4
