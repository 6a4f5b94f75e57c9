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


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows ``start`` to ``start + rows`` of a projection."""

    name: str
    start: int
    rows: int


def _parts(prefix: str, names: tuple[str, ...], rows: tuple[int, ...]) -> list[_Part]:
    """Return one part per role, of a weight of its own or of a fused one."""
    if len(names) == len(rows):
        return [_Part(name=prefix + n, start=0, rows=r) for n, r in zip(names, rows, strict=True)]
    starts = [sum(rows[:i]) for i in range(len(rows))]
    return [
        _Part(name=prefix + names[0], start=s, rows=r) for s, r in zip(starts, rows, strict=True)
    ]


def _rows(
    part: _Part, index: Tensor, inverse: bool, shapes: Mapping[str, torch.Size]
) -> list[ScaledParameter]:
    """Scale the rows of a projection, and of its bias where it has one."""
    touches = []
    for name in (f"{part.name}.weight", f"{part.name}.bias"):
        if name in shapes:
            whole = torch.full((shapes[name][0],), -1)
            whole[part.start : part.start + part.rows] = index
            touches.append(ScaledParameter(name=name, axis=ROWS, index=whole, inverse=inverse))
    return touches


def rotary_pairs(head_dim: int, rotary_dim: int) -> Tensor:
    """Return for each feature of a head the factor it shares with its rotary partner.

    The rotary embedding turns feature j < r/2 together with j + r/2 (r = ``rotary_dim``): only a common
    factor passes through it. Features behind ``rotary_dim`` are not turned and stand alone.
    """
    half = rotary_dim // 2
    return torch.cat([torch.arange(half).repeat(2), torch.arange(head_dim - rotary_dim) + half])


def block_layout(config: PreTrainedConfig, shapes: Mapping[str, torch.Size]) -> BlockLayout:
    """Return the roles of a block's parameters.

    Args:
        config: The model's config; names family, heads and rotary share.
        shapes: Shape of every parameter of the block.

    Raises:
        UnsupportedArchitectureError: If the family is unknown or a parameter is not where it says.
    """
    family = family_of(config.model_type)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    q, k, v = _parts(
        "self_attn.", family.qkv, (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    )
    experts = GATE_UP_EXPERTS in shapes
    attention = tuple(f"self_attn.{name}.weight" for name in family.qkv)
    output = "self_attn.o_proj.weight"
    if experts:
        mlp: tuple[str, ...] = (GATE_UP_EXPERTS,)
        down, mlp_readers = DOWN_EXPERTS, (GATE_UP_EXPERTS, ROUTER)
    else:
        mlp = tuple(f"mlp.{name}.weight" for name in family.gate_up)
        down, mlp_readers = "mlp.down_proj.weight", mlp
    attn_norm, mlp_norm = "input_layernorm.weight", f"{family.mlp_norm}.weight"
    linears = (*attention, output, *mlp, down)
    missing = [n for n in (*linears, *mlp_readers, attn_norm, mlp_norm) if n not in shapes]
    if missing:
        raise UnsupportedArchitectureError(
            f"a block of this {config.model_type} model has no {missing[0]}; "
            "its entry in sliderquant/adapters/families.py does not fit"
        )
    readers = {attn_norm: attention, mlp_norm: mlp_readers}
    sites = [
        _norm_site(name, gain, readers[gain], config.hidden_size, family.gain_offset)
        for name, gain in (("norm -> qkv", attn_norm), ("norm -> mlp", mlp_norm))
    ]
    sites.append(_value_site(v, output, heads, kv_heads, head_dim, shapes))
    if not experts:
        gate_rows = shapes[down][1]
        _, up = _parts("mlp.", family.gate_up, (gate_rows, gate_rows))
        columns = torch.arange(gate_rows)
        touches = _rows(up, columns, True, shapes)
        touches.append(ScaledParameter(name=down, axis=COLUMNS, index=columns, inverse=False))
        sites.append(ScalingSite(name="up -> down", size=gate_rows, parameters=tuple(touches)))
    rotary_dim = _rotary_dim(config, head_dim)
    pairs, entries = rotary_pairs(head_dim, rotary_dim), head_dim - rotary_dim + rotary_dim // 2
    if family.head_norms:
        sites.append(_head_norm_site(pairs, entries, family.gain_offset))
    else:
        sites.append(_query_key_site(q, k, heads, kv_heads, pairs, entries, shapes))
    writers = (
        output,
        down,
        *(n for n in ("self_attn.o_proj.bias", "mlp.down_proj.bias") if n in shapes),
    )
    return BlockLayout(
        linears=linears,
        sites=tuple(sites),
        readers=readers,
        writers=writers,
        values=tuple(
            (name, v.start, v.rows)
            for name in (f"{v.name}.weight", f"{v.name}.bias")
            if name in shapes
        ),
        outputs=(output,),
        head_dim=head_dim,
        gain_offset=family.gain_offset,
        output_norms=family.output_norms,
    )


def _rotary_dim(config: PreTrainedConfig, head_dim: int) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor") or getattr(
        config, "partial_rotary_factor", None
    )
    return int(head_dim * (share or 1.0))


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
    v: _Part,
    output: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    shapes: Mapping[str, torch.Size],
) -> ScalingSite:
    """Each key-value head's slice of alpha is repeated for the query heads that read it."""
    size = kv_heads * head_dim
    rows = torch.arange(size)
    columns = rows.view(kv_heads, head_dim).repeat_interleave(heads // kv_heads, dim=0).flatten()
    read = ScaledParameter(name=output, axis=COLUMNS, index=columns, inverse=False)
    return ScalingSite(name="v -> o", size=size, parameters=(*_rows(v, rows, True, shapes), read))


def _query_key_site(
    q: _Part,
    k: _Part,
    heads: int,
    kv_heads: int,
    pairs: Tensor,
    entries: int,
    shapes: Mapping[str, torch.Size],
) -> ScalingSite:
    keys = pairs + entries * torch.arange(kv_heads)[:, None]
    queries = keys.repeat_interleave(heads // kv_heads, dim=0).flatten()
    touches = (*_rows(q, queries, True, shapes), *_rows(k, keys.flatten(), False, shapes))
    return ScalingSite(name="q <-> k", size=kv_heads * entries, parameters=touches)


def _head_norm_site(pairs: Tensor, entries: int, gain_offset: float) -> ScalingSite:
    """The norm per head would undo a scaling of the projections, so the gains take it."""
    touches = tuple(
        ScaledParameter(
            name=f"self_attn.{side}_norm.weight", axis=ROWS, index=pairs, inverse=inverse,
            offset=gain_offset,
        )
        for side, inverse in (("q", True), ("k", False))
    )  # fmt: skip
    return ScalingSite(name="q <-> k", size=entries, parameters=touches)
