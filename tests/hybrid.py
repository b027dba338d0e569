"""A model with a state that can't be undone."""

from attention import MultiHeadAttention
from blocks import CustomBackbone
from tests.planted_faults import Leak


class HybridBackbone(CustomBackbone):
    """A recurrent layer below attention."""

    def create_attention_layer(self, inputs_shape, layer_index):
        return Leak() if layer_index == 0 else MultiHeadAttention(self.num_heads)
