"""Are the units of well-known models right? Judged by what each weight feeds, not by any table.

``python docs/models/torch.py --out docs/models/torch.json`` builds every model without pretrained
weights, plans it and runs it once. It differentiates the first operation that mixes weights of a
parameter, and so finds which weights feed one output. In some parameters, such as a table of
relative positions, an index picks weights before any operation mixes them; there, the weights that
one index picks are a unit. The result is a JSON file, and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
# This file has the name of a package that it imports, so its folder must not be searched.
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map  # noqa: E402

import agc_torch  # noqa: E402
from agc import AGC, PlanEntry  # noqa: E402
from agc.errors import AmbiguousUnitsError, UnitsWarning  # noqa: E402
from agc.files import write_text  # noqa: E402
from agc_torch.units import named_parameters  # noqa: E402

RULE = AGC()
MIXING = {"linear", "conv1d", "conv2d", "conv3d", "matmul", "bmm", "einsum", "layer_norm"}
INDEXING = {"__getitem__", "embedding", "index_select", "gather"}


class Watch(TorchFunctionMode):
    """Follow parameters with several axes longer than 1 to the operation that tells their units.

    Attributes
    ----------
    feeding : dict of str to Tensor of bool
        Parameter to the weights that feed one output.
    """

    def __init__(self, named: dict[str, Tensor], buffers: list[Tensor]) -> None:
        super().__init__()
        self.named = {n: p for n, p in named.items() if sum(size > 1 for size in p.shape) > 1}
        self.feeding: dict[str, Tensor] = {}
        # References: the id of a freed tensor may be given to another.
        self._alive: list[Any] = [*named.values()]
        self._constant = {id(p) for p in named.values()}  # computed from parameters alone
        self._tracks = {id(p): {n} for n, p in self.named.items()}
        self._picked: dict[str, Tensor] = {}
        self._buffers = {id(buffer) for buffer in buffers}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        kind = getattr(function, "__name__", "")
        if kind == "_weight_norm":  # treat the norms as constants: many outputs share them
            result = args[0] * (result / args[0]).detach()
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        names = {name for value in given for name in self._tracks.get(id(value), ())}
        floats = [value for value in given if value.is_floating_point()]
        outputs = [
            v for v in tree_flatten(result)[0] if isinstance(v, Tensor) and v.is_floating_point()
        ]
        self._alive += outputs
        pure = len(floats) == len(given) and all(id(value) in self._constant for value in floats)
        if pure and kind not in MIXING:
            self._constant |= {id(value) for value in outputs}
        for name in sorted(names) if outputs else []:
            if not self._judge(name, function, kind, args, kwargs, pure):
                for value in outputs:
                    self._tracks.setdefault(id(value), set()).add(name)
        return result

    def _judge(
        self, name: str, function: Any, kind: str, args: Any, kwargs: Any, pure: bool
    ) -> bool:
        """Tell whether an operation mixes a parameter's weights, or is the first after an index."""
        if kind in INDEXING and (picked := self._pick(name, kind, args)) is not None:
            self._picked[name] = picked
            return kind == "embedding" and self._settle(name, picked)
        if pure and kind not in MIXING:
            return False
        convolves = kind.startswith("conv") and len(args) > 1
        channel = convolves and name in self._tracks.get(id(args[1]), ())
        if convolves and not channel:  # one position of the window is enough
            window = tuple(range(2, args[1].dim()))
            args = (args[0], args[1].mean(window, keepdim=True), None, 1, 0, 1, *args[6:])
        fed = self._one_output(name, function, args, kwargs, channel=channel)
        if fed is not None and fed.count_nonzero() > 1:
            return self._settle(name, fed)
        return fed is not None and name in self._picked and self._settle(name, self._picked[name])

    def _settle(self, name: str, fed: Tensor) -> bool:
        """Keep the smaller set: an output of one pixel says more than one of a whole picture."""
        known = self.feeding.get(name)
        if known is None or fed.count_nonzero() < known.count_nonzero():
            self.feeding[name] = fed
        return True

    def _one_output(
        self, name: str, function: Any, args: Any, kwargs: Any, *, channel: bool
    ) -> Tensor | None:
        """Return the weights that feed one output, or one channel, whatever the activations are."""

        def fresh(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            known = id(value) in self._constant or id(value) in self._buffers
            kept = known or name in self._tracks.get(id(value), ())
            return value if kept else torch.randn_like(value)

        args, kwargs = tree_map(fresh, (args, kwargs))
        try:
            result = function(*args, **kwargs)
        except RuntimeError:  # the operation writes to its arguments
            return None
        for output in tree_flatten(result)[0]:
            if isinstance(output, Tensor) and output.requires_grad and output.numel():
                if channel:
                    return self._fed(output[:, 0], name)
                place = [slice(i := int(torch.randint(size, ())), i + 1) for size in output.shape]
                fed = self._fed(output[tuple(place)], name)
                if fed is None and self._fed(output, name) is not None:
                    fed = self._fed(self._narrowed(output, name), name)
                if fed is not None:
                    return fed
        return None

    def _narrowed(self, output: Tensor, name: str) -> Tensor:
        """Return one element that depends on a parameter, found by halving axis after axis."""
        for axis in range(output.dim()):
            while output.shape[axis] > 1:
                halves = output.tensor_split(2, axis)
                output = next(half for half in halves if self._fed(half, name) is not None)
        return output

    def _fed(self, output: Tensor, name: str) -> Tensor | None:
        """Return the weights that outputs depend on; None if there are none."""
        if not output.requires_grad:
            return None
        gradient = torch.autograd.grad(
            output, self.named[name], torch.randn_like(output), retain_graph=True, allow_unused=True
        )[0]
        return None if gradient is None or not gradient.count_nonzero() else gradient != 0

    def _pick(self, name: str, kind: str, args: Any) -> Tensor | None:
        """Return the weights that one index picks; None if there is no index."""
        table, index = args[:2]
        if kind == "embedding":
            table, index = index, table
        elif kind in ("index_select", "gather"):
            index = (*[slice(None)] * (args[1] % table.dim()), args[2])
        index = index if isinstance(index, tuple) else (index,)
        integers = [isinstance(i, Tensor) and i.dtype in (torch.int64, torch.int32) for i in index]
        if not any(integers) or name not in self._tracks.get(id(table), ()):
            return None
        one = tuple(
            int(i.flatten()[0])
            if isinstance(i, Tensor)
            else i
            if isinstance(i, int)
            else slice(None)
            for i in index
        )
        return self._fed(table[one], name)


def agrees(entry: PlanEntry, fed: Tensor) -> bool:
    """Tell whether the weights that feed one output are exactly one unit of the plan."""
    axes = entry.axes
    units = torch.arange(axes.count).view(axes.unit_shape).expand(axes.view).reshape(axes.shape)
    return torch.equal(units == units[fed][0], fed)


def examine(model: nn.Module, inputs: dict[str, Any] | Tensor) -> dict[str, Any]:
    """Plan a model, run it, and compare."""
    torch.manual_seed(0)
    model.eval().requires_grad_(True)
    record: dict[str, Any] = {"layout": [], "plans": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnitsWarning)
        try:
            plan = agc_torch.plan(model, RULE)
        except AmbiguousUnitsError as error:
            return {"plans": False, "error": str(error)}
    record["sources"] = dict(Counter(entry.source for entry in plan))
    record["layout"] = [e.name for e in plan if e.source == "layout"] if caught else []
    named = named_parameters(model)
    with torch.no_grad():
        for parameter in named.values():  # initial zeros and ones would hide dependencies
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() < 2))
    watch = Watch(named, list(model.buffers()))
    with watch:
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    record["parameters"] = len(plan)
    record["judged"] = len(watch.feeding)
    record["unused"] = sorted(set(watch.named) - set(watch.feeding))
    record["wrong"] = {
        name: f"{tuple(plan[name].shape)} {plan[name].units}, one output: {tuple(_box(fed))}"
        for name, fed in watch.feeding.items()
        if not agrees(plan[name], fed)
    }
    return record


def _box(fed: Tensor) -> list[int]:
    """Extent along each axis of the weights that feed one output."""
    return [len(set(axis.tolist())) for axis in fed.nonzero().T]


def timm_models() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """Return a function for each architecture of timm that builds a model and a batch."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.without_torchvision import timm_model

    timm_model("resnet10t")  # makes timm importable without torchvision
    import timm

    timm.layers.set_fused_attn(False)

    def build(name: str, smaller: dict[str, Any]) -> tuple[nn.Module, Tensor]:
        model = timm.create_model(name, **smaller)
        return model, torch.randn(1, *model.pretrained_cfg["input_size"])

    return {name: partial(build, name, smaller) for name, smaller in TIMM.items()}


# Architecture to the arguments that make it smaller.
TIMM: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 2},
    "cait_xxs24_224": {"depth": 2},
    "coat_tiny": {},
    "convit_tiny": {"depth": 11},
    "convnext_atto": {},
    "crossvit_tiny_240": {},
    "cspresnet50": {},
    "davit_tiny": {},
    "deit_tiny_patch16_224": {"depth": 2},
    "densenet121": {},
    "dm_nfnet_f0": {},
    "edgenext_xx_small": {},
    "efficientformer_l1": {},
    "efficientnet_b0": {},
    "eva02_tiny_patch14_224": {"depth": 2},
    "fastvit_t8": {},
    "focalnet_tiny_srf": {},
    "ghostnet_100": {},
    "gmlp_s16_224": {},
    "hiera_tiny_224": {},
    "inception_next_atto": {},
    "levit_128s": {},
    "maxvit_rmlp_pico_rw_256": {},
    "mixer_s32_224": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small": {},
    "mobilevit_xxs": {},
    "mvitv2_tiny": {},
    "nest_tiny": {},
    "pit_ti_224": {},
    "poolformer_s12": {},
    "regnetx_002": {},
    "repvgg_a0": {},
    "resmlp_12_224": {},
    "resnet18": {},
    "rexnet_100": {},
    "swin_tiny_patch4_window7_224": {},
    "swinv2_tiny_window8_256": {},
    "tiny_vit_5m_224": {},
    "tnt_s_patch16_224": {"depth": 2},
    "twins_svt_small": {},
    "visformer_tiny": {},
    "vit_base_patch16_siglip_224": {"depth": 2},
    "vit_tiny_patch16_224": {"depth": 2},
    "vit_tiny_r_s16_p8_224": {"depth": 2},
    "vitamin_small_224": {},
    "volo_d1_224": {},
    "xcit_nano_12_p16_224": {"depth": 2},
}

TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
LLAMA = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
MOE = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}
PICTURE = {**TEXT, "image_size": 16, "patch_size": 4}
MULTI = {
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "num_key_value_heads": 4,
}
TOKENS = torch.arange(1, 25).view(2, 12)
PIXELS = torch.randn(2, 3, 16, 16)
SOUND = torch.randn(2, 2000)
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ViT": ("ViTModel", PICTURE, {"pixel_values": PIXELS}),
    "XLNet": ("XLNetModel", {"vocab_size": 40, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
              {"input_ids": TOKENS, "token_type_ids": TOKENS % 2}),
    "Mixtral": ("MixtralModel", MOE, {"input_ids": TOKENS}),
    "GptOss": ("GptOssModel", MOE | {"layer_types": ["full_attention"] * 2}, {"input_ids": TOKENS}),
    "Qwen3Moe": ("Qwen3MoeModel", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
                 {"input_ids": TOKENS}),
    "DeepseekV3": ("DeepseekV3Model",
                   TEXT | MULTI | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
                                   "first_k_dense_replace": 1, "v_head_dim": 8, "qk_nope_head_dim": 8},
                   {"input_ids": TOKENS}),
    "Llama4": ("Llama4ForCausalLM", MOE | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
               {"input_ids": TOKENS}),
    "Llama": ("LlamaModel", LLAMA, {"input_ids": TOKENS}),
    "Mamba": ("MambaModel", {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6},
              {"input_ids": TOKENS}),
    "T5": ("T5Model", {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
           {"input_ids": TOKENS, "decoder_input_ids": TOKENS}),
    "BERT": ("BertModel", TEXT, {"input_ids": TOKENS}),
    "CLIP": ("CLIPModel",
             {"text_config": TEXT, "vision_config": PICTURE, "projection_dim": 24},
             {"input_ids": TOKENS, "pixel_values": PIXELS}),
    "Wav2Vec2": ("Wav2Vec2Model",
                 TEXT | {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "mask_time_prob": 0.0,
                         "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4},
                 {"input_values": SOUND}),
    "Whisper": ("WhisperModel",
                {"vocab_size": 40, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48,
                 "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                 "num_mel_bins": 10, "max_source_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
                 "eos_token_id": 2, "decoder_start_token_id": 1},
                {"input_features": torch.randn(2, 10, 40), "decoder_input_ids": TOKENS}),
    "ConvNeXt": ("ConvNextModel", {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2},
                 {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "Perceiver": ("PerceiverModel",
                  {"num_latents": 6, "d_latents": 32, "d_model": 20, "num_self_attends_per_block": 2,
                   "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
                  {"inputs": torch.randn(2, 12, 20)}),
    "BLIP2-QFormer": ("Blip2QFormerModel", TEXT | {"encoder_hidden_size": 24, "cross_attention_frequency": 1},
                      {"query_embeds": torch.randn(2, 5, 32), "encoder_hidden_states": torch.randn(2, 7, 24)}),
}  # fmt: skip


def transformers_models() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """Return a function for each family of transformers that builds a tiny model and a batch."""
    import transformers

    def build(kind: str, config: dict[str, Any], batch: dict[str, Any]) -> tuple[nn.Module, Any]:
        made = getattr(transformers, kind).config_class(**config)
        made._experts_implementation = made._attn_implementation = "eager"
        return getattr(transformers, kind)(made), batch

    return {name: partial(build, *row) for name, row in TRANSFORMERS.items()}


def table(results: dict[str, dict[str, Any]], versions: dict[str, str]) -> str:
    """Return the results in Markdown."""
    lines = [
        "# Models that PyTorch users bring",
        "",
        "Written by `python docs/models/torch.py`. *Judged* are the parameters with two or more axes longer "
        "than 1: what feeds one output was found by differentiation, not by name or table. "
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        "| model | plans as it is | by layer | by vector | by layout | judged | right | not used |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in results.items():
        sources = one.get("sources", {})
        cells = [sources.get(key, 0) for key in ("layer", "vector", "layout")]
        judged = one.get("judged", 0)
        cells += [judged, judged - len(one.get("wrong", {})), len(one.get("unused", []))]
        lines.append(
            f"| {name} | {'yes' if one['plans'] else 'no'} | {' | '.join(map(str, cells))} |"
        )
    plans = sum(one["plans"] for one in results.values())
    right = sum(map(is_right, results.values()))
    return "\n".join(
        [*lines, "", f"{len(results)} models, {plans} plan as they are, {right} are right.", ""]
    )


def is_right(result: dict[str, Any]) -> bool:
    """Tell whether a model plans without a declaration or a guess, and all judged units agree."""
    return result["plans"] and not (result["wrong"] or result["layout"] or result["unused"])


def write(results: dict[str, dict[str, Any]], out: Path) -> None:
    """Write the results as JSON, and as a table beside it."""
    versions = {name: metadata.version(name) for name in ("torch", "timm", "transformers")}
    document = {"versions": versions, "models": results}
    write_text(out, json.dumps(document, indent=1, sort_keys=True) + "\n")
    write_text(out.with_suffix(".md"), table(results, versions))


def main() -> int:
    """Examine all models, and write the results."""
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("models", nargs="*", help="only these")
    options = parser.parse_args()
    chosen = set(options.models or (*TRANSFORMERS, *TIMM))
    results = {}
    # transformers first: it fails once the stand-in for torchvision is installed.
    builders = (
        pair
        for family in (transformers_models, timm_models)
        for pair in family().items()
        if pair[0] in chosen
    )
    for name, build in track(builders, "Models", total=len(chosen)):
        results[name] = examine(*build())
    write(results, options.out)
    wrong = [name for name, one in results.items() if not is_right(one)]
    print(f"{len(results)} models, {len(results) - len(wrong)} right", *wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
