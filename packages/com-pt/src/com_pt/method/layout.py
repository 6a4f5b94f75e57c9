"""What each axis of a parameter stands for.

A rule is a pattern of parameter names and one word per axis: ``QKV <WIDTH`` for the in-projection of
attention. ``<`` marks an axis that is read from (summed over), ``+`` one whose entries are added to
the residual stream. Roles:

WIDTH   channels of the residual stream      QKV     three blocks of HEAD
HEAD    heads x head size                    CAT4    four blocks of WIDTH (Swin's merging)
KVHEAD  key/value heads x head size          EMBED   output features
HEADS   number of heads                      CLASS   classes
MLP     hidden units                         VOCAB, POS, FIXED: never grown
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from com_pt.errors import LayoutError

ROLES = (
    "WIDTH", "HEAD", "KVHEAD", "HEADS", "QKV", "MLP", "CAT4", "EMBED", "CLASS", "VOCAB", "POS", "FIXED",
)  # fmt: skip
BLOCKS = {"QKV": 3, "CAT4": 4}
NEVER_GROWN = ("VOCAB", "POS", "FIXED")
Kind = Literal["linear", "norm", "scale"]


@dataclass(frozen=True)
class Axis:
    """Role of one axis.

    Args:
        role: One of ``ROLES``.
        reads: Whether the layer sums over it.
        writes: Whether its entries are added to the residual stream.
    """

    role: str
    reads: bool = False
    writes: bool = False


@dataclass(frozen=True)
class Rule:
    """Names of one kind of parameter and the roles of its axes.

    Args:
        pattern: Regular expression of whole names. Layers that repeat have the groups ``stack``
            (a name) and ``layer`` (a number).
        axes: One role per axis.
        tower: The part of the model whose residual stream this is.
        kind: ``norm`` for gains and biases of a normalisation, ``scale`` for LayerScale.
        optional: Whether it may be missing on either side; then it stays as it was initialised.
    """

    pattern: str
    axes: tuple[Axis, ...]
    tower: str = ""
    kind: Kind = "linear"
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Sizes and kind of one residual stream.

    Args:
        width: Its channels (Swin: of the first stage).
        head_dim: Channels of one head.
        heads: Query heads (Swin: of the first stage).
        kv_heads: Key and value heads, where they are fewer.
        norm: ``layer`` or ``rms``.
        early_norm: Whether a norm stands between the embeddings and the first block.
        post_norm: Whether branches are normalised after they were computed.
        eps: The eps of the norms.
    """

    width: int
    head_dim: int
    heads: int
    kv_heads: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    early_norm: bool = False
    post_norm: bool = False
    eps: float = 1e-5


@dataclass(frozen=True)
class Layout:
    """Description of one model.

    Args:
        name: The name of the family.
        rules: One for every parameter.
        towers: The residual streams, by the names that the rules use.
        fixed: Facts that must be equal along a chain, such as the vocabulary.
        deepened: Stacks whose layers the released routine copies twice. It copies the layers of all
            other stacks under their own names.

    Example:
        >>> table = rules({"0.weight": "MLP FIXED", "1.weight": "CLASS <MLP"})
        >>> layout = Layout("perceptron", table, {"": Tower(width=1, head_dim=1, heads=1)})
        >>> [axis.role for axis in layout.rule_of("1.weight").axes]
        ['CLASS', 'MLP']
    """

    name: str
    rules: tuple[Rule, ...]
    towers: Mapping[str, Tower]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    deepened: tuple[str, ...] = ()

    def rule_of(self, name: str) -> Rule:
        """Return the rule of a parameter.

        Raises:
            LayoutError: If there is none.
        """
        for rule in self.rules:
            if re.fullmatch(rule.pattern, name):
                return rule
        raise LayoutError(
            f"parameter {name} has no axis roles in the layout {self.name}; "
            "add a rule for it, or name it in allow_missing to keep it fresh"
        )

    def layer_of(self, name: str) -> tuple[str, int] | None:
        """Return stack and number of the layer that a parameter belongs to, if any."""
        match = re.fullmatch(self.rule_of(name).pattern, name)
        groups = match.groupdict() if match else {}
        return (groups["stack"], int(groups["layer"])) if groups.get("layer") else None


def rules(
    table: Mapping[str, str],
    *,
    prefix: str = "",
    tower: str = "",
    kind: Kind = "linear",
    optional: bool = False,
) -> tuple[Rule, ...]:
    """Read rules from a table of pattern to roles, such as ``{"head.weight": "CLASS <WIDTH"}``.

    Dots in patterns are literal; ``N`` between dots stands for the number of a layer.

    Args:
        table: Roles by pattern of parameter names.
        prefix: Stands before every pattern.
        tower: The tower of all rules.
        kind: The kind of all rules.
        optional: Whether the parameters may be missing on either side.

    Raises:
        LayoutError: If there is no such role.
    """
    table_rules = []
    for pattern, words in table.items():
        stack, numbered, rest = pattern.partition(".N.")
        escaped = (
            f"(?P<stack>{_escape_dots(prefix + stack)})\\.(?P<layer>\\d+)\\.{_escape_dots(rest)}"
            if numbered
            else _escape_dots(prefix + pattern)
        )
        axes = tuple(map(_parse_axis, words.split()))
        table_rules.append(Rule(escaped, axes, tower, kind, optional))
    return tuple(table_rules)


def prefix_rules(table: Iterable[Rule], *, prefix: str, tower: str) -> tuple[Rule, ...]:
    """Return the same rules below a prefix, for a model that is part of another."""
    return tuple(
        replace(rule, pattern=re.escape(prefix) + rule.pattern, tower=tower) for rule in table
    )


def _escape_dots(pattern: str) -> str:
    return pattern.replace(".", r"\.")


def _parse_axis(word: str) -> Axis:
    role = word.lstrip("<+")
    if role not in ROLES:
        raise LayoutError(f"there is no axis role {role}; use one of {', '.join(ROLES)}")
    return Axis(role, reads="<" in word, writes="+" in word)
