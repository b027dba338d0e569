"""Tokens that published encoder-decoder models give here, and by transformers."""

import json

import keras_hub
import numpy as np
import pytest

from blocks import Seq2SeqLM
from tests.blocks.models.seq2seq_cases import CASES, T5
from tests.blocks.models.test_seq2seq_models import NAMES, inputs, make_reference
from tests.made_tokenizers import byte_level
from tests.models import SMALL_SIZES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

NEW, BEAMS = 5, 4
STARTS = [[0], [0, 7, 3], [0, 5]]
# The others differ in what is computed, and not in how tokens are made of it.
WHOLE = [x for x in CASES if "-" not in x.id]


def expected_tokens(reference, x, **options):
    """The new tokens of each row, by transformers, alone and without padding."""
    if hasattr(reference, "generation_config"):
        config = transformers.GenerationConfig(pad_token_id=0, decoder_start_token_id=0)
        reference.generation_config = config
    found = []
    for row, start in enumerate(STARTS):
        given = {}
        for name in (name for name in NAMES if name in x and "decoder" not in name):
            mask = x.get(name.split("_")[0] + "_padding_mask")
            length = None if mask is None else mask[row].sum()
            given[NAMES[name]] = torch.tensor(x[name][row : row + 1, :length])
        if "input_features" in given:
            given["input_features"] = given["input_features"].swapaxes(1, 2)
        # Past Whisper's own, which speaks of languages and time.
        tokens = transformers.GenerationMixin.generate(
            reference,
            **given,
            decoder_input_ids=torch.tensor([start]),
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=False,
            **options,
        )
        found.append(tokens[0, -NEW:].tolist())
    return found


@pytest.mark.parametrize(
    "given",
    [
        x
        if x.id in ("T5", "Bart")
        else pytest.param(*x.values, marks=pytest.mark.slow, id=x.id)
        for x in WHOLE
    ],
)
def test_tokens(given, tmp_path):
    name, arguments = given
    reference = make_reference(name, arguments)
    reference.save_pretrained(tmp_path)
    lm = Seq2SeqLM.from_preset(str(tmp_path), generation_sizes=SMALL_SIZES)
    lm.generation_options = {}
    x = {k: y for k, y in inputs(lm.backbone).items() if "decoder" not in k}
    options = {"stop_token_ids": None, "max_new_tokens": NEW}
    for sampler, theirs in (
        ("greedy", {}),
        (keras_hub.samplers.BeamSampler(num_beams=BEAMS), {"num_beams": BEAMS}),
    ):
        lm.compile(sampler=sampler)
        out = lm.generate({**x, "decoder_token_ids": STARTS}, **options)
        ends = np.asarray(out["decoder_padding_mask"]).sum(axis=1)
        rows = [r[e - NEW : e].tolist() for r, e in zip(out["decoder_token_ids"], ends)]
        assert rows == expected_tokens(reference, x, **theirs)


@pytest.mark.parametrize("forced", [None, 0])
def test_texts(forced, tmp_path):
    """A folder with a tokenizer: what targets begin with is read and written."""
    end = {"id": "<|end|>", "ids": [1], "tokens": ["<|end|>"]}
    made = json.loads(byte_level())
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|end|>": end},
    }
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(made)),
        eos_token="<|end|>",
        pad_token="<pad>",
    )
    reference = make_reference("T5Config", {**T5, "vocab_size": len(theirs)})
    reference.generation_config = transformers.GenerationConfig(
        eos_token_id=1,
        pad_token_id=2,
        decoder_start_token_id=2,
        forced_bos_token_id=forced,
    )
    reference.save_pretrained(tmp_path / "first")
    theirs.save_pretrained(tmp_path / "first")
    texts = ["the if statement", "a"]
    expected = []
    for text in texts:
        x = theirs(text, return_tensors="pt", return_token_type_ids=False)
        new = reference.generate(**x, max_new_tokens=7, do_sample=False)
        expected.append(theirs.decode(new[0], skip_special_tokens=True))
    Seq2SeqLM.from_preset(str(tmp_path / "first")).export_to_transformers(
        str(tmp_path / "second")
    )
    for folder in ("first", "second"):
        lm = Seq2SeqLM.from_preset(str(tmp_path / folder))
        lm.compile(sampler="greedy")
        # What is forced is a new token there, and a part of the prompt here.
        found = lm.generate(texts, max_new_tokens=7 - (forced is not None))
        assert found == expected
    config = json.loads((tmp_path / "second" / "generation_config.json").read_text())
    assert config["decoder_start_token_id"] == 2
    assert config.get("forced_bos_token_id") == forced
