"""Models of padded tokens: rematerialized, exported, scaled, padded on the left."""

import keras
import numpy as np
import pytest

from blocks import CausalLM, CustomBackbone
from tests.helpers import assert_close, raises, slow

TOKENS = np.array([[1, 2, 3], [4, 5, 0]], "int32")
INPUTS = {"token_ids": TOKENS, "padding_mask": (TOKENS > 0).astype("int32")}


def trained(lm, weights):
    lm.set_weights(weights)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    lm.compile(optimizer=keras.optimizers.SGD(0.5), loss=loss)
    lm.fit(INPUTS, TOKENS, shuffle=False, verbose=0)
    return lm(INPUTS)


def make_lm():
    return CausalLM(CustomBackbone(20, 1, 2, 8, 16), preprocessor=None)


@pytest.mark.parametrize("mode", ["full", *map(slow, ("activations", None))])
def test_what_is_computed_again_is_the_same(mode):
    plain = make_lm()
    with keras.RematScope(mode=mode):
        again = make_lm()
    weights = plain.get_weights()
    assert_close(trained(again, weights), trained(plain, weights))


class Scaled(CustomBackbone):
    def transform(self, x, padding_mask):
        return super().transform(x * 5.0, padding_mask)


def test_a_backbone_may_scale_its_embeddings():
    scaled, plain = (
        cls(20, 1, 2, 8, 16, learned_positions=False)
        for cls in (Scaled, CustomBackbone)
    )
    first, *others = scaled.get_weights()
    plain.set_weights([5.0 * first, *others])
    assert_close(scaled(INPUTS), plain(INPUTS))


@pytest.mark.parametrize("convert", [np.asarray, keras.ops.convert_to_tensor])
def test_rows_that_are_padded_on_the_left(convert):
    lm = make_lm()
    inputs = {**INPUTS, "padding_mask": convert(INPUTS["padding_mask"][:, ::-1].copy())}
    for model in (lm, lm.backbone):
        with raises(ValueError, "`padding_mask`", "on the right", "(2, 3)"):
            model(inputs)


def test_export(tmp_path):
    lm, folder = make_lm(), str(tmp_path / "exported")
    if keras.config.backend() == "torch":
        with raises(ValueError, "CausalLM.export", "KERAS_BACKEND=tensorflow"):
            lm.export(folder, format="tf_saved_model")
        return
    import tensorflow as tf

    lm.export(folder, format="tf_saved_model", verbose=False)
    exported = tf.saved_model.load(folder)
    assert_close(np.asarray(exported.serve(INPUTS)), lm(INPUTS))
