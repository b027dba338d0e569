"""Tokens that published encoder-decoder models give here, and by transformers."""

import keras_hub
import numpy as np
import pytest

from blocks import Seq2SeqLM
from tests.blocks.models.seq2seq_cases import CASES
from tests.blocks.models.test_seq2seq_models import NAMES, inputs, make_reference
from tests.models import SMALL_SIZES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

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
