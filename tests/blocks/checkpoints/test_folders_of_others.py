"""Folders as a whole: tokenizers that are exported, and what handles download."""

import json
import pathlib
import shutil

import keras
import numpy as np
import pytest

import attention
from blocks import (
    CausalLM,
    CausalLMPreprocessor,
    CustomDecoder,
    GatedFeedForward,
    JsonTokenizer,
)
from blocks.checkpoints import hugging_face
from blocks.models.gemma2 import Gemma2Backbone
from blocks.models.gemma3_text import Gemma3TextBackbone
from blocks.models.gpt_oss import GptOssBackbone
from blocks.models.llama import LlamaBackbone
from blocks.models.mamba2 import Mamba2Backbone
from tests.helpers import raises, to_numpy
from tests.made_tokenizers import HARD_TEXTS, byte_level, metaspace
from tests.models import make_backbone, prompts, randomize

pytest.importorskip("safetensors")
from safetensors.numpy import load_file

pytestmark = pytest.mark.same_everywhere

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": "Größe? 你好 🤖"}]


def llama(preprocessor=None, cls=LlamaBackbone):
    arguments = {"vocabulary_size": 600, "num_layers": 1, "learned_positions": False}
    return CausalLM(make_backbone(cls, **arguments), preprocessor)


# === Exported weights ===


@pytest.mark.parametrize("sizes", [(9000, 10**9), (10**9, 9000), (9000, 20000)])
def test_an_export_replaces_the_weights_that_were_there(sizes, tmp_path, monkeypatch):
    (tmp_path / "other.safetensors").write_bytes(b"")
    x = prompts([[1, 2, 3, 4], [5, 6]])
    for seed, size in enumerate(sizes):
        lm = llama()
        randomize(lm, seed)
        monkeypatch.setattr(hugging_face, "_SHARD_BYTES", size)
        lm.export_to_transformers(str(tmp_path))
        loaded = CausalLM.from_preset(str(tmp_path))
        np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(lm(x)))
    named, index = {"model.safetensors"}, tmp_path / "model.safetensors.index.json"
    if index.exists():
        named = {*json.loads(index.read_text("utf-8"))["weight_map"].values()}
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == {*named, "other.safetensors"}
    assert (len(named) > 1) == (sizes[-1] < 10**9)


# === What is exported ===


def silu(x):
    return keras.ops.relu(x) ** 2


class OwnActivation(LlamaBackbone):
    def create_ffn(self, inputs_shape, layer_index):
        return GatedFeedForward(self.intermediate_dim, silu)


class RotaryAttention(attention.RotaryAttention):
    def call(self, x, *args, **kwargs):
        return super().call(2 * x, *args, **kwargs)


class NamesakeAttention(LlamaBackbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        return RotaryAttention(**self.attention_options(layer_index))


class DoubledMamba2(attention.Mamba2):
    def call(self, x, *args, **kwargs):
        return super().call(2 * x, *args, **kwargs)


class OwnMamba2(Mamba2Backbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        config = super().create_attention_layer(inputs_shape, layer_index).get_config()
        return DoubledMamba2(**config)


class Capped(CausalLM):
    def compute_logits(self, hidden_states):
        return keras.ops.tanh(super().compute_logits(hidden_states))


@pytest.mark.parametrize(
    "cls, task, difference",
    [
        (OwnActivation, CausalLM, "transformer_layer_0/ffn: activation="),
        (NamesakeAttention, CausalLM, "transformer_layer_0/self_attention: class="),
        (OwnMamba2, CausalLM, "transformer_layer_0/self_attention: class="),
        (LlamaBackbone, Capped, "the task: compute_logits="),
    ],
)
def test_other_code_under_a_known_name_is_not_exported(cls, task, difference, tmp_path):
    changes = {} if cls is OwnMamba2 else {"num_key_value_heads": 2}
    lm = task(make_backbone(cls, **changes))
    with raises(ValueError, "nothing was written", cls.__name__, difference):
        lm.export_to_transformers(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


class SameDecoder(CustomDecoder):
    def create_norm(self, inputs_shape):
        return keras.layers.RMSNormalization(epsilon=1e-5)


class SameLlama(LlamaBackbone):
    decoder_class = SameDecoder


def test_other_hooks_that_make_the_same_are_exported(tmp_path):
    lm = llama(cls=SameLlama)
    lm.export_to_transformers(str(tmp_path))
    loaded = CausalLM.from_preset(str(tmp_path))
    x = prompts([[1, 2, 3, 4], [5, 6]])
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(lm(x)))


@pytest.mark.parametrize("cls", [Gemma2Backbone, Gemma3TextBackbone, GptOssBackbone])
def test_models_without_their_window_are_exported(cls, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    lm = llama(cls=cls)
    lm.export_to_transformers(str(tmp_path))
    assert CausalLM.from_preset(str(tmp_path)).backbone.window is None
    exported = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    ids = np.random.default_rng(0).integers(600, size=(1, 60))
    found = exported(torch.tensor(ids)).logits
    expected = to_numpy(lm(prompts(ids.tolist())))
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_tensors_of_quantized_models_have_the_dtype_of_the_configuration(
    dtype, tmp_path
):
    lm = CausalLM(make_backbone(LlamaBackbone, dtype=dtype))
    lm.quantize("int8")
    lm.export_to_transformers(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["dtype"] == dtype.replace("mixed_bfloat16", "float32")
    tensors = load_file(tmp_path / "model.safetensors")
    assert {x.dtype.name for x in tensors.values()} == {config["dtype"]}


# === Exported tokenizers ===

NAMED = {"default": TEMPLATE, "tool_use": "{{ tools[0].name }}"}
SPECIAL = {"bos_token": "<s>", "eos_token": "<|end|>"}


@pytest.mark.parametrize(
    ("make", "start", "special", "template"),
    [
        (byte_level, "<s>", {**SPECIAL, "pad_token": "<pad>"}, TEMPLATE),
        # One without padding, and one whose texts do not begin with its start token.
        (metaspace, "<s>", {**SPECIAL, "unk_token": "<unk>"}, NAMED),
        (byte_level, None, SPECIAL, None),
    ],
)
def test_tokenizers_come_back(make, start, special, template, tmp_path):
    """From a folder of transformers to another one, by way of a model of ours."""
    transformers = pytest.importorskip("transformers")
    old, new = tmp_path / "old", tmp_path / "new"
    llama().export_to_transformers(str(old))
    path = tmp_path / "tokenizer.json"
    path.write_text(make(start), encoding="utf-8")
    made = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    made.chat_template = template
    made.save_pretrained(old)
    stops = [made.eos_token_id, 9]
    transformers.GenerationConfig(eos_token_id=stops).save_pretrained(old)
    CausalLM.from_preset(str(old)).export_to_transformers(str(new))
    expected, found = map(transformers.AutoTokenizer.from_pretrained, (old, new))
    assert found.special_tokens_map == expected.special_tokens_map
    assert len(found) == len(expected)
    ids = expected(HARD_TEXTS)["input_ids"]
    assert found(HARD_TEXTS)["input_ids"] == ids
    for skipped in (True, False):
        texts = (
            x.batch_decode(ids, skip_special_tokens=skipped) for x in (found, made)
        )
        assert next(texts) == next(texts)
    assert found.chat_template == expected.chat_template
    if template is not None:
        options = {"tokenize": False, "add_generation_prompt": True}
        texts = [x.apply_chat_template(CHAT, **options) for x in (found, expected)]
        assert texts[0] == texts[1] and CHAT[0]["content"] in texts[0]
    assert transformers.GenerationConfig.from_pretrained(new).eos_token_id == stops


# === Handles ===

# What folders on the hub hold, too, and nobody here needs: some of it is code.
OTHERS = [
    "modeling_own.py",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "training_args.bin",
    "optimizer.pt",
    "original/consolidated.00.pth",
    "weights.pkl",
    "weights.pickle",
    "weights.npy",
    "flax_model.msgpack",
    "model.keras",
    "onnx/model.onnx",
    "README.md",
]


@pytest.mark.parametrize("write", ["export_to_transformers", "save_to_preset"])
def test_handles_download_data_only(write, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    tokenizer = JsonTokenizer(byte_level("<s>"))
    preprocessor = CausalLMPreprocessor(
        tokenizer, 8, end_token="<|end|>", chat_template=TEMPLATE
    )
    lm, hub = llama(preprocessor), tmp_path / "hub"
    getattr(lm, write)(str(hub))
    wanted = names_in(hub)
    for name in OTHERS:
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_bytes(b"")
    asked = []

    def snapshot_download(repo_id, *, allow_patterns):
        asked.append(repo_id)
        for name in huggingface_hub.utils.filter_repo_objects(
            names_in(hub), allow_patterns=allow_patterns
        ):
            (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, tmp_path / "local" / name)
        return str(tmp_path / "local")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = CausalLM.from_preset("hf://user/name")
    assert asked == ["user/name"]
    assert names_in(tmp_path / "local") == wanted
    x = prompts([[1, 2, 3, 4], [5, 6]])
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(lm(x)))
    assert loaded.preprocessor.chat_template == TEMPLATE
    assert loaded.preprocessor.tokenizer(HARD_TEXTS) == tokenizer(HARD_TEXTS)


def names_in(folder: pathlib.Path) -> list[str]:
    """Returns the names of files in a folder and in those within it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in files)
