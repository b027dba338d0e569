"""Presets and `.keras` files: what is saved comes back, or it is said why not."""

import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest

from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone
from tests.helpers import assert_close, raises
from tests.models import (
    PACKAGE,
    RAGGED,
    MixerBackbone,
    bpe_preprocessor,
    generated,
    make_backbone,
    make_lm,
    make_variant,
    prompts,
    to_numpy,
)

pytestmark = pytest.mark.same_everywhere


def check_same_logits(restored, lm):
    x = prompts(RAGGED)
    assert_close(restored(x), lm(x))


@pytest.fixture(scope="module")
def text_lm():
    """A user's backbone with a BPE tokenizer."""
    backbone = make_variant("rotary", num_layers=1, num_key_value_heads=2)
    return make_lm(backbone, bpe_preprocessor())


@pytest.fixture(scope="module")
def preset(text_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets") / "rotary"
    text_lm.save_to_preset(str(folder))
    return str(folder)


# === Round trips ===


@pytest.mark.parametrize("make", [make_backbone, lambda: make_variant("t5")])
def test_backbones_come_back(make, tmp_path):
    lm = make_lm(make())
    lm.save_to_preset(str(tmp_path))
    # The folder may be given as a path, too.
    for folder in (str(tmp_path), tmp_path):
        restored = CausalLM.from_preset(folder)
        assert type(restored) is CausalLM
        assert type(restored.backbone) is type(lm.backbone)
        assert restored.preprocessor is None
        assert restored.backbone.get_config() == lm.backbone.get_config()
        check_same_logits(restored, lm)


def test_a_users_backbone_and_its_tokenizer_come_back(text_lm, preset):
    restored = CausalLM.from_preset(preset)
    assert type(restored.backbone) is MixerBackbone
    assert restored.backbone.num_key_value_heads == 2
    check_same_logits(restored, text_lm)
    preprocessor = restored.preprocessor
    assert preprocessor.get_config() == text_lm.preprocessor.get_config()
    assert (preprocessor.start_token_id, preprocessor.end_token_id) == (1, 2)
    restored.compile(sampler="greedy")
    texts = ["the cat", "a", "the </s>"]
    assert restored.generate(texts) == text_lm.generate(texts)


FRESH = """
import sys, keras
sys.path.insert(0, sys.argv[1])
import tests.models
from blocks import CausalLM
lm = CausalLM.from_preset(sys.argv[2])
lm.compile(sampler="greedy")
print("RESULT" + repr(lm.generate(["the cat", "a"])))
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_text(text_lm, preset):
    root = str(pathlib.Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", FRESH, root, preset],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    printed = result.stdout.split("RESULT")[1].strip()
    assert printed == repr(text_lm.generate(["the cat", "a"]))


@keras.saving.register_keras_serializable(package=PACKAGE)
class SoftCappedLM(CausalLM):
    """A user's model: a head with weights and an argument of its own."""

    def __init__(self, backbone, preprocessor=None, cap=5.0, **kwargs):
        self.cap = cap
        self.head = keras.layers.Dense(backbone.vocabulary_size, name="head")
        super().__init__(backbone, preprocessor, **kwargs)

    def compute_logits(self, hidden_states):
        return self.cap * keras.ops.tanh(self.head(hidden_states) / self.cap)

    def get_config(self):
        return {**super().get_config(), "cap": self.cap}


@keras.saving.register_keras_serializable(package=PACKAGE)
class FixedBackbone(CustomBackbone):
    """A user's backbone that fixes an argument of its base, and saves no config."""

    def __init__(self, **kwargs):
        super().__init__(layer_norm_epsilon=1e-6, **kwargs)


def test_a_users_model_comes_back(tmp_path):
    lm = SoftCappedLM(make_backbone(FixedBackbone, num_layers=1), cap=2.0)
    lm.compile(sampler="greedy")
    lm.save_to_preset(str(tmp_path))
    for cls in (CausalLM, SoftCappedLM):
        restored = cls.from_preset(str(tmp_path))
        assert type(restored) is SoftCappedLM
        assert restored.cap == 2.0
        assert restored.backbone.get_config() == lm.backbone.get_config()
        check_same_logits(restored, lm)
    assert np.abs(to_numpy(restored(prompts(RAGGED)))).max() <= 2.0
    assert SoftCappedLM.from_preset(str(tmp_path), cap=3.0).cap == 3.0
    assert [len(row) for row in generated(restored, max_length=9)] == [9] * 3


def test_a_preset_of_another_class(preset):
    with pytest.raises(ValueError, match=r"holds a CausalLM.*no SoftCappedLM"):
        SoftCappedLM.from_preset(preset)


def test_quantized_presets(tmp_path):
    lm = make_lm(make_backbone(num_layers=1), bpe_preprocessor())
    # Before its tokenizer has seen any text, which is no part of the model.
    lm.quantize("int8")
    lm.save_to_preset(str(tmp_path))
    # Some models are made in between, whose layers must not take the names.
    make_backbone()
    restored = CausalLM.from_preset(str(tmp_path))
    kinds = {w.path: w.dtype for w in lm.backbone.weights}
    assert "int8" in kinds.values()
    assert {w.path: w.dtype for w in restored.backbone.weights} == kinds
    assert_close(*(x.predict_on_batch(["the cat", "a"]) for x in (restored, lm)))


@pytest.mark.slow
def test_dtype_on_loading(text_lm, preset):
    restored = CausalLM.from_preset(preset, dtype="bfloat16")
    assert restored.backbone.transformer_layers[0].compute_dtype == "bfloat16"
    assert {w.dtype for w in restored.weights if "seed" not in w.path} == {"bfloat16"}
    x = prompts(RAGGED)
    assert_close(keras.ops.cast(restored(x), "float32"), text_lm(x), atol=0.5)
    assert keras.config.dtype_policy().name == "float32"


def test_parts_that_are_not_loaded(text_lm, preset):
    restored = CausalLM.from_preset(preset, load_weights=False)
    x = prompts(RAGGED)
    assert np.abs(to_numpy(restored(x)) - to_numpy(text_lm(x))).max() > 0.1
    assert CausalLM.from_preset(preset, preprocessor=None).preprocessor is None
    other = bpe_preprocessor(sequence_length=5)
    assert CausalLM.from_preset(preset, preprocessor=other).preprocessor is other


@pytest.mark.slow
def test_keras_files(tmp_path):
    backbone = make_variant("rotary", num_layers=1, num_key_value_heads=2)
    lm = make_lm(backbone, bpe_preprocessor())
    lm.compile(
        optimizer=keras.optimizers.Adam(0.125),
        sampler=keras_hub.samplers.TopKSampler(k=3, seed=11, temperature=0.7),
    )
    lm.fit(["the cat", "the dog"], verbose=0)
    lm.save(tmp_path / "lm.keras")
    restored = keras.models.load_model(tmp_path / "lm.keras")
    assert type(restored) is CausalLM
    assert type(restored.backbone) is MixerBackbone
    check_same_logits(restored, lm)
    assert type(restored.sampler) is keras_hub.samplers.TopKSampler
    sampler = restored.sampler
    assert (sampler.k, sampler.seed, sampler.temperature) == (3, 11, 0.7)
    assert float(to_numpy(restored.optimizer.learning_rate)) == 0.125
    assert int(to_numpy(restored.optimizer.iterations)) == 1
    restored.compile(sampler="greedy")
    lm.compile(sampler="greedy")
    assert restored.generate(["the cat"]) == lm.generate(["the cat"])


# === Folders with errors ===


def copy_of(preset, tmp_path):
    return pathlib.Path(shutil.copytree(preset, tmp_path / "copy"))


def test_a_folder_that_is_missing(tmp_path):
    for preset, kind, *words in (
        (str(tmp_path / "nothing"), ValueError, "no preset folder", "save_to_preset"),
        (None, TypeError, "`preset` must be a folder"),
        (str(tmp_path), ValueError, "has no config.json"),
    ):
        with raises(kind, *words):
            CausalLM.from_preset(preset)


FILES = [
    "config.json",
    "task.json",
    "preprocessor.json",
    "model.weights.h5",
    "vocabulary.json",
]


@pytest.mark.parametrize(
    ("name", "kept"),
    [("merges.txt", None), *itertools.product(FILES, [None, 0.0, 0.5])],
)
def test_a_file_that_is_missing_or_truncated(preset, tmp_path, name, kept):
    folder = copy_of(preset, tmp_path)
    (path,) = folder.rglob(name)
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[: int(len(content) * kept)])
    with raises(ValueError, "Save ", " again", str(folder)):
        CausalLM.from_preset(str(folder))


def test_weights_of_another_model(preset, tmp_path):
    folder = copy_of(preset, tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["config"]["intermediate_dim"] = 48
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        CausalLM.from_preset(str(folder))
    layer = "transformer_layer_0/ffn"
    assert str(error.value).split(":\n")[1].split("\n") == [
        f"{layer}/intermediate/kernel: (16, 32) in the file, (16, 48) in the model",
        f"{layer}/intermediate/bias: (32,) in the file, (48,) in the model",
        f"{layer}/output/kernel: (32, 16) in the file, (48, 16) in the model",
    ]
    config["config"].update(intermediate_dim=32, num_layers=2)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="could not be loaded"):
        CausalLM.from_preset(str(folder))


class UnregisteredBackbone(CustomBackbone):
    pass


class UnregisteredLM(CausalLM):
    pass


class UnregisteredTokenizer(keras_hub.tokenizers.ByteTokenizer):
    pass


@pytest.mark.parametrize("part", ["backbone", "backbone alone", "task", "tokenizer"])
def test_a_class_that_is_not_registered_on_saving(tmp_path, part):
    cls = UnregisteredBackbone if "backbone" in part else CustomBackbone
    lm_cls = UnregisteredLM if part == "task" else CausalLM
    preprocessor = None
    if part == "tokenizer":
        preprocessor = CausalLMPreprocessor(UnregisteredTokenizer(), 8, end_token=1)
    lm = lm_cls(make_backbone(cls, num_layers=1, vocabulary_size=256), preprocessor)
    saved, folder = lm.backbone if "alone" in part else lm, tmp_path / "preset"
    words = ("Unregistered", "not registered with Keras", "register_keras_serializable")
    with raises(ValueError, *words):
        saved.save_to_preset(str(folder))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("config.json", []),
        ("task.json", []),
        ("preprocessor.json", []),
        ("preprocessor.json", ["config", "tokenizer"]),
    ],
)
def test_a_part_that_is_not_registered_on_loading(preset, tmp_path, name, keys):
    path = copy_of(preset, tmp_path) / name
    config = json.loads(path.read_text())
    part = config
    for key in keys:
        part = part[key]
    part.update(registered_name="somewhere>Else", class_name="Else")
    path.write_text(json.dumps(config))
    words = [] if keys else ["holds a Else, which is"]
    with raises(ValueError, "not registered", *words):
        CausalLM.from_preset(str(path.parent))
