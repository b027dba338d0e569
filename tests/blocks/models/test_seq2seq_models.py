"""Published encoder-decoder architectures beside transformers, with random weights.

A new architecture is a line in `CASES` of `seq2seq_cases.py`, and so is each unusual
configuration.
"""

import json
import warnings

import keras
import numpy as np
import pytest

from attention import MultiHeadAttention, call_with_cache, create_cache
from attention.contract import axes_of_weights
from attention.testing.backends import compile_call
from blocks.checkpoints import hugging_face
from blocks.checkpoints.architecture import find_architecture
from blocks.checkpoints.peft_adapters import export_lora
from blocks.generation.backbone_inputs import token_embedding
from blocks.models.bart import BartBackbone
from blocks.models.t5 import T5Backbone
from blocks.quantized_head import logits_of
from tests.blocks.models.checks import VOCABULARY_SIZE, randomize
from tests.blocks.models.seq2seq_cases import CASES
from tests.helpers import raises, to_numpy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS = {"encoder": np.array([9, 6, 3]), "decoder": np.array([8, 4, 11])}
SAMPLES = np.array([3000, 2200, 1300])
# How many tokens of each target come before the steps.
PREFILLED = np.array([4, 2, 3])
# What transformers calls inputs.
NAMES = {
    "encoder_token_ids": "input_ids",
    "encoder_features": "input_features",
    "encoder_audio": "input_values",
    "decoder_token_ids": "decoder_input_ids",
}


def inputs(backbone):
    """Returns those that a backbone has: sources of tokens, features or audio."""
    rng = np.random.default_rng(0)
    lengths, found = dict(LENGTHS), {}
    if "encoder_audio" in backbone.input:
        lengths["encoder"] = SAMPLES
    for side, length in lengths.items():
        mask = np.arange(length.max()) < length[:, None]
        tokens = rng.integers(0, VOCABULARY_SIZE, mask.shape)
        found[f"{side}_token_ids"] = np.where(mask, tokens, 0).astype("int32")
        found[f"{side}_padding_mask"] = mask.astype("int32")
    found["encoder_audio"] = rng.normal(size=(3, SAMPLES.max())).astype("float32")
    frames = 2 * LENGTHS["encoder"].max()
    found["encoder_features"] = rng.normal(size=(3, frames, 5)).astype("float32")
    return {name: found[name] for name in backbone.input}


def make_reference(name, arguments):
    config = getattr(transformers, name)(**arguments)
    config._attn_implementation = "eager"
    made_by = find_architecture(config.model_type).causal_lm_class
    reference = getattr(transformers, made_by)(config).eval()
    if hasattr(reference, "final_logits_bias"):
        bias = reference.final_logits_bias
        bias.copy_(torch.arange(bias.numel()).view(bias.shape) / 99)
    if config.model_type == "t5" and arguments.get("tie_word_embeddings") is False:
        # transformers 5 ties them where no file says otherwise.
        head = torch.empty_like(reference.lm_head.weight)
        reference.lm_head.weight = torch.nn.Parameter(head)
    randomize(reference)
    return reference


@pytest.fixture(params=CASES, scope="module")
def models(request, tmp_path_factory):
    """A transformers model, and our backbone that is loaded from its folder."""
    name, arguments = request.param
    reference, folder = make_reference(name, arguments), tmp_path_factory.mktemp(name)
    reference.save_pretrained(folder)
    return reference, hugging_face.load_backbone(str(folder))


def expected_rows(reference, backbone):
    """Yields the encoder's outputs and logits of each row, computed without padding."""
    x = inputs(backbone)
    for row in range(3):
        given = {}
        for name in NAMES.keys() & x.keys():
            mask = x.get(name.split("_")[0] + "_padding_mask")
            length = None if mask is None else mask[row].sum()
            given[NAMES[name]] = torch.tensor(x[name][row : row + 1, :length])
        if "input_features" in given:
            given["input_features"] = given["input_features"].swapaxes(1, 2)
        with torch.no_grad():
            found = reference(**given)
        yield found.encoder_last_hidden_state[0].numpy(), found.logits[0].numpy()


def compiled(function):
    # Eagerly, JAX would compile each operation on its own.
    return compile_call(function) if keras.config.backend() == "jax" else function


def largest_differences(reference, backbone):
    """Returns those of the encoder's outputs and of logits, with and without a cache."""

    def whole(x):
        found = backbone(x)
        hidden = found["decoder_sequence_output"]
        logits = logits_of(token_embedding(backbone), hidden)
        return found["encoder_sequence_output"], logits

    def step(given, source, cache, index):
        # Models take arrays or tensors, and no mixture.
        given = {name: keras.ops.convert_to_tensor(y) for name, y in given.items()}
        x = {**given, **source}
        hidden, cache = call_with_cache(backbone.decoder, x, cache, index)
        return logits_of(token_embedding(backbone), hidden), cache

    whole, step, encode = map(compiled, (whole, step, backbone.encoder))
    x = inputs(backbone)
    encoded, logits = map(to_numpy, whole(x))
    source = encode({name: y for name, y in x.items() if name.startswith("encoder")})
    lengths = encoded.shape[1], LENGTHS["decoder"].max()
    cache = create_cache(backbone.decoder, 3, int(lengths[1]), None, lengths[0])
    # A padded prefill, then the rest of each row, a token at a time.
    mask = np.arange(PREFILLED.max()) < PREFILLED[:, None]
    tokens = x["decoder_token_ids"]
    first = {"token_ids": tokens[:, : PREFILLED.max()], "padding_mask": mask * 1}
    found, cache = step(first, source, cache, np.int32(0))
    rows = [[*row[:count]] for row, count in zip(to_numpy(found), PREFILLED)]
    for i in range(2):
        index = (PREFILLED + i).astype("int32")
        token = np.take_along_axis(tokens, index[:, None], axis=1)
        given = {"token_ids": token, "padding_mask": np.ones_like(token)}
        found, cache = step(given, dict.fromkeys(source), cache, index)
        for row, new in zip(rows, to_numpy(found)):
            row.append(new[0])
    largest = np.zeros(2)
    for i, expected in enumerate(expected_rows(reference, backbone)):
        assert all(y.std() > 0.1 for y in expected)
        steps = np.abs(np.array(rows[i]) - expected[1][: len(rows[i])]).max()
        for j, (y, z) in enumerate(zip((encoded[i], logits[i]), expected)):
            largest[j] = max(largest[j], np.abs(y[: len(z)] - z).max())
        largest[1] = max(largest[1], steps)
    return largest


def test_outputs_through_padding_and_a_cache(models):
    assert (largest_differences(*models) < 1e-4).all()


def test_weights_declare_their_axes(models):
    axes_of_weights(models[1])


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="numbers are the same")
def test_the_road_back(models, tmp_path):
    reference, backbone = models
    hugging_face.export_backbone(backbone, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, info = type(reference).from_pretrained(
            tmp_path, output_loading_info=True, attn_implementation="eager"
        )
    # Sines and cosines are computed there.
    ends = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
    missing = {x for x in info.pop("missing_keys") if not x.endswith(ends)}
    assert not missing and not any(info.values()), (missing, info)
    rows = (expected_rows(x, backbone) for x in (exported, reference))
    for found, expected in zip(*rows):
        for y, z in zip(found, expected):
            assert np.abs(y - z).max() < 1e-5


@pytest.mark.parametrize(
    ("case", "renamed"),
    [
        ("T5", {"shared": "decoder.embed_tokens"}),
        ("T5-1.1", {"lm_head.weight": None}),
        (
            "Bart",
            {"model.shared": "model.encoder.embed_tokens", "final_logits_bias": None},
        ),
        ("Bart", {"model.": "", "final_logits_bias": None}),
    ],
)
def test_files_that_call_tensors_otherwise(case, renamed, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    reference = make_reference(*next(x.values[0] for x in CASES if x.id == case))
    if "lm_head.weight" in renamed:
        # Not in the file, as it is the embedding.
        reference.lm_head.weight = reference.shared.weight
    if "final_logits_bias" in renamed:
        reference.final_logits_bias.zero_()
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.load_file(path)
    for before, after in renamed.items():
        tensors = {
            name.replace(before, after or ""): x
            for name, x in tensors.items()
            if after is not None or before not in name
        }
    safetensors.save_file(tensors, path, metadata={"format": "pt"})
    backbone = hugging_face.load_backbone(str(tmp_path))
    assert (largest_differences(reference, backbone) < 1e-4).all()


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("t5", {}),
        ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
        ("mt5", {"num_layers": 8, "num_decoder_layers": 3}),
        ("bart", {}),
        ("mbart", {"encoder_layers": 3}),
        ("marian", {}),
        ("marian", {"share_encoder_decoder_embeddings": False}),
        ("pegasus", {}),
        ("whisper", {}),
        ("moonshine", {}),
        ("moonshine", {"partial_rotary_factor": 0.62, "rope_theta": 500.0}),
    ],
)
def test_what_configurations_leave_out(model_type, said):
    architecture = find_architecture(model_type)
    filled = transformers.AutoConfig.for_model(model_type, **said).to_dict()
    assert architecture.read_config(said) == architecture.read_config(filled)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="numbers are the same")
def test_updates_are_read_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    reference = make_reference(*CASES[0].values[0])
    reference.save_pretrained(tmp_path / "base")
    backbone = hugging_face.load_backbone(str(tmp_path / "base"))
    backbone.enable_lora(2)
    for weight in backbone.trainable_weights:
        if weight.name.startswith("lora_"):
            weight.assign(keras.random.normal(weight.shape, seed=1) / 4)
    export_lora(backbone, str(tmp_path / "updates"))
    updated = peft.PeftModel.from_pretrained(reference, str(tmp_path / "updates"))
    assert type(updated) is peft.PeftModelForSeq2SeqLM
    assert (largest_differences(updated, backbone) < 1e-4).all()


def test_what_computes_otherwise_is_not_written(tmp_path):
    class Unscaled(T5Backbone):
        def embed_source(self, inputs):
            x, mask = super().embed_source(inputs)
            return x * 2, mask

    class OwnBiases(T5Backbone):
        def create_attention_layer(self, inputs_shape, layer_index, causal=True):
            return super().create_attention_layer(inputs_shape, 0, causal)

    class Windowed(BartBackbone):
        def create_attention_layer(self, inputs_shape, layer_index, causal=True):
            window = None if causal else 3
            return MultiHeadAttention(self.num_heads, causal=causal, window=window)

    sizes = dict.fromkeys(("vocabulary_size", "hidden_dim", "intermediate_dim"), 8)
    for cls, found in (
        (Unscaled, "embed_source="),
        (OwnBiases, "encoder_layer_1/self_attention/relative_position_bias: only here"),
        (Windowed, "window=3, published None"),
    ):
        backbone = cls(num_layers=2, num_heads=2, max_sequence_length=8, **sizes)
        with raises(ValueError, "nothing was written", found):
            hugging_face.export_backbone(backbone, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


# What a configuration of each model type may not say.
REFUSED = {
    "t5": {"is_encoder_decoder": False},
    "bart": {"encoder_attention_heads": 4, "decoder_attention_heads": 8},
    "moonshine": {"encoder_hidden_act": "relu"},
    "pegasus": {"tie_word_embeddings": False},
    "marian": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_computed_is_refused(model_type, tmp_path):
    config = {"model_type": model_type, **REFUSED[model_type]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises(ValueError, "computed here", *REFUSED[model_type]):
        hugging_face.load_backbone(str(tmp_path), with_weights=False)


def test_presets(models, tmp_path):
    reference, backbone = models
    backbone.save_to_preset(str(tmp_path))
    restored = type(backbone).from_preset(str(tmp_path))
    assert (largest_differences(reference, restored) < 1e-4).all()
