"""Reading published folders and files: what fits, what does not, and what is refused."""

import json
import shutil

import keras
import ml_dtypes
import numpy as np
import pytest

from blocks import CausalLM, CustomBackbone
from blocks.checkpoints import Architecture, register_architecture
from blocks.checkpoints import hugging_face as folders
from blocks.checkpoints.loading import in_order
from blocks.models.llama import LlamaBackbone
from tests.helpers import raises, to_numpy
from tests.models import make_backbone, prompts

pytest.importorskip("safetensors")
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.same_everywhere

LLAMA = {"vocabulary_size": 30, "learned_positions": False, "num_key_value_heads": 2}
WEIGHTS = "model.safetensors"


def outputs_of(lm):
    return to_numpy(lm(prompts([[1, 2, 3, 4], [5, 6]])))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model and the folder that it was exported to."""
    lm = CausalLM(make_backbone(LlamaBackbone, **LLAMA))
    folder = tmp_path_factory.mktemp("published")
    lm.export_to_transformers(str(folder))
    return lm, folder


@pytest.fixture
def folder(published, tmp_path):
    """A copy of the folder, to be damaged."""
    shutil.copytree(published[1], tmp_path / "copy")
    return tmp_path / "copy"


def edit(path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def draws(*args, **kwargs):
    raise AssertionError("random weights were drawn")


def test_a_folder_gives_the_same_model_and_draws_nothing(published, monkeypatch):
    lm, folder = published
    monkeypatch.setattr(keras.initializers.RandomNormal, "__call__", draws)
    monkeypatch.setattr(keras.initializers.GlorotUniform, "__call__", draws)
    loaded = CausalLM.from_preset(str(folder))
    np.testing.assert_array_equal(outputs_of(loaded), outputs_of(lm))
    half = CausalLM.from_preset(str(folder), dtype="bfloat16")
    assert {weight.dtype for weight in half.weights} == {"bfloat16"}
    difference = np.abs(outputs_of(half).astype("float32") - outputs_of(lm)).max()
    assert 0 < difference < 0.1


def test_shards_and_a_checkpoint_of_the_backbone_alone(published, folder):
    lm, _ = published
    tensors = load_file(folder / WEIGHTS)
    # Without `lm_head` and with other names: what `AutoModel` saves.
    tensors = {name.removeprefix("model."): x for name, x in tensors.items()}
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    places = {name: file for file, part in shards.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), "utf-8")
    (folder / WEIGHTS).unlink()
    loaded = CausalLM.from_preset(str(folder))
    np.testing.assert_array_equal(outputs_of(loaded), outputs_of(lm))
    for outside in ("../a.safetensors", "/etc/passwd", 3):
        edit(index, lambda x, to=outside: x["weight_map"].update({names[0]: to}))
        with raises(ValueError, "outside of its folder"):
            CausalLM.from_preset(str(folder))


def test_of_a_file_and_an_index_the_file_is_read(published, folder):
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "b.safetensors"}}', "utf-8")
    loaded = CausalLM.from_preset(str(folder))
    np.testing.assert_array_equal(outputs_of(loaded), outputs_of(published[0]))


def test_all_differences_are_named_and_nothing_is_read(folder, monkeypatch):
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 8), "float32")
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 3), "float32")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, "float32")
    save_file(tensors, folder / WEIGHTS)
    monkeypatch.setattr(folders.SafetensorsFolder, "read", draws)
    with raises(
        ValueError,
        "nothing was loaded. 3 differences",
        "missing: model.norm.weight (16,)",
        "misshapen: model.layers.0.self_attn.q_proj.weight is (16, 8), and the model "
        "has (16, 16)",
        "surplus: model.layers.7.mlp.up_proj.weight (2, 3)",
    ):
        CausalLM.from_preset(str(folder))
    # What was begun is over: a model made now draws its weights.
    assert CustomBackbone(9, 1, 2, 8, 8).weights[0].shape == (9, 8)


def promise(folder, **changes):
    """Changes what the header says of a tensor."""
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["model.norm.weight"].update(changes)
    text = json.dumps(header).encode()
    start = len(text).to_bytes(8, "little")
    (folder / WEIGHTS).write_bytes(start + text + content[end:])


def cut(folder, size):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def deep_header(folder):
    text = b"[" * 200_000
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)


def without_type(folder):
    edit(folder / "config.json", lambda config: config.pop("model_type"))


def huge_header(folder):
    (folder / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


CONFIG = {
    "unknown": ({"model_type": "no_such"}, ["'no_such'", "'llama'", "register_arch"]),
    "path": ({"model_type": "../gpt2"}, ["'../gpt2'"]),
    "activation": ({"hidden_act": "relu"}, ["hidden_act='relu'", "'silu'"]),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, ["'gptq'"]),
    "number": ({"model_type": 5}, ["model_type=5", "'llama'"]),
    "null": ({"model_type": None}, ["model_type=None", "'llama'"]),
    "text": ({"quantization_config": "x"}, ["quantization_config='x'", "an object"]),
    "list": ({"rope_parameters": [1]}, ["rope_parameters=list(1)", "an object"]),
    "scaling": ({"rope_parameters": {"rope_type": "odd"}}, ["rope_type", "linear"]),
}
DAMAGE = {
    "dtype": (lambda x: promise(x, dtype="F4"), ["F4", "BF16"]),
    "more bytes": (
        lambda x: promise(x, shape=[1 << 40], data_offsets=[0, 4 << 40]),
        ["ends at byte"],
    ),
    "bytes of another": (lambda x: promise(x, shape=[3]), ["needs 12 bytes"]),
    "negative": (lambda x: promise(x, data_offsets=[-64, 0]), ["from -64 to 0"]),
    "infinite": (lambda x: promise(x, shape=[float("inf")]), ["no integers"]),
    "fraction": (lambda x: promise(x, shape=[16.0]), ["no integers"]),
    "bool": (lambda x: promise(x, data_offsets=[False, 64]), ["no integers"]),
    "digits": (lambda x: promise(x, shape=["16"]), ["no integers"]),
    "deep header": (deep_header, ["damaged or truncated", "recursion"]),
    "no model type": (without_type, ["`model_type`", "download the folder again"]),
    "half a file": (lambda x: cut(x, 4000), ["ends at byte", "of a file of 4000"]),
    "no header": (lambda x: cut(x, 6), ["damaged or truncated"]),
    "huge header": (huge_header, ["a header of"]),
    "pickled": (pickled, ["could run code", "pytorch_model.bin"]),
}


@pytest.mark.parametrize("name", CONFIG)
def test_configurations_that_are_refused(name, folder):
    change, parts = CONFIG[name]
    edit(folder / "config.json", lambda config: config.update(change))
    with raises(ValueError, *parts):
        CausalLM.from_preset(str(folder))


@pytest.mark.parametrize("name", DAMAGE)
def test_files_that_are_refused(name, folder):
    damage, parts = DAMAGE[name]
    damage(folder)
    with raises(ValueError, *parts):
        CausalLM.from_preset(str(folder))


def test_tensors_of_any_size_and_place_are_read(tmp_path):
    tensors = {
        "odd": np.arange(3, dtype="uint8"),
        "matrix": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        "scalar": np.array(7.5, "float32"),
        "none": np.zeros((0, 4), "float32"),
    }
    kinds = {"uint8": "U8", "bfloat16": "BF16", "float32": "F32"}
    header, data = {}, b""
    for name, x in tensors.items():
        place = [len(data), len(data) + x.nbytes]
        kind = kinds[x.dtype.name]
        header[name] = {"dtype": kind, "shape": x.shape, "data_offsets": place}
        data += x.tobytes()
    text = json.dumps(header).encode()
    path = tmp_path / WEIGHTS
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    checkpoint = folders.SafetensorsFolder(tmp_path)
    for name, x in tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == x.dtype and found.shape == x.shape
        for dtype in {x.dtype.name, "float32"}:
            copy = in_order(found.T, dtype)
            np.testing.assert_array_equal(copy, x.T.astype(dtype))
    cut(tmp_path, len(text) + 10)
    with raises(ValueError, "was cut off while it was read"):
        checkpoint.read("matrix")


def test_a_preset_of_a_published_architecture(published, tmp_path):
    lm, _ = published
    lm.save_to_preset(str(tmp_path))
    loaded = CausalLM.from_preset(str(tmp_path))
    assert type(loaded.backbone) is LlamaBackbone
    np.testing.assert_array_equal(outputs_of(loaded), outputs_of(lm))


@keras.saving.register_keras_serializable(package="tests")
class OwnBackbone(CustomBackbone):
    pass


def test_an_architecture_of_ones_own(tmp_path):
    @register_architecture
    class Own(Architecture):
        model_type = "own"
        transformers_class = "OwnForCausalLM"
        backbone_class = OwnBackbone
        config = {"vocabulary_size": "v", "num_layers": "n", "num_heads": "h"} | {
            name: name
            for name in ("hidden_dim", "intermediate_dim", "max_sequence_length")
        }
        weights = {
            "embed": "token_embedding/embeddings",
            "positions": "position_embedding/embeddings",
            "norm.g": "layer_norm/gamma",
            "norm.b": "layer_norm/beta",
        }
        layer_prefix = "{i}."
        layer_weights = {
            path.replace("/", "."): path
            for part, names in {
                "self_attention/query": ("kernel", "bias"),
                "self_attention/key": ("kernel", "bias"),
                "self_attention/value": ("kernel", "bias"),
                "self_attention/attention_output": ("kernel", "bias"),
                "ffn/intermediate": ("kernel", "bias"),
                "ffn/output": ("kernel", "bias"),
                "attention_norm": ("gamma", "beta"),
                "ffn_norm": ("gamma", "beta"),
            }.items()
            for path in (f"{part}/{name}" for name in names)
        }

    lm = CausalLM(make_backbone(OwnBackbone))
    lm.export_to_transformers(str(tmp_path))
    loaded = CausalLM.from_preset(str(tmp_path))
    assert type(loaded.backbone) is OwnBackbone
    np.testing.assert_array_equal(outputs_of(loaded), outputs_of(lm))
    # All paths of a plain backbone are in this table, which others rely on.
    paths = {path for entry in Own().entries(lm.backbone) for path in entry.paths}
    assert paths == {weight.path for weight in lm.backbone.weights}


class RingLlama(LlamaBackbone):
    def attention_options(self, layer_index):
        window = 8 if layer_index else None
        return {**super().attention_options(layer_index), "window": window}


class ScaledLlama(LlamaBackbone):
    def transform(self, x, padding_mask):
        return super().transform(2 * x, padding_mask)


@pytest.mark.parametrize(
    "cls, difference",
    [(RingLlama, "transformer_layer_1/self_attention: "), (ScaledLlama, "transform")],
)
def test_what_no_published_architecture_computes_is_not_exported(
    cls, difference, tmp_path
):
    lm = CausalLM(make_backbone(cls, **LLAMA))
    with raises(ValueError, "nothing was written", cls.__name__, difference):
        lm.export_to_transformers(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_trained_updates_are_exported(published, tmp_path):
    lm, folder = published
    tuned = CausalLM.from_preset(str(folder))
    tuned.enable_lora(2)
    for weight in tuned.trainable_weights:
        weight.assign(weight + 0.1)
    tuned.export_to_transformers(str(tmp_path), dtype="float32")
    loaded = CausalLM.from_preset(str(tmp_path))
    assert np.abs(outputs_of(loaded) - outputs_of(lm)).max() > 0.01
    np.testing.assert_allclose(outputs_of(loaded), outputs_of(tuned), atol=1e-5)
