"""What the layer types of Keras and KerasHub say of their parameters.

Keras stores weights out-last, so most rows of the table say ``... i o -> o``. A layer is looked up
along its class hierarchy. KerasHub is only recognised, by the full names of its classes, never
imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import keras

from agc.layer_table import LayerRule, LayerTable, LayerUnits
from agc.plan import WHOLE

__all__ = ["TABLE", "register_units"]


def register_units(layer: type | str, units: LayerRule) -> None:
    """Teach the table a layer type, or change what it says of one.

    Parameters
    ----------
    layer : type of keras.Layer or tf.Module, or str
        The layer's class; its subclasses follow it unless they are registered themselves. A string
        is the full path of a class that need not be imported, ``"package.module.Name"``.
    units : mapping of str to str or Units, or callable
        Variable name (a glob, the first that matches decides) to units; or a function of the layer
        that returns such a mapping, where the units depend on the layer. A variable that matches
        nothing is one unit if it is a vector, is left to the layout convention at rank 2, and has
        to be declared otherwise.

    Raises
    ------
    ParameterError
        If ``units`` is neither a mapping nor callable.
    UnitsError
        If a pattern cannot be parsed.

    Examples
    --------
    >>> import agc, agc_tensorflow
    >>> class Table(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.table = self.add_weight(shape=(2, 3, 4), name="table")
    >>> register_units(Table, {"table": "n h d -> n"})
    >>> layer = Table()
    >>> layer.build((None, 3))
    >>> agc_tensorflow.plan(layer, agc.AGC())["table"].count
    2
    """
    TABLE.register(layer, units)


TABLE: Final = LayerTable({"kernel": "i o -> o"})
"""Everything that is known of layer types."""


# --- Keras ----------------------------------------------------------------------------------------


def _einsum(layer: Any) -> LayerUnits:
    """Units of an einsum layer: the axes of its kernel that appear in the output."""
    inputs, output = layer.equation.replace(" ", "").split("->")
    kernel = inputs.split(",")[1]
    kept = [axis for axis in kernel if axis in output]
    # An equation that sums over no axis of the kernel multiplies by a gain.
    pattern = f"{' '.join(kernel)} -> {' '.join(kept)}" if len(kept) < len(kernel) else WHOLE
    low_rank = f"{' '.join(kernel[:-1])} r_ -> {' '.join([*kept[:-1], 'r_'])}"
    return {
        "kernel": pattern,
        "lora_kernel_a": low_rank if kernel[-1] in output else WHOLE,
        "lora_kernel_b": "r o -> o",
        "bias": WHOLE,
    }


_IO: Final = "i o -> o"
_DENSE: Final = {"kernel": _IO, "lora_kernel_?": _IO}
_CONV: Final = {"kernel": "... i o -> o", "lora_kernel_?": "... i o -> o"}
_TRANSPOSED: Final = {"kernel": "... o i -> o"}
_DEPTHWISE: Final = {"kernel": "... c m -> c m"}
_SEPARABLE: Final = {"depthwise_kernel": "... c m -> c m", "pointwise_kernel": "... i o -> o"}
_EMBEDDING: Final = {
    "embeddings": "v d -> v",
    "reverse_embeddings": "d v -> v",
    "lora_embeddings_a": "v r -> v",
    "lora_embeddings_b": _IO,
}
_RECURRENT: Final = {"kernel": _IO, "recurrent_kernel": _IO}
_CONV_RECURRENT: Final = {"kernel": "... i o -> o", "recurrent_kernel": "... i o -> o"}
_ONE: Final = {"*": WHOLE}
_KERAS: Final[Mapping[str, LayerRule]] = {
    "Dense": _DENSE,
    "EinsumDense": _einsum,
    "Conv1D": _CONV,
    "Conv2D": _CONV,
    "Conv3D": _CONV,
    "Conv1DTranspose": _TRANSPOSED,
    "Conv2DTranspose": _TRANSPOSED,
    "Conv3DTranspose": _TRANSPOSED,
    "DepthwiseConv1D": _DEPTHWISE,
    "DepthwiseConv2D": _DEPTHWISE,
    "SeparableConv1D": _SEPARABLE,
    "SeparableConv2D": _SEPARABLE,
    "Embedding": _EMBEDDING,
    "LSTMCell": _RECURRENT,
    # With reset_after the bias is two vectors, one for the input and one for the state.
    "GRUCell": {**_RECURRENT, "bias": "... o -> ..."},
    "SimpleRNNCell": _RECURRENT,
    "BatchNormalization": _ONE,
    "GroupNormalization": _ONE,
    "LayerNormalization": _ONE,
    "RMSNormalization": _ONE,
    "PReLU": _ONE,
    "Attention": _ONE,
    "AdditiveAttention": _ONE,
}

# --- KerasHub: what is not made of Keras' own layers ----------------------------------------------

_ROWS: Final = "n d -> n"
_BATCHED_ROWS: Final = "one n d -> n"
"""A table of positions or queries with a batch axis: a row each, as in an embedding."""
_EXPERTS: Final = {"expert_feedforward_*": "e i o -> e o"}
_HUB: Final[Mapping[str, LayerRule]] = {
    "layers.modeling.masked_lm_head.MaskedLMHead": {"output_kernel": _IO},
    "layers.modeling.position_embedding.PositionEmbedding": {"embeddings": _ROWS},
    "models.blip2.blip2_qformer.BLIP2QueryTokens": {"query_tokens": _BATCHED_ROWS},
    "models.deberta_v3.relative_embedding.RelativeEmbedding": {"rel_embedding": _ROWS},
    "models.deit.deit_layers.DeiTEmbeddings": {"position_embedding": _BATCHED_ROWS},
    "models.dinov2.dinov2_layers.DINOV2Embedding": {
        "*position_embeddings": _BATCHED_ROWS,
        "register_tokens": _BATCHED_ROWS,
    },
    "models.dinov3.dinov3_layers.DINOV3Embedding": {"register_tokens": _BATCHED_ROWS},
    "models.gemma4.gemma4_audio_encoder.Gemma4AudioRelativePositionEmbedding": {"pos_proj": _IO},
    "models.gemma4.gemma4_moe.Gemma4MoEBlock": {"*_proj": "e i o -> e o"},
    "models.gemma4.gemma4_vision_encoder.Gemma4VisionPatchEmbedder": {
        "position_embedding_table": "a n d -> a n"
    },
    "models.gpt_oss.gpt_oss_decoder.GptOssExperts": {
        "*_bias": "e o -> e",
        "*_proj": "e i o -> e o",
    },
    "models.mixtral.mixtral_decoder.MixtralMoeExperts": _EXPERTS,
    "models.parseq.parseq_decoder.PARSeqDecoder": {"pos_query_embeddings": _BATCHED_ROWS},
    "models.qwen_moe.qwen_moe_decoder.QwenMoeExperts": _EXPERTS,
    "models.qwen3_moe.qwen3_moe_decoder.Qwen3MoeExperts": _EXPERTS,
    "models.qwen3_5_moe.qwen3_5_moe_decoder.Qwen3_5MoeExperts": _EXPERTS,
    "models.qwen3_5.qwen3_5_gated_delta_net.Qwen3_5GatedDeltaNet": {"conv1d_kernel": "c k -> c"},
    "models.rwkv7.rwkv7_layer.RWKV7TimeMix": {"r_k": "h n -> h", "[wagv][12]": _IO},
    "models.sam3.sam3_layers.SAM3Embedding": {"tiled_position_embeddings": _BATCHED_ROWS},
    # Biases of attention by distance: a row is what is looked up, with one number for each head.
    "models.swin_transformer.swin_transformer_layers.WindowAttention": {
        "relative_position_bias_table": "n h -> n"
    },
    "models.t5.t5_multi_head_attention.T5MultiHeadAttention": {"embeddings": "n h -> n"},
    "models.video_prism.video_prism_layers.VideoPrismAttenTokenPoolingLayer": {
        "pooling_attention_query": _ROWS
    },
    "models.vit_det.vit_layers.AddPositionalEmbedding": {"pos_embed": "one h w d -> h w"},
    "models.vit_det.vit_layers.AddRelativePositionalEmbedding": {"rel_pos_?": _ROWS},
    "models.xlnet.xlnet_encoder.XLNetEncoder": {
        "*_attention_bias": WHOLE,
        "segment_encoding": "n h d -> n h",
    },
}

for _name, _rule in _KERAS.items():
    if hasattr(keras.layers, _name):  # a layer that an older Keras lacks
        register_units(getattr(keras.layers, _name), _rule)
# The cell of ConvLSTM1D to ConvLSTM3D is not public.
register_units("keras.src.layers.rnn.conv_lstm.ConvLSTMCell", _CONV_RECURRENT)
for _name, _rule in _HUB.items():
    register_units(f"keras_hub.src.{_name}", _rule)
