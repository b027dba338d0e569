"""The layers within a layer, however they are kept."""

import collections

import keras

from attention.contract import all_layers

Pair = collections.namedtuple("Pair", ["first", "second"])


def test_layers_are_found_however_they_are_kept():
    class Holder(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.one = keras.layers.Dense(1)
            self.several = [keras.layers.Dense(1), (keras.layers.Dense(1),)]
            self.pair = Pair(keras.layers.Dense(1), keras.Sequential([self.one]))
            self.named = {"x": keras.layers.Dense(1)}

    with keras.RematScope(mode="activations"):
        holder = Holder()
    found = all_layers(holder)
    assert found[0] is holder
    assert sum(isinstance(x, keras.layers.Dense) for x in found) == 5
    assert len({id(x) for x in found}) == len(found)
