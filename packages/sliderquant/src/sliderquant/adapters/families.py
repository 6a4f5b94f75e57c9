"""Model families of transformers, as a table. Adding one that follows the same pattern is one entry."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from effml_common.errors import InputError
from sliderquant.method.layout import COLUMNS, ROWS, BlockLayout, ScaledParameter, ScalingSite


class UnsupportedArchitectureError(InputError):
    """The model's family has no entry in the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How a family names the parts of a decoder block; the defaults are Llama's.

    All of them turn queries and keys by rotary halves: feature j is paired with j + d/2.

    Attributes:
        qkv: Query, key and value projections; one name if fused, rows in this order.
        gate_up: Gate and up projections; one name if fused, gate first.
        mlp_norm: Norm in front of the MLP.
        gain_offset: 1 where a norm multiplies by (1 + weight).
        head_norms: Queries and keys are normalised per head before the rotary embedding.
        output_norms: Norms between a sublayer's output and the residual stream.
        expert_files: Checkpoint names of one expert's gate, up and down weight, and of the router.
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_norm: str = "post_attention_layernorm"
    gain_offset: float = 0.0
    head_norms: bool = False
    output_norms: tuple[str, ...] = ()
    expert_files: tuple[str, str, str, str] | None = None


GEMMA_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(head_norms=True),
    "phi3": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "gemma2": Family(
        mlp_norm="pre_feedforward_layernorm", gain_offset=1.0, output_norms=GEMMA_NORMS
    ),
    "gemma3_text": Family(
        mlp_norm="pre_feedforward_layernorm",
        gain_offset=1.0,
        output_norms=GEMMA_NORMS,
        head_norms=True,
    ),
    "qwen3_moe": Family(
        head_norms=True,
        expert_files=(
            "mlp.experts.{}.gate_proj.weight",
            "mlp.experts.{}.up_proj.weight",
            "mlp.experts.{}.down_proj.weight",
            "mlp.gate.weight",
        ),
    ),
    "mixtral": Family(
        expert_files=(
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
            "block_sparse_moe.experts.{}.w2.weight",
            "block_sparse_moe.gate.weight",
        ),
    ),
}
GATE_UP_EXPERTS, DOWN_EXPERTS = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ROUTER = "mlp.gate.weight"


def family_of(model_type: str) -> Family:
    """Return the table entry of a model type.

    Raises:
        UnsupportedArchitectureError: Naming what an entry must say.
    """
    if model_type not in FAMILIES:
        raise UnsupportedArchitectureError(
            f"architecture {model_type!r} is not supported; supported: "
            f"{', '.join(FAMILIES)} (a new one needs an entry in sliderquant/adapters/families.py: the "
            "names of its projections and norms, and its experts' names if it has some)"
        )
    return FAMILIES[model_type]


def rotary_pairs(head_dim: int, rotary_dim: int) -> Tensor:
    """Return for each feature of a head the factor it shares with its rotary partner.

    The rotary embedding turns feature j < r/2 together with j + r/2 (r = ``rotary_dim``): only a common
    factor passes through it. Features behind ``rotary_dim`` are not turned and stand alone.
    """
    half = rotary_dim // 2
    return torch.cat([torch.arange(half).repeat(2), torch.arange(head_dim - rotary_dim) + half])


@dataclass(frozen=True, kw_only=True)
class _Projection:
    """Rows ``start`` to ``start + rows`` of a linear layer."""

    name: str
    start: int
    rows: int


def _projections(prefix: str, names: tuple[str, ...], rows: tuple[int, ...]) -> list[_Projection]:
    """Return one projection per role, of a layer of its own or of a fused one."""
    if len(names) == len(rows):
        places = [(name, 0) for name in names]
    else:
        places = [(names[0], sum(rows[:i])) for i in range(len(rows))]
    return [
        _Projection(name=prefix + name, start=start, rows=count)
        for (name, start), count in zip(places, rows, strict=True)
    ]


def _scaled_rows(
    projection: _Projection, index: Tensor, inverse: bool, shapes: Mapping[str, torch.Size]
) -> list[ScaledParameter]:
    """Scale the rows of a projection, and of its bias where it has one."""
    scaled = []
    for name in (f"{projection.name}.weight", f"{projection.name}.bias"):
        if name in shapes:
            # Rows of other projections in a fused layer are left alone.
            index_of_row = torch.full((shapes[name][0],), -1)
            index_of_row[projection.start : projection.start + projection.rows] = index
            scaled.append(
                ScaledParameter(name=name, axis=ROWS, index=index_of_row, inverse=inverse)
            )
    return scaled


@dataclass(frozen=True, kw_only=True)
class _Names:
    """Names of a block's parameters, by their role.

    Attributes:
        attention: Weights that read the norm in front of the attention.
        output: Weight behind the heads.
        mlp: Weights that read the norm in front of the MLP and are quantized.
        router: Weight that chooses the experts, where there are some.
        down: Weight at the end of the MLP.
        attention_norm: Gain of the norm in front of the attention.
        mlp_norm: Gain of the norm in front of the MLP.
    """

    attention: tuple[str, ...]
    output: str
    mlp: tuple[str, ...]
    router: tuple[str, ...]
    down: str
    attention_norm: str
    mlp_norm: str

    @property
    def linears(self) -> tuple[str, ...]:
        """Weights that are quantized."""
        return (*self.attention, self.output, *self.mlp, self.down)

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Weights that read each norm."""
        return {self.attention_norm: self.attention, self.mlp_norm: (*self.mlp, *self.router)}


def _names(family: Family, experts: bool) -> _Names:
    dense = tuple(f"mlp.{name}.weight" for name in family.gate_up)
    return _Names(
        attention=tuple(f"self_attn.{name}.weight" for name in family.qkv),
        output="self_attn.o_proj.weight",
        mlp=(GATE_UP_EXPERTS,) if experts else dense,
        router=(ROUTER,) if experts else (),
        down=DOWN_EXPERTS if experts else "mlp.down_proj.weight",
        attention_norm="input_layernorm.weight",
        mlp_norm=f"{family.mlp_norm}.weight",
    )


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """Numbers of heads and features of an attention layer.

    Attributes:
        queries: Query heads.
        keys: Heads of keys and values, each read by ``queries / keys`` query heads.
        features: Features of a head.
        rotary: Leading features of a head that the rotary embedding turns.
    """

    queries: int
    keys: int
    features: int
    rotary: int

    def repeat(self, per_key_head: Tensor) -> Tensor:
        """Repeat what belongs to each key-value head for the query heads that read it, [queries * d]."""
        return per_key_head.repeat_interleave(self.queries // self.keys, dim=0).flatten()


def _heads(config: PreTrainedConfig) -> _Heads:
    queries = config.num_attention_heads
    features = getattr(config, "head_dim", None) or config.hidden_size // queries

    # Newer configs keep the share of rotated features among the parameters of the embedding.
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor") or getattr(
        config, "partial_rotary_factor", None
    )
    return _Heads(
        queries=queries,
        keys=getattr(config, "num_key_value_heads", None) or queries,
        features=features,
        rotary=int(features * (share or 1.0)),
    )


def block_layout(config: PreTrainedConfig, shapes: Mapping[str, torch.Size]) -> BlockLayout:
    """Return the roles of a block's parameters.

    Args:
        config: The model's config; names family, heads and rotary share.
        shapes: Shape of every parameter of the block.

    Raises:
        UnsupportedArchitectureError: If the family is unknown or a parameter is not where it says.
    """
    # Every parameter that the family's entry names must be there.
    family, heads = family_of(config.model_type), _heads(config)
    names = _names(family, GATE_UP_EXPERTS in shapes)
    required = (*names.linears, *names.router, names.attention_norm, names.mlp_norm)
    missing = [name for name in required if name not in shapes]
    if missing:
        raise UnsupportedArchitectureError(
            f"a block of this {config.model_type} model has no {missing[0]}; "
            "its entry in sliderquant/adapters/families.py does not fit"
        )

    # Biases are optional: those that are there write and read with their weights.
    key_rows = heads.keys * heads.features
    rows = (heads.queries * heads.features, key_rows, key_rows)
    query, key, value = _projections("self_attn.", family.qkv, rows)
    values = [f"{value.name}.{kind}" for kind in ("weight", "bias")]
    biases = [n for n in ("self_attn.o_proj.bias", "mlp.down_proj.bias") if n in shapes]

    return BlockLayout(
        linears=names.linears,
        sites=_sites(config, family, heads, names, (query, key, value), shapes),
        readers=names.readers,
        writers=(names.output, names.down, *biases),
        values=tuple((name, value.start, value.rows) for name in values if name in shapes),
        outputs=(names.output,),
        head_dim=heads.features,
        gain_offset=family.gain_offset,
        output_norms=family.output_norms,
    )


def _sites(
    config: PreTrainedConfig,
    family: Family,
    heads: _Heads,
    names: _Names,
    projections: tuple[_Projection, _Projection, _Projection],
    shapes: Mapping[str, torch.Size],
) -> tuple[ScalingSite, ...]:
    """Return the places of a block where channel scales cancel."""
    # Between each norm and the layers that read it.
    query, key, value = projections
    sites = [
        _norm_site(name, gain, names.readers[gain], config.hidden_size, family.gain_offset)
        for name, gain in (("norm -> qkv", names.attention_norm), ("norm -> mlp", names.mlp_norm))
    ]

    # Between layers that nothing but linear operations separates; experts are left alone.
    sites.append(_value_site(value, names.output, heads, shapes))
    if names.down != DOWN_EXPERTS:
        sites.append(_up_site(family, names.down, shapes))

    # Between queries and keys, whose product is all that matters.
    pairs = rotary_pairs(heads.features, heads.rotary)
    entries = heads.features - heads.rotary + heads.rotary // 2
    if family.head_norms:
        sites.append(_head_norm_site(pairs, entries, family.gain_offset))
    else:
        sites.append(_query_key_site(query, key, heads, pairs, entries, shapes))
    return tuple(sites)


def _norm_site(
    name: str, gain: str, readers: tuple[str, ...], hidden: int, gain_offset: float
) -> ScalingSite:
    channels = torch.arange(hidden)
    norm = ScaledParameter(name=gain, axis=ROWS, index=channels, inverse=True, offset=gain_offset)
    columns = (
        ScaledParameter(name=n, axis=COLUMNS, index=channels, inverse=False) for n in readers
    )
    return ScalingSite(name=name, size=hidden, parameters=(norm, *columns))


def _value_site(
    value: _Projection, output: str, heads: _Heads, shapes: Mapping[str, torch.Size]
) -> ScalingSite:
    """Each key-value head's slice of alpha is repeated for the query heads that read it."""
    size = heads.keys * heads.features
    rows = torch.arange(size)
    columns = heads.repeat(rows.view(heads.keys, heads.features))
    reader = ScaledParameter(name=output, axis=COLUMNS, index=columns, inverse=False)
    scaled = (*_scaled_rows(value, rows, True, shapes), reader)
    return ScalingSite(name="v -> o", size=size, parameters=scaled)


def _up_site(family: Family, down: str, shapes: Mapping[str, torch.Size]) -> ScalingSite:
    """The input of the down projection is linear in the output of the up projection."""
    size = shapes[down][1]
    _, up = _projections("mlp.", family.gate_up, (size, size))
    channels = torch.arange(size)
    reader = ScaledParameter(name=down, axis=COLUMNS, index=channels, inverse=False)
    scaled = (*_scaled_rows(up, channels, True, shapes), reader)
    return ScalingSite(name="up -> down", size=size, parameters=scaled)


def _query_key_site(
    query: _Projection,
    key: _Projection,
    heads: _Heads,
    pairs: Tensor,
    entries: int,
    shapes: Mapping[str, torch.Size],
) -> ScalingSite:
    keys = pairs + entries * torch.arange(heads.keys)[:, None]
    scaled = (
        *_scaled_rows(query, heads.repeat(keys), True, shapes),
        *_scaled_rows(key, keys.flatten(), False, shapes),
    )
    return ScalingSite(name="q <-> k", size=heads.keys * entries, parameters=scaled)


def untied_query_key_site(
    config: PreTrainedConfig, shapes: Mapping[str, torch.Size]
) -> ScalingSite:
    """Return the place between queries and keys with an entry for each channel of a key head.

    It is no place where scales cancel, unless rotary partners have equal ones and no norm follows: the
    released code scales there all the same.
    """
    family, heads = family_of(config.model_type), _heads(config)
    key_rows = heads.keys * heads.features
    rows = (heads.queries * heads.features, key_rows, key_rows)
    query, key, _ = _projections("self_attn.", family.qkv, rows)
    channels = torch.arange(heads.features)
    return _query_key_site(query, key, heads, channels, heads.features, shapes)


def _head_norm_site(pairs: Tensor, entries: int, gain_offset: float) -> ScalingSite:
    """The norm per head would undo a scaling of the projections, so the gains take it."""
    scaled = tuple(
        ScaledParameter(
            name=f"self_attn.{side}_norm.weight", axis=ROWS, index=pairs, inverse=inverse,
            offset=gain_offset,
        )
        for side, inverse in (("q", True), ("k", False))
    )  # fmt: skip
    return ScalingSite(name="q <-> k", size=entries, parameters=scaled)
