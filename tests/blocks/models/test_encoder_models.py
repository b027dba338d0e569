"""Published encoders beside transformers, with the same random weights."""

import warnings

import keras
import numpy as np
import pytest
import safetensors.numpy

from attention.contract import axes_of_weights
from attention.testing.backends import compile_call
from blocks import MaskedLM, TextClassifier, TokenClassifier
from blocks.checkpoints.hugging_face import export_backbone, load_backbone
from tests.blocks.models.checks import LENGTHS, VOCABULARY_SIZE
from tests.blocks.models.test_models import randomize
from tests.helpers import to_numpy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ENCODER = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "num_labels": 3,
}
ALBERT = {**ENCODER, "embedding_size": 10}
MODERN = {
    **ENCODER,
    "num_hidden_layers": 4,
    # Windows that are shorter than the rows.
    "local_attention": 6,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES = {
    "Bert": ENCODER,
    "Bert-one_type": {
        **ENCODER,
        "type_vocab_size": 1,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-2,
    },
    "Roberta": {**ENCODER, "type_vocab_size": 1},
    "Roberta-two_types": {**ENCODER, "layer_norm_eps": 1e-2},
    "XLMRoberta": {**ENCODER, "type_vocab_size": 1},
    "Albert": ALBERT,
    "Albert-groups": {
        **ALBERT,
        "num_hidden_layers": 5,
        "num_hidden_groups": 2,
        "hidden_act": "gelu",
    },
    "ModernBert": MODERN,
    "ModernBert-layer_types": {
        **MODERN,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "classifier_pooling": "mean",
        "norm_eps": 1e-2,
        "rope_parameters": {
            "full_attention": {"rope_theta": 50.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 500.0, "rope_type": "default"},
        },
    },
}


def make_reference(name, kind="Model"):
    """Returns a model of transformers with random weights."""
    cls = getattr(transformers, f"{name.split('-')[0]}Config")
    config = cls(**CASES[name])
    config._attn_implementation = "eager"
    reference = getattr(transformers, f"AutoModel{kind.removeprefix('Model')}")
    model = reference.from_config(config).eval()
    randomize(model)
    return model


def rows(types=False):
    """Returns ragged rows, with nothing in the place of padding that counts."""
    rng = np.random.default_rng(0)
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    tokens = rng.integers(3, VOCABULARY_SIZE, mask.shape)
    x = {"token_ids": tokens, "padding_mask": mask}
    if types:
        x["token_type_ids"] = rng.integers(0, 2, mask.shape)
    return {name: value.astype("int32") for name, value in x.items()}


def expected_outputs(reference, x):
    """Returns what transformers computes of each row alone, padded with NaN."""
    outputs = []
    names = {"token_ids": "input_ids", "token_type_ids": "token_type_ids"}
    for i, length in enumerate(LENGTHS):
        row = {
            names[name]: torch.tensor(value[i : i + 1, :length].astype("int64"))
            for name, value in x.items()
            if name in names
        }
        with torch.no_grad():
            outputs.append(reference(**row)[0][0].numpy())
    return outputs


def check(model, reference, x):
    """Checks outputs of tokens, and returns the largest difference."""
    # Eagerly, JAX would compile each operation on its own.
    call = compile_call(model) if keras.config.backend() == "jax" else model
    found = to_numpy(call(x))
    largest = 0.0
    for row, expected in zip(found, expected_outputs(reference, x)):
        assert np.abs(expected).max() > 0.1
        largest = max(largest, np.abs(row[: len(expected)] - expected).max())
    assert largest < 1e-4
    return largest


@pytest.fixture(params=CASES, scope="module")
def models(request, tmp_path_factory):
    """A model of transformers, and our backbone that is loaded from its folder."""
    reference = make_reference(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return reference, load_backbone(str(folder))


def test_hidden_states_of_ragged_rows(models):
    reference, backbone = models
    check(backbone, reference, rows("token_type_ids" in backbone.input))
    axes_of_weights(backbone)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the same everywhere")
def test_the_road_back(models, tmp_path):
    reference, backbone = models
    export_backbone(backbone, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, info = transformers.AutoModel.from_pretrained(
            tmp_path, output_loading_info=True, attn_implementation="eager"
        )
    assert type(exported) is type(reference)
    missing = [name for name in info["missing_keys"] if "pooler" not in name]
    unexpected = [x for x in info["unexpected_keys"] if "decoder" not in x]
    assert not missing and not unexpected and not info["mismatched_keys"]
    check(backbone, exported, rows("token_type_ids" in backbone.input))


TASKS = {
    "ForMaskedLM": MaskedLM,
    "ForSequenceClassification": TextClassifier,
    "ForTokenClassification": TokenClassifier,
}
HEADS = ["Bert", "Roberta-two_types", "Albert", "ModernBert-layer_types"]


def task_inputs(task, kind):
    x = rows("token_type_ids" in task.input)
    if kind == "ForMaskedLM":
        positions = np.arange(max(LENGTHS), dtype="int32")
        x["mask_positions"] = np.tile(positions, (len(LENGTHS), 1))
    return x


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", HEADS)
def test_heads_and_the_road_back(name, kind, tmp_path):
    reference = make_reference(name, kind)
    reference.save_pretrained(tmp_path / "published")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        task = TASKS[kind].from_preset(str(tmp_path / "published"))
    x = task_inputs(task, kind)
    check(task, reference, x)
    if keras.backend.backend() != "torch":
        return
    task.export_to_transformers(str(tmp_path / "written"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, info = type(reference).from_pretrained(
            tmp_path / "written",
            output_loading_info=True,
            attn_implementation="eager",
        )
    assert not any(info.values()), info
    assert exported.config.architectures == [type(reference).__name__]
    check(task, exported, x)


def test_a_head_that_a_checkpoint_lacks_is_drawn(tmp_path):
    reference = make_reference("Bert", "ForMaskedLM")
    reference.save_pretrained(tmp_path / "masked")
    with pytest.warns(UserWarning, match="classifier/kernel.*are drawn"):
        classifier = TextClassifier.from_preset(str(tmp_path / "masked"), num_classes=5)
    assert classifier.predict(rows(True), verbose=0).shape == (3, 5)
    check(classifier.backbone, reference.bert, rows(True))
    # Another number of classes than the published one.
    reference = make_reference("Bert", "ForSequenceClassification")
    reference.save_pretrained(tmp_path / "classes")
    with pytest.warns(UserWarning, match="(?!.*transform)"):
        classifier = TextClassifier.from_preset(
            str(tmp_path / "classes"), num_classes=5
        )
    pooler = to_numpy(classifier.head_transform.kernel).T
    assert np.array_equal(pooler, reference.bert.pooler.dense.weight.detach().numpy())


def test_names_of_the_first_files(tmp_path):
    reference = make_reference("Bert", "ForMaskedLM")
    reference.save_pretrained(tmp_path)
    path = str(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in safetensors.numpy.load_file(path).items()
    }
    assert any(name.endswith("LayerNorm.beta") for name in old)
    old["bert.embeddings.position_ids"] = np.arange(32)[None]
    old["cls.seq_relationship.weight"] = np.ones((2, 24), "float32")
    safetensors.numpy.save_file(old, path)
    task = MaskedLM.from_preset(str(tmp_path))
    check(task, reference, task_inputs(task, "ForMaskedLM"))
