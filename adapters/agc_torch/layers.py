"""What layer types say of their parameters: PyTorch's, timm's, transformers' and PEFT's.

PyTorch stores weights out-first, so most rows of the table say ``o ... -> o``. A layer is looked up
along its class hierarchy by dotted name, so the packages that are known here are never imported. A
table of positions, tokens or latents is read like an embedding: what one position uses is one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, Final, TypeAlias

from torch import Tensor, nn

from agc import Units
from agc.layer_table import LayerRule, LayerTable, LayerUnits
from agc.plan import WHOLE

__all__ = ["TABLE", "LayerRule", "LayerUnits", "own_parameters", "register_units"]


def register_units(layer: type[nn.Module] | str, units: LayerRule) -> None:
    """Teach the table a layer type, or change what it says of one.

    Parameters
    ----------
    layer : type of Module, or str
        The layer's class; its subclasses follow it unless they are registered themselves. A string
        is the full path of a class that need not be imported, ``"package.module.Name"``, or a glob
        of paths, ``"package.*"``, which speaks for what no class of its own speaks for.
    units : mapping of str to str or Units, or callable
        Parameter name (a glob, the first that matches decides) to units; or a function of the layer
        that returns such a mapping, where the units depend on the layer's sizes. Parameters in a
        ``ParameterList`` or ``ParameterDict`` of the layer are called ``"weights.0"``. A parameter
        that matches nothing is left to its shape and the layout convention.

    Raises
    ------
    ParameterError
        If ``units`` is neither a mapping nor callable.
    UnitsError
        If a pattern cannot be parsed.

    Examples
    --------
    >>> import torch
    >>> from agc import AGC
    >>> from agc_torch import plan
    >>> class Dense(nn.Module):
    ...     def __init__(self, inputs, outputs):
    ...         super().__init__()
    ...         self.kernel = nn.Parameter(torch.zeros(inputs, outputs))
    >>> register_units(Dense, {"kernel": "i o -> o"})
    >>> plan(Dense(3, 5), AGC())["kernel"].count
    5
    """
    TABLE.register(layer, units)


TABLE: Final = LayerTable({"weight": "o i -> o"})
"""Everything that is known of layer types."""


# --- PyTorch --------------------------------------------------------------------------------------


def _transposed(layer: Any) -> LayerUnits:
    return {"weight": Units("(g i) o ... -> g o", g=int(layer.groups))}


# --- Packages -------------------------------------------------------------------------------------

_Row: TypeAlias = tuple[str, int, str | Units]  # name (a glob), number of axes, units


def _by_rank(*rows: _Row) -> Callable[[nn.Module], LayerUnits]:
    """Return a rule that decides by a parameter's name and rank; vectors are left alone."""

    def rule(layer: nn.Module) -> LayerUnits:
        declared: dict[str, str | Units] = {}
        for name, tensor in own_parameters(layer):
            for glob, rank, units in rows:
                if fnmatchcase(name, glob) and tensor.dim() == rank and not _is_vector(tensor):
                    declared.setdefault(name, units)
        return declared

    return rule


def own_parameters(layer: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Yield a layer's own parameters by name, those in its lists and dictionaries among them."""
    yield from ((name, p) for name, p in layer._parameters.items() if p is not None)
    for prefix, child in layer._modules.items():
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            yield from ((f"{prefix}.{name}", p) for name, p in child.named_parameters())


def _is_vector(tensor: Tensor) -> bool:
    return len([size for size in tensor.shape if size > 1]) <= 1


def _batched_tables(layer: nn.Module) -> LayerUnits:
    """Read ``(1, n, d)``, which these packages use for nothing else, as a table of n rows."""
    return {
        name: "one n d -> n"
        for name, tensor in own_parameters(layer)
        if tensor.dim() == 3 and tensor.shape[0] == 1 and not _is_vector(tensor)
    }


def _union(*rules: Callable[[nn.Module], LayerUnits]) -> Callable[[nn.Module], LayerUnits]:
    """Return a rule that asks several; the first that knows a name decides."""

    def rule(layer: nn.Module) -> LayerUnits:
        return {name: units for ask in reversed(rules) for name, units in ask(layer).items()}

    return rule


_ROWS: Final = "n d -> n"
_PER_AXIS: Final = "axis n d -> axis n"  # one table for each axis of a picture
_MAP: Final = "one d h w -> h w"  # positions of a picture, channels first
_GRID: Final = "one h w d -> h w"  # the same, channels last


def _conditional(layer: Any) -> LayerUnits:
    """Mix whole kernels that are stored as rows, one an expert."""
    return {"weight": Units("e (o i) -> e o", o=int(layer.out_channels)), "bias": "e o -> e"}


def _experts(layer: Any) -> LayerUnits:
    """Tell ``(expert, output, input)`` from ``(expert, input, output)`` by what fits together."""
    shapes = {name: p.shape for name, p in layer._parameters.items() if p is not None}
    up = next((shapes[name] for name in ("gate_up_proj", "up_proj") if name in shapes), None)
    down = shapes.get("down_proj")
    if up is None or down is None or len(up) != 3 or len(down) != 3:
        return {}
    per_unit = 2 if "gate_up_proj" in shapes else 1
    fits = {
        "e o i -> e o": up[2] == down[1] and up[1] in (down[2], per_unit * down[2]),
        "e i o -> e o": up[1] == down[2] and up[2] in (down[1], per_unit * down[1]),
    }
    said = getattr(layer, "is_transposed", None)
    if said is not None:
        fits["e i o -> e o" if said is False else "e o i -> e o"] = False
    units = [pattern for pattern, right in fits.items() if right]
    if len(units) != 1:
        return {}
    return {"*_bias": "e o -> e", "*_proj": units[0]}


def _dbrx(layer: Any) -> LayerUnits:
    experts = int(layer.moe_num_experts)
    return {"w1": "o i -> o", "v1": "o i -> o", "w2": Units("(e i) o -> e o", e=experts)}


_TIMM: Final = _union(
    _by_rank(
        ("attention_biases", 2, "h n -> n"),
        ("relative_position_bias_table", 2, _ROWS),
        ("relative_position_bias_table", 3, "h n m -> n m"),
        ("position_embedding_table", 3, _PER_AXIS),
        ("alpha", 2, "g d -> g"),  # gains, one a row
        ("rel_pos_?", 2, _ROWS),
        ("height_rel", 2, _ROWS),
        ("width_rel", 2, _ROWS),
        ("*pos_embed*", 2, _ROWS),
        ("*pos_embed*", 4, _GRID),
    ),
    _batched_tables,
)


def _pictures(layer: nn.Module) -> LayerUnits:
    """Read a table of the positions of a square picture, ``(1, d, s, s)`` or ``(1, s, s, d)``."""
    units: dict[str, str] = {}
    for name, tensor in own_parameters(layer):
        if tensor.dim() == 4 and "pos" in name:
            _, first, middle, last = tensor.shape
            if (first == middle) != (middle == last):
                units[name] = _GRID if first == middle else _MAP
    return units


_TRANSFORMERS: Final = _union(
    _experts,
    _by_rank(
        ("weight", 2, "o i -> o"),  # of routers
        ("fn", 2, "o i -> o"),
        ("hc_fn", 2, "o i -> o"),
        ("A_log", 2, "c n -> c"),
        ("attention_biases", 2, "h n -> n"),
        ("*bias_[uv]", 2, "h d -> h"),  # queries that all positions share
        ("relative_attention_bias", 2, _ROWS),
        ("rel_pos_?", 2, _ROWS),
        ("position_embedding_table", 3, _PER_AXIS),
        ("*position_embedding*", 3, "h w d -> h w"),
        ("*positional_encoding", 4, "n one two d -> n"),
        *((glob, 2, _ROWS) for glob in ("*position*", "*embed*", "*_token*", "*latents", "*query")),
        ("scale_shift_table", 2, _ROWS),
    ),
    _pictures,
    _batched_tables,
)
_PEFT: Final = _union(
    _by_rank(
        ("*_embedding_A.*", 2, "r v -> v"),  # its columns are what an index looks up
        ("hada_t?.*", 4, "r ... -> r"),
        ("lokr_t2.*", 4, "r ... -> r"),
        ("poly_lora_A.*", 4, "s k i r -> s k r"),
        ("poly_lora_B.*", 4, "s k r o -> s k o"),
        ("lora_*", 2, "o i -> o"),
        ("*_embedding_B.*", 2, "o i -> o"),
        ("*_[AB].*", 2, "o i -> o"),
        ("lokr_w?", 2, "o i -> o"),
        ("lokr_w?.*", 2, "o i -> o"),
        ("lokr_w2.*", 4, "o i ... -> o"),
        ("trainable_tokens_delta.*", 2, _ROWS),
        ("hra_u.*", 2, "i r -> r"),
        ("miss_block.*", 2, "r o -> o"),
        ("boft_R.*", 4, "n k a b -> n k"),  # rotations: one a block
        ("weight", 2, "n k -> n"),  # of OFT, likewise
    ),
    _batched_tables,
)


def _low_rank(layer: Any) -> LayerUnits:
    """Factors of LoHa and LoKr: ``(r, o)`` around a core tensor, else ``(o, r)``."""
    units: dict[str, str] = {}
    for kind, core in (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2"), ("lokr_w2", "lokr_t2")):
        for adapter in getattr(layer, f"{kind}_a", {}):
            swapped = adapter in getattr(layer, core, {})
            units[f"{kind}_a.{adapter}"] = "r o -> o" if swapped else "o r -> o"
            units[f"{kind}_b.{adapter}"] = "r i -> r"
    return units


# --- The table ------------------------------------------------------------------------------------

_CONV: Final = {"weight": "o i ... -> o", "gain": "... ->"}  # subclasses of NFNets have a gain
_RELATIVE: Final = {  # attention of XLNet and its kind, by einsum
    "[qkvr]": "i h d -> h d",
    "o": "o h d -> o",
    "r_kernel": "i h d -> h d",
    "r_?_bias": "h d -> h",  # a query that all positions share
    "seg_embed": "s h d -> s h",
}
_BUILT_IN: Final[dict[type[nn.Module] | str, LayerRule]] = {
    nn.Linear: {"weight": "o i -> o"},
    nn.Bilinear: {"weight": "o i j -> o"},
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _transposed,
    nn.ConvTranspose2d: _transposed,
    nn.ConvTranspose3d: _transposed,
    nn.Embedding: {"weight": "v d -> v"},
    nn.EmbeddingBag: {"weight": "v d -> v"},
    nn.MultiheadAttention: {"*_proj_weight": "o i -> o", "bias_?": WHOLE},
    nn.RNNBase: {"weight_*": "o i -> o"},
    nn.RNNCellBase: {"weight_*": "o i -> o"},
    nn.LayerNorm: {"*": WHOLE},
    nn.RMSNorm: {"*": WHOLE},
    "timm.layers.attention2d.MultiQueryAttentionV2": {
        "query_proj": "h k i -> h k",
        "key_proj": "i k -> k",
        "value_proj": "i v -> v",
        "out_proj": "o h v -> o",
    },
    "timm.layers.cond_conv2d.CondConv2d": _conditional,
    "timm.layers.lambda_layer.LambdaLayer": {"pos_emb": "n m k -> n m"},
    "timm.layers.ml_decoder.MLDecoder": {"duplicate_pooling": "q i o -> q o"},
    "timm.models.hiera.Hiera": _by_rank(("pos_embed*", 4, _MAP)),
    "timm.models.hieradet_sam2.HieraDet": {"pos_embed*": _MAP},
    "timm.models.nest.Nest": {"pos_embed": "one b n d -> b n"},
    "timm.models.nest.NestLevel": {"pos_embed": "one b n d -> b n"},
    "timm.models.pit.PoolingVisionTransformer": {"pos_embed": _MAP},
    "timm.models.tnt.TNT": {"pixel_pos": _MAP},
    "timm.models.visformer.Visformer": {"pos_embed?": _MAP},
    "timm.*": _TIMM,
    "transformers.pytorch_utils.Conv1D": {"weight": "i o -> o"},
    "transformers.models.convbert.modeling_convbert.GroupedLinearLayer": {"weight": "g i o -> g o"},
    "transformers.models.csm.modeling_csm.CsmCodebooksHead": {"weight": "n i o -> n o"},
    "transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU": _dbrx,
    "transformers.models.funnel.modeling_funnel.FunnelRelMultiheadAttention": _RELATIVE,
    "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention": _RELATIVE,
    "transformers.models.*.*.Gemma*Projector": {"mm_input_projection_weight": "i o -> o"},
    "transformers.models.*.*.Inkling*SharedExperts": {"*_proj": "e o i -> e o"},
    "transformers.models.*.*.*FlexibleLinear": {"weight": "n o i -> n o"},
    "transformers.models.*.*.*ParallelExperts": {"weight": "e o i -> e o"},
    "transformers.*": _TRANSFORMERS,
    "peft.tuners.ia3.*": {"ia3_l.*": WHOLE},
    "peft.*": _union(_low_rank, _PEFT),
}
for _layer, _rule in _BUILT_IN.items():
    register_units(_layer, _rule)
