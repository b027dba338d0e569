"""Models of padded tokens: rematerialized, exported, scaled, padded on the left."""

import keras
import numpy as np
import pytest

from attention import Retention, RotaryAttention
from blocks import CausalLM, CustomBackbone, MixtureOfExperts
from tests.helpers import assert_close, raises, run_script, slow

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


class Mixed(CustomBackbone):
    """Has all that computing again could change: seeds, losses of layers, documents."""

    def create_attention_layer(self, inputs_shape, layer_index):
        return Retention(2) if layer_index else RotaryAttention(2, dropout=0.3)

    def create_ffn(self, inputs_shape, layer_index):
        return MixtureOfExperts(16, 4, 2, balance_weight=0.5)


def test_blocks_that_are_computed_again_train_the_same():
    segments = np.array([[1, 1, 2], [1, 1, 0]], "int32")
    x = {**INPUTS, "segment_ids": segments}

    def train(remat):
        keras.utils.set_random_seed(0)
        lm = CausalLM(Mixed(20, 2, 2, 8, 16, dropout=0.3, remat=remat))
        lm.compile(keras.optimizers.SGD(0.5), sampler="greedy")
        history = lm.fit(x, TOKENS, epochs=2, shuffle=False, verbose=0)
        return lm, history.history["loss"]

    (plain, losses), (again, same) = train(None), train("block")
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    for a, b in zip(again.weights, plain.weights, strict=True):
        assert_close(a, b)
    restored = type(again.backbone).from_config(again.backbone.get_config())
    assert restored.remat == "block" and "remat" not in plain.backbone.get_config()
    with raises(ValueError, "`remat` must be 'block' or None", "full"):
        CustomBackbone(20, 1, 2, 8, 16, remat="full")


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


@pytest.mark.slow
@pytest.mark.skipif(keras.config.backend() != "torch", reason="torch's")
def test_two_processes_of_torch_have_the_gradients_of_one(tmp_path):
    script = f"""
        import torch
        from torch.nn.parallel import DistributedDataParallel
        import torch.multiprocessing as processes
        from tests.blocks.test_token_model import make_lm

        def gradients(model, lm, tokens):
            inputs = {{"token_ids": tokens, "padding_mask": torch.ones_like(tokens)}}
            logits = model(inputs).flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, tokens.flatten()).backward()
            return [x.grad for x in lm.parameters()]

        def train(rank):
            torch.manual_seed(rank)
            torch.distributed.init_process_group(
                "gloo", init_method="file://{tmp_path}/found", rank=rank, world_size=2
            )
            tokens = torch.arange(24).reshape(4, 6) % 20
            # Weights are those of the first process.
            lm = make_lm()
            model = DistributedDataParallel(lm)
            found = gradients(model, lm, tokens[rank::2])
            lm.zero_grad()
            expected = gradients(lm, lm, tokens)
            assert len(found) == len(lm.weights)
            for x, y in zip(found, expected):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)

        if __name__ == "__main__":
            processes.start_processes(train, nprocs=2, start_method="fork")
            print("the same")
    """
    result = run_script(script)
    assert result.stdout == "the same\n", result.stderr
