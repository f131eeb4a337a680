"""Measure the units of KerasHub's models.

Is every plan complete, and is every unit what feeds one output?

    pip install keras-hub
    python docs/models/keras.py --out docs/models/keras.json

writes a record and a table beside it. Models are built as small as possible from constructor
arguments; nothing is downloaded. What is right is computed, without the table of layer types: a
layer is run on random inputs, and the first operation that mixes a weight with data is
differentiated. The weights that one number of its result depends on are a unit. A weight of which
one number depends on one element only is

* a gain, if the derivative changes with the data: one unit;
* a bias, if the layer has kernels or gains: one unit by definition (AGC-5), there is nothing to
  compute;
* a table, of positions or of tokens, otherwise: a row is a unit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# This file has the name of a package that it imports, so its folder must not be searched.
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import agc_tensorflow  # noqa: E402
from agc import AGC  # noqa: E402
from agc.errors import AmbiguousUnitsError  # noqa: E402
from agc.files import write_text  # noqa: E402
from agc_tensorflow.units import named_variables, variable_key  # noqa: E402

DRAWS = 3
TRIES = 8
LEGEND = """\
Computed are the units of weights with two axes or more that are longer than 1. Left out are biases of several
axes, which are one unit by definition, and weights that the forward pass does not use."""


@dataclass
class Result:
    """Measurements of one model."""

    parameters: int
    complete: bool
    """Whether the model has a plan without any declared units."""
    sources: dict[str, int] = field(default_factory=dict)
    checked: int = 0
    """Weights with two axes or more that are longer than 1, whose units were computed."""
    wrong: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def measure(model: Any, run: Callable[[], Any]) -> Result:
    """Plan a model, and compute the units of its weights from one run of it."""
    named = named_variables(model)
    try:
        plan = agc_tensorflow.plan(model, AGC())
    except AmbiguousUnitsError as error:
        return Result(len(named), complete=False, unknown=[str(error)])
    result = Result(len(plan), complete=True, sources=dict(Counter(e.source for e in plan)))
    names = {variable_key(variable): name for name, variable in named.items()}
    for layer, arguments in calls(model, run):
        for variable, axes in unit_axes(layer, arguments).items():
            name = names.pop(variable, None)
            if name is None:
                continue
            result.checked += 1
            entry = plan[name]
            kept = {axis for axis in entry.axes.keep if entry.shape[axis] > 1}
            if entry.axes.view != entry.shape or kept != axes:
                result.wrong[name] = (
                    f"{entry.units} of {entry.shape}; computed: axes {sorted(axes)}"
                )
    result.unknown = [name for name in names.values() if is_matrix(named[name])]
    return result


def calls(model: Any, run: Callable[[], Any]) -> list[tuple[Any, tuple[Any, Any]]]:
    """Run a model; return its layers with matrices, each with the arguments of its first call."""
    first_calls: dict[int, tuple[Any, tuple[Any, Any]]] = {}

    def record(layer: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        first_calls.setdefault(id(layer), (layer, (args, kwargs)))
        return call(*args, **kwargs)

    layers = [layer for layer in model._flatten_layers() if any(map(is_matrix, own(layer)))]
    for layer in layers:
        layer.call = partial(record, layer, layer.call)
    run()
    for layer in layers:
        del layer.call
    return list(first_calls.values())


def own(layer: Any) -> list[Any]:
    """Return the variables of a layer itself, without those of the layers inside it."""
    below = {id(v) for child in layer._flatten_layers(include_self=False) for v in child.variables}
    return [variable for variable in layer._trainable_variables if id(variable) not in below]


def is_matrix(variable: Any) -> bool:
    """Tell whether two axes or more are longer than 1."""
    return sum(size > 1 for size in variable.shape) > 1


def unit_axes(layer: Any, arguments: tuple[Any, Any]) -> dict[object, set[int]]:
    """Return the unit axes of each weight of a layer, by the weight's key."""
    flat = tf.nest.flatten(arguments)
    places = [place for place, value in enumerate(flat) if tf.is_tensor(value)]

    def call(*tensors: Any) -> Any:
        given = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        args, kwargs = tf.nest.pack_sequence_as(arguments, given)
        result = tf.nest.flatten(layer.call(*args, **kwargs))
        return [tf.identity(tensor) for tensor in result if tf.is_tensor(tensor)]

    specs = [tf.TensorSpec(flat[place].shape, flat[place].dtype) for place in places]
    function = tf.compat.v1.wrap_function(call, specs)
    known: dict[object, set[int]] = {}
    added: dict[object, set[int]] = {}
    for variable in filter(is_matrix, own(layer)):
        inner = [
            inside
            for outside, inside in function.graph.captures
            if outside is variable.value.handle
        ]
        draws = _draws(function, inner[0], [flat[place] for place in places]) if inner else []
        draws = [draw.reshape(variable.shape) for draw in draws]
        places_of = np.argwhere(np.any([draw != 0 for draw in draws], axis=0)) if draws else []
        if len(places_of) == 0:
            continue
        key, shape = variable_key(variable), variable.shape
        if any((draw != 0).sum() > 1 for draw in draws):
            axes = [axis for axis, size in enumerate(shape) if size > 1]
            known[key] = {axis for axis in axes if len(set(places_of[:, axis])) == 1}
        elif len({float(draw.sum()) for draw in draws}) > 1:
            known[key] = set()  # a gain
        else:
            added[key] = {axis for axis, size in enumerate(shape[:-1]) if size > 1}
    return known or added


def _draws(function: Any, handle: Any, examples: list[Any]) -> list[Any]:
    """Return the derivatives of one number that a weight is mixed into, one per random input."""
    mixed = _mixed(function.graph, handle)
    random = np.random.default_rng(0)
    middle = tuple(size // 2 for size in mixed.shape)
    for place in [middle, *(tuple(random.integers(0, mixed.shape)) for _ in range(TRIES))]:
        with function.graph.as_default():
            gradient = tf.gradients(mixed[place], handle)[0]
            if gradient is None:
                return []
            gradient = tf.convert_to_tensor(gradient)
        gradient_of = function.prune(function.inputs[: len(examples)], gradient)
        draws = [gradient_of(*_random(examples, seed)).numpy() for seed in range(DRAWS)]
        if any(draw.any() for draw in draws):
            return draws
    return []


def _random(examples: list[Any], seed: int) -> Iterator[Any]:
    random = np.random.default_rng(seed)
    for example in examples:
        dtype = tf.as_dtype(example.dtype)
        random_like = random.normal(size=example.shape)
        yield tf.cast(random_like, dtype) if dtype.is_floating else tf.convert_to_tensor(example)


def _mixed(graph: Any, handle: Any) -> Any:
    """Return the result of the first operation that mixes a weight with data.

    If none does, return the result of the last operation on the weight.
    """
    pure, last = {id(handle)}, None
    data = {id(tensor) for tensor in graph.inputs if tensor is not handle}
    for op in graph.get_operations():
        inputs = [id(tensor) for tensor in op.inputs]
        weight, other = any(i in pure for i in inputs), any(i in data for i in inputs)
        if weight and other and op.type in ("ConcatV2", "Pack"):
            return next(tensor for tensor in op.inputs if id(tensor) in pure)
        if weight and (other or op.type == "ResourceGather"):
            (result,) = op.outputs
            after = result.consumers()
            sums = op.type == "Mul" and all(consumer.type == "Sum" for consumer in after)
            return after[0].outputs[0] if sums and after else result
        if weight:
            pure.update(map(id, op.outputs))
            last = op.outputs[0] if op.outputs and op.outputs[0].dtype.is_floating else last
        elif other and op.type != "Shape":
            data.update(map(id, op.outputs))
    return last


# --- The models -----------------------------------------------------------------------------------

TEXT = {
    "vocabulary_size": 11,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}
DECODER = {
    "vocabulary_size": 11,
    "num_layers": 1,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}
IMAGE = (16, 16, 3)
VISION = {"image_shape": IMAGE, "patch_size": 4}
TOWER = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 12}


def models(hub: Any) -> dict[str, Callable[[], Any]]:
    """Return small models of KerasHub by name."""
    m = hub.models
    text = {**TEXT, "embedding_dim": 8, "max_sequence_length": 6}
    patches = {**VISION, "patch_size": (4, 4)}
    clip = __import__("keras_hub.src.models.clip", fromlist=["clip"])
    return {
        "BERT": lambda: m.BertBackbone(**TEXT, max_sequence_length=6),
        "ALBERT": lambda: m.AlbertBackbone(**TEXT, embedding_dim=5, max_sequence_length=6),
        "DeBERTa v3": lambda: m.DebertaV3Backbone(**TEXT, max_sequence_length=6, bucket_size=4),
        "FNet": lambda: m.FNetBackbone(
            **{k: v for k, v in TEXT.items() if k != "num_heads"}, max_sequence_length=6
        ),
        "GPT-2": lambda: m.GPT2Backbone(**TEXT, max_sequence_length=6),
        "Llama": lambda: m.LlamaBackbone(**DECODER),
        "Gemma": lambda: m.GemmaBackbone(**DECODER, head_dim=6),
        "Mixtral": lambda: m.MixtralBackbone(**DECODER, num_experts=3),
        "Qwen3-MoE": lambda: m.Qwen3MoeBackbone(
            **DECODER, num_experts=3, moe_intermediate_dim=6, top_k=2, head_dim=4
        ),
        "GPT-OSS": lambda: m.GptOssBackbone(**DECODER, num_experts=3, head_dim=4),
        "RWKV-7": lambda: m.RWKV7Backbone(
            hidden_size=8, head_size=4, num_layers=2, vocabulary_size=11, intermediate_dim=12,
            gate_lora=3, mv_lora=3, aaa_lora=3, decay_lora=3,
        ),
        "T5": lambda: m.T5Backbone(**TEXT),
        "XLNet": lambda: m.XLNetBackbone(**TEXT),
        "Whisper": lambda: m.WhisperBackbone(
            **TEXT, num_mels=4, max_encoder_sequence_length=8, max_decoder_sequence_length=6
        ),
        "Moonshine": lambda: m.MoonshineBackbone(
            vocabulary_size=11, filter_dim=8, encoder_num_layers=1, decoder_num_layers=1,
            hidden_dim=8, intermediate_dim=12, encoder_num_heads=2, decoder_num_heads=2,
        ),
        "ViT": lambda: m.ViTBackbone(
            **patches, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=12
        ),
        "DeiT": lambda: m.DeiTBackbone(**patches, **TOWER),
        "DINOv2": lambda: m.DINOV2Backbone(
            **VISION, **TOWER, num_register_tokens=2, position_embedding_shape=IMAGE
        ),
        "ViTDet": lambda: m.ViTDetBackbone(
            **VISION, num_layers=2, num_heads=2, hidden_size=8, intermediate_dim=12,
            global_attention_layer_indices=[1], num_output_channels=6, window_size=2,
        ),
        "Swin": lambda: m.SwinTransformerBackbone(
            **VISION, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=2
        ),
        "MiT": lambda: m.MiTBackbone(
            layerwise_depths=[1, 1], num_layers=2, layerwise_num_heads=[1, 2],
            layerwise_sr_ratios=[2, 1], max_drop_path_rate=0.1, layerwise_patch_sizes=[7, 3],
            layerwise_strides=[4, 2], image_shape=(32, 32, 3), hidden_dims=[8, 12],
        ),
        "CLIP": lambda: m.CLIPBackbone(
            clip.clip_vision_encoder.CLIPVisionEncoder(**VISION, **TOWER),
            clip.clip_text_encoder.CLIPTextEncoder(**text), projection_dim=6,
        ),
        "SigLIP": lambda: m.SigLIPBackbone(
            hub.src.models.siglip.siglip_vision_encoder.SigLIPVisionEncoder(**VISION, **TOWER),
            hub.src.models.siglip.siglip_text_encoder.SigLIPTextEncoder(**text),
        ),
        "ResNet": lambda: m.ResNetBackbone(
            input_conv_filters=[6], input_conv_kernel_sizes=[3], stackwise_num_filters=[64, 64],
            stackwise_num_blocks=[1, 1], stackwise_num_strides=[1, 2],
            block_type="bottleneck_block", image_shape=IMAGE,
        ),
        "EfficientNet": lambda: m.EfficientNetBackbone(
            stackwise_width_coefficients=[1.0] * 2, stackwise_depth_coefficients=[1.0] * 2,
            stackwise_kernel_sizes=[3, 3], stackwise_num_repeats=[1, 1],
            stackwise_input_filters=[8, 8], stackwise_output_filters=[8, 16],
            stackwise_expansion_ratios=[1, 4], stackwise_squeeze_and_excite_ratios=[0.25, 0.25],
            stackwise_strides=[1, 2], stackwise_block_types=["v1", "unfused"],
            input_shape=(32, 32, 3),
        ),
        "Xception": lambda: m.XceptionBackbone(
            stackwise_conv_filters=[[4, 6], [6, 8]], stackwise_pooling=[True, False],
            image_shape=(32, 32, 3),
        ),
    }  # fmt: skip


def inputs_of(model: Any) -> dict[str, Any]:
    """Return random inputs for a model."""
    random = np.random.default_rng(0)
    inputs = {}
    for name, spec in dict(model.input).items() if isinstance(model.input, dict) else ():
        shape = [
            2,
            *(
                size or (1200 if spec.shape[-1] == 1 else 8 if len(spec.shape) > 2 else 6)
                for size in spec.shape[1:]
            ),
        ]
        integers = "int" in spec.dtype or "bool" in spec.dtype
        if "mask" in name:
            inputs[name] = np.ones(shape, spec.dtype)
        else:
            high = 2 if "segment" in name else 11
            inputs[name] = (
                random.integers(0, high, shape) if integers else random.normal(size=shape)
            )
    if not inputs:
        return random.normal(size=(2, *model.input.shape[1:])).astype("float32")  # type: ignore[return-value]
    return {
        name: tf.convert_to_tensor(value.astype(model.input[name].dtype))
        for name, value in inputs.items()
    }


def table(results: dict[str, Result]) -> str:
    """Return results as a table in Markdown."""
    head = "| model | parameters | plan without a declaration | units from | computed | right |"
    lines = [head, "|---|---:|---|---|---:|---:|"]
    for name, result in results.items():
        sources = ", ".join(f"{source} {count}" for source, count in sorted(result.sources.items()))
        right = result.checked - len(result.wrong)
        complete = "yes" if result.complete else "no"
        lines.append(
            f"| {name} | {result.parameters} | {complete} | {sources} | {result.checked} | {right} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the models and write the record and the table."""
    import keras_hub
    from rich.progress import track

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON; a table goes beside it as .md"
    )
    parser.add_argument("--only", nargs="*", help="names of models")
    options = parser.parse_args()
    made = models(keras_hub)
    results = {}
    for name in track(options.only or list(made), description="models"):
        keras.utils.set_random_seed(0)
        model = made[name]()
        given = inputs_of(model)
        results[name] = measure(model, partial(model, given))
    versions = {
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "tensorflow": tf.__version__,
    }
    record = {
        "versions": versions,
        "models": {name: asdict(result) for name, result in results.items()},
    }
    write_text(options.out, json.dumps(record, indent=1) + "\n")
    note = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = "# Models that Keras users bring\n\n"
    text += (
        f"Units of KerasHub's models ({note}), by `python docs/models/keras.py`.\n\n{LEGEND}\n\n"
    )
    text += f"{table(results)}\n"
    write_text(options.out.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
