"""Tasks on encoder backbones: texts in, training, presets and folders of others."""

import json
import warnings

import keras
import keras_hub
import numpy as np
import pytest
import tokenizers

from attention.contract import axes_of_weights
from blocks import (
    CausalLM,
    CustomBackbone,
    CustomEncoderBackbone,
    JsonTokenizer,
    MaskedLM,
    TextClassifier,
    TextEmbedder,
    TokenClassifier,
)
from blocks.models.bert import Bert
from blocks.models.roberta import RobertaBackbone
from tests.helpers import assert_close, raises, randomize, to_numpy
from tests.made_tokenizers import byte_level, word_piece

TEXTS = ["The if statement", "a class is a class", "import it", "if it is not the"] * 2
PAIR = (["The if statement", "import it"], ["a class", "if it is not"])
SIZES = {
    "vocabulary_size": 300,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "max_sequence_length": 24,
}
KINDS = {
    "masked_lm": (MaskedLM, {}),
    "text_classifier": (TextClassifier, {"num_classes": 3, "pooling": "mean"}),
    "token_classifier": (TokenClassifier, {"num_classes": 3}),
    "text_embedder": (TextEmbedder, {"pooling": "cls", "normalize": False}),
}


def make_tokenizer():
    return JsonTokenizer(word_piece(), pad_token="[PAD]", mask_token="[MASK]")


def make(kind, text=True, **kwargs):
    cls, options = KINDS[kind]
    preprocessor = None
    if text:
        preprocessor = cls.preprocessor_classes[1](make_tokenizer(), sequence_length=16)
    return cls(
        CustomEncoderBackbone(**{**SIZES, **kwargs}),
        preprocessor=preprocessor,
        **options,
    )


def tokens_of(texts):
    """Tokens as the `tokenizers` package makes them, padded."""
    found = make_tokenizer().backend
    found.enable_padding(length=16)
    found.enable_truncation(16)
    encoded = found.encode_batch(texts)
    return {
        "token_ids": np.array([x.ids for x in encoded]),
        "padding_mask": np.array([x.attention_mask for x in encoded]),
        "token_type_ids": np.array([x.type_ids for x in encoded]),
    }


def test_a_tokenizer_that_knows_padding_and_masks():
    tokenizer = make_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert tokenizer.special_token_ids == [0, 1, 2, 3, 4]
    assert (tokenizer.num_separators, JsonTokenizer(byte_level()).num_separators) == (
        1,
        0,
    )
    config = tokenizer.get_config()
    assert (config["pad_token"], config["mask_token"]) == ("[PAD]", "[MASK]")
    assert "pad_token" not in JsonTokenizer(word_piece()).get_config()
    with raises(ValueError, "<mask>"):
        JsonTokenizer(word_piece(), mask_token="<mask>")


@pytest.mark.parametrize("texts", [TEXTS, PAIR], ids=["texts", "pairs"])
def test_texts_become_what_the_tokenizer_says(texts):
    task = make("text_classifier")
    x = task.preprocess_samples(texts)
    rows = list(zip(*texts)) if isinstance(texts, tuple) else texts
    for name, expected in tokens_of(rows).items():
        assert np.array_equal(to_numpy(x[name]), expected), name
    one_type = make("text_classifier", num_token_types=1)
    assert "token_type_ids" not in one_type.preprocess_samples(texts)
    # And as in `predict`, in a graph of TensorFlow.
    assert_close(task.predict(texts, verbose=0), task(x))


def test_masked_lm_learns_texts():
    lm = randomize(make("masked_lm", dropout=0.1), scale=0.1)
    lm.compile(keras.optimizers.Adam(0.02))
    history = lm.fit(TEXTS * 20, batch_size=8, epochs=2, verbose=0).history
    assert history["loss"][-1] < 0.8 * history["loss"][0], history["loss"]
    # Masks are other ones each time, and special tokens are never masked.
    x, y, weights = lm.preprocessor(TEXTS)
    positions, weights = to_numpy(x["mask_positions"]), to_numpy(weights)
    tokens = tokens_of(TEXTS)["token_ids"]
    there = np.take_along_axis(tokens, positions, axis=1)
    assert weights.sum() > 0
    assert np.array_equal(there[weights > 0], to_numpy(y)[weights > 0])
    assert (there[weights > 0] > 4).all()
    without = lm.evaluate(TEXTS, sample_weight=np.zeros(8), verbose=0)
    assert without[0] == 0


def test_masked_positions_are_those_of_the_whole_row():
    lm = randomize(make("masked_lm", text=False))
    x = tokens_of(TEXTS[:3])
    every = np.tile(np.arange(16), (3, 1))
    whole = to_numpy(lm({**x, "mask_positions": every}))
    some = np.array([[3, 1], [2, 2], [0, 5]])
    found = lm({**x, "mask_positions": some})
    assert_close(found, np.take_along_axis(whole, some[..., None], axis=1))


def test_the_loss_of_masked_tokens_is_their_mean():
    lm = randomize(make("masked_lm", text=False))
    positions, y = np.array([[3, 1], [2, 4]]), np.array([[5, 6], [7, 8]])
    weights = np.array([[1.0, 1.0], [1.0, 0.0]])
    logits = to_numpy(lm({**tokens_of(TEXTS[:2]), "mask_positions": positions}))
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logs, y[..., None], -1)[..., 0]
    for more in (0, 5):
        places, goals, counts = (
            np.pad(x, ((0, 0), (0, more))) for x in (positions, y, weights)
        )
        x = {**tokens_of(TEXTS[:2]), "mask_positions": places}
        loss, _ = lm.evaluate(x, goals, sample_weight=counts, verbose=0)
        assert_close(loss, -(chosen * weights).sum() / 3, atol=1e-5)


@pytest.mark.parametrize(
    "pooling", [pytest.param("cls", marks=pytest.mark.slow), "mean"]
)
def test_text_classifier_learns(pooling):
    keras.utils.set_random_seed(1)
    preprocessor = make("text_classifier").preprocessor
    backbone = CustomEncoderBackbone(**SIZES)
    options = {"pooling": pooling, "dropout": 0.0}
    task = randomize(TextClassifier(backbone, 4, preprocessor, **options))
    task.compile(keras.optimizers.Adam(0.01, global_clipnorm=1.0))
    labels = np.array([0, 1, 2, 3] * 2)
    # One epoch, as the text is tokenized anew in each.
    history = task.fit(
        TEXTS * 60,
        np.tile(labels, 60),
        batch_size=4,
        validation_data=(TEXTS, labels),
        verbose=0,
    ).history
    assert history["val_sparse_categorical_accuracy"][-1] == 1, history
    assert task.predict(TEXTS, verbose=0).argmax(axis=1).tolist() == labels.tolist()
    half = task.fit(TEXTS, labels, validation_split=0.5, epochs=1, verbose=0)
    assert "val_loss" in half.history


def test_token_classifier_learns_labels_only():
    task = make("token_classifier", text=False)
    task.compile(keras.optimizers.Adam(0.03))
    x = tokens_of(TEXTS)
    known = x["token_ids"] > 4
    labels = np.where(known, x["token_ids"] % 3, -100)
    history = task.fit(x, labels, epochs=25, batch_size=4, verbose=0).history
    assert history["accuracy"][-1] > 0.9, history
    logits = to_numpy(task(x)).astype("float64")
    loss, accuracy = task.evaluate(x, labels, verbose=0)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    of_labels = np.take_along_axis(log_p, (labels % 3)[..., None], axis=-1)[..., 0]
    assert abs(loss + of_labels[known].mean()) < 1e-3
    right = (logits.argmax(axis=-1) == labels)[known].mean()
    assert abs(accuracy - right) < 1e-5


@pytest.mark.slow
def test_embedder_learns_and_poolings_are_what_they_say():
    backbone = randomize(CustomEncoderBackbone(**SIZES))
    preprocessor = make("text_embedder").preprocessor
    x = tokens_of(TEXTS)
    hidden = to_numpy(backbone(x))
    mask = x["padding_mask"][..., None]
    expected = {"cls": hidden[:, 0], "mean": (hidden * mask).sum(1) / mask.sum(1)}
    for pooling, vectors in expected.items():
        embedder = TextEmbedder(backbone, preprocessor, pooling, normalize=False)
        assert_close(embedder.embed(TEXTS, batch_size=3), vectors)
        assert_close(embedder.embed(TEXTS[1]), vectors[1])
        assert embedder.embed([]).shape == (0, 16)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        assert_close(TextEmbedder(backbone, preprocessor, pooling).embed(TEXTS), unit)
    embedder.compile("adam", "mse")
    targets = np.eye(16)[np.arange(8) % 4]
    losses = embedder.fit(TEXTS, targets, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_presets(kind, tmp_path):
    task = randomize(make(kind))
    folder = str(tmp_path)
    task.save_to_preset(folder)
    cls, options = KINDS[kind]
    restored = cls.from_preset(folder)
    assert type(restored) is cls
    assert options.items() <= restored.get_config().items()
    restored.preprocessor.tokenizer.tokenize("ready")
    if kind == "masked_lm":
        x = {**tokens_of(TEXTS), "mask_positions": np.ones((8, 2), "int32")}
        assert_close(restored(x), task(x))
    else:
        assert_close(*(y.predict(TEXTS, verbose=0) for y in (restored, task)))
    untrained = cls.from_preset(folder, load_weights=False, preprocessor=None)
    assert untrained.preprocessor is None
    # Another task has the same backbone and tokenizer, and a new head.
    other, options = KINDS[
        "masked_lm" if kind == "text_classifier" else "text_classifier"
    ]
    with pytest.warns(UserWarning, match=f"holds a {cls.__name__}.*{other.__name__}'s"):
        made = other.from_preset(folder, **options)
    x = tokens_of(TEXTS)
    assert_close(made.backbone(x), task.backbone(x))
    assert type(made.preprocessor) is other.preprocessor_classes[1]
    assert made.preprocessor.sequence_length == 16
    assert np.isfinite(made.fit(TEXTS, [0] * 8, verbose=0).history["loss"][0])
    with raises(ValueError, f"holds a {cls.__name__}", "no CausalLM"):
        CausalLM.from_preset(folder)


def test_training_goes_on_from_a_file(tmp_path):
    task = make("text_classifier", text=False)
    task.compile(keras.optimizers.Adam(0.01))
    x, y = tokens_of(TEXTS), np.arange(8) % 3
    task.fit(x, y, verbose=0)
    task.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    for found, expected in zip(loaded.optimizer.variables, task.optimizer.variables):
        assert_close(found, expected)
    assert len(loaded.optimizer.variables) > 2


@pytest.mark.slow
def test_folders_of_others_with_their_tokenizers(tmp_path):
    task = randomize(make("text_embedder"))
    task.export_to_transformers(str(tmp_path))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    restored = TextEmbedder.from_preset(str(tmp_path))
    assert (restored.pooling, restored.normalize) == ("cls", False)
    assert restored.preprocessor.sequence_length == 9
    restored.preprocessor.sequence_length = 16
    assert_close(restored.embed(TEXTS), task.embed(TEXTS))
    lm = MaskedLM.from_preset(str(tmp_path), load_weights=False)
    assert lm.preprocessor.tokenizer.mask_token_id == 4
    assert np.isfinite(lm.fit(TEXTS, verbose=0).history["loss"][0])
    (tmp_path / "tokenizer.json").unlink()
    assert TextEmbedder.from_preset(str(tmp_path)).preprocessor is None


@pytest.mark.parametrize("cls", [TextClassifier, MaskedLM])
def test_two_tokens_between_the_texts_of_a_pair(cls, tmp_path):
    """As in RoBERTa."""
    made = tokenizers.Tokenizer.from_str(byte_level())
    ends = [(x, made.token_to_id(x)) for x in ("<s>", "<|end|>")]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A <|end|>", "<s> $A <|end|> <|end|> $B <|end|>", ends
    )
    backbone = RobertaBackbone(**{**SIZES, "vocabulary_size": 600}, num_token_types=1)
    TextEmbedder(backbone).export_to_transformers(str(tmp_path))
    made.save(str(tmp_path / "tokenizer.json"))
    tokens = {"pad_token": {"content": "<pad>"}, "mask_token": "<|end|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = cls.from_preset(str(tmp_path))
    task.preprocessor.mask_selection_rate = 0.0
    data = task.preprocess_samples(PAIR)
    x = keras.utils.unpack_x_y_sample_weight(data)[0]
    assert set(x) == set(task.input)
    for i, pair in enumerate(zip(*PAIR)):
        expected = made.encode(*pair).ids
        row = to_numpy(x["token_ids"])[i]
        assert row[: len(expected)].tolist() == expected
        assert (row[len(expected) :] == made.token_to_id("<pad>")).all()
        assert to_numpy(x["padding_mask"])[i].sum() == len(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_declare_their_axes(kind):
    axes_of_weights(make(kind))


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return self.batches[i]


def loader_of(batches):
    return pytest.importorskip("torch").utils.data.DataLoader(batches, batch_size=None)


@pytest.mark.parametrize("kind", [Batches, loader_of, iter])
@pytest.mark.parametrize("text", [True, False])
def test_batches_of_any_kind(kind, text):
    x, labels = tokens_of(TEXTS), np.arange(8) % 3
    preprocessor = make("text_classifier").preprocessor
    task = TextClassifier(CustomEncoderBackbone(**SIZES), 3, preprocessor, dropout=0.0)
    task.compile("sgd", run_eagerly=True)
    batches = []
    for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):
        some = TEXTS[rows] if text else {k: v[rows] for k, v in x.items()}
        batches.append((some, labels[rows]))
    expected = task.evaluate(x, labels, verbose=0)
    assert_close(task.evaluate(kind(batches), verbose=0), expected)
    assert_close(task.predict(kind(batches), verbose=0), task.predict(x, verbose=0))
    other = keras.models.clone_model(task)
    other.set_weights(task.get_weights())
    other.compile("sgd", run_eagerly=True)
    options = {"shuffle": False, "verbose": 0}
    task.fit(kind(batches), validation_data=kind(batches), **options)
    other.fit(x, labels, batch_size=3, validation_data=(x, labels), **options)
    for name, values in task.history.history.items():
        assert_close(values, other.history.history[name], atol=1e-5)
    for a, b in zip(task.weights, other.weights, strict=True):
        assert_close(a, b, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_training():
    task = make("text_embedder")
    task.compile("sgd", "mse")
    with raises(FloatingPointError, "The loss is nan at step 1 of epoch 1"):
        task.fit(TEXTS, np.full((8, 16), np.nan), epochs=2, verbose=0)


def test_dtypes():
    task = make("masked_lm", dtype="mixed_bfloat16")
    x = {**tokens_of(TEXTS), "mask_positions": np.ones((8, 2), "int32")}
    assert keras.backend.standardize_dtype(task(x).dtype) == "bfloat16"
    embedder = make("text_embedder", dtype="bfloat16")
    assert embedder.predict(TEXTS, verbose=0).dtype == "float32"


def test_errors(tmp_path):
    decoder = CustomBackbone(50, 1, 2, 16, 32)
    for cls, options in KINDS.values():
        with raises(TypeError, "`backbone`", "CustomEncoderBackbone", "CustomBackbone"):
            cls(decoder, **options)
    with raises(ValueError, "`pooling`", "'max'"):
        TextEmbedder(CustomEncoderBackbone(**SIZES), pooling="max")
    with raises(ValueError, "`num_classes`"):
        TextClassifier(CustomEncoderBackbone(**SIZES), num_classes=0)
    with raises(ValueError, "needs a preprocessor"):
        make("text_embedder", text=False).embed("a")
    for call in (lambda x: make("masked_lm").fit(x), make("text_embedder").predict):
        with raises(TypeError, "`x` must be a list of strings", "'a'"):
            call("a")
    with raises(TypeError, "`texts`"):
        make("text_embedder").embed([1])
    with raises(ValueError, "'mean'", "Nothing was written"):
        make("text_classifier").export_to_transformers(str(tmp_path / "none"))

    class OwnHead(CustomEncoderBackbone):
        def create_head_transform(self, task):
            return keras.layers.Dense(16) if task == "masked_lm" else "dense"

    with raises(ValueError, "`OwnHead.create_head_transform`", "Nothing was written"):
        MaskedLM(OwnHead(**SIZES)).export_to_transformers(str(tmp_path / "none"))
    with raises(TypeError, "`OwnHead.create_head_transform`", "dense"):
        TextClassifier(OwnHead(**SIZES), 2)
    assert not (tmp_path / "none").exists()


def test_tasks_are_those_of_kerashub_and_of_the_tables():
    for kind, (cls, _) in KINDS.items():
        base = "TextClassifier" if "classifier" in kind else cls.__name__
        assert issubclass(cls, getattr(keras_hub.models, base))
        assert cls.task in Bert.classes
