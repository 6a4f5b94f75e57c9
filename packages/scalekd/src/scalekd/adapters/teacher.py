"""A teacher cut in two: a trunk that only looks at images, and a frozen tail that gradients pass.

The tail is a list of the teacher's own modules. A forward pass of the whole teacher records what each
of them was called with; the tail is then replayed on other tokens with the same extra arguments
(rotary embeddings, masks, shared biases), so no family needs a copy of its forward code.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effml_common.errors import ConfigError, InputError

Layout = Literal["NLC", "NHWC", "NCHW"]
Prefix = Literal["teacher", "none"]
TRIED = ("blocks", "layers", "stages")
TOLERANCE = 1e-4  # of a replay in float32; families differ from their own forward by rounding only


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a replay of the tail needs beside tokens.

    Attributes:
        layout: Of the tail's input and output.
        grid: (h, w) of the tail's input.
        calls: Extra positional and keyword arguments of each tail module.
        prefix: Class and register tokens at the tail's input, [b, p, c]; p may be 0.
    """

    layout: Layout
    grid: tuple[int, int]
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    prefix: Tensor | None


@dataclass(frozen=True, kw_only=True)
class TeacherOut:
    """One pass of the teacher over a batch.

    Attributes:
        logits: [b, classes], or None where the teacher has no classifier.
        tokens: Final spatial tokens, [b, n, d], after the final norm where there is one.
        grid: Their (h, w).
        split: Spatial tokens at the tail's input, [b, n3, d3].
        context: For ``TeacherSplit.tail``.
    """

    logits: Tensor | None
    tokens: Tensor
    grid: tuple[int, int]
    split: Tensor
    context: Context


class TeacherSplit:
    """A frozen teacher with a tail; not a module, so that no copy of it enters a checkpoint.

    The teacher is put into evaluation mode, and its parameters stop requiring gradients.

    Args:
        model: Any module that maps images to logits.
        tail: Modules that ``model`` calls one after the other at its end, the first of them on
            tokens or a map; the output of the last is what the student imitates.
        layout: Of what the tail works on.
        prefix_tokens: Leading tokens that are no part of the grid (NLC only).
        prefix: ``teacher`` puts the teacher's own prefix tokens of the same image before the
            student's tokens; ``none`` leaves them away, as the released code does.
        classes: Whether the output is logits.
    """

    def __init__(
        self,
        model: nn.Module,
        tail: Sequence[nn.Module],
        layout: Layout = "NLC",
        prefix_tokens: int = 0,
        prefix: Prefix = "teacher",
        classes: bool = True,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.modules, self.prefix_tokens = tuple(tail), prefix_tokens
        self.layout: Layout = layout
        self.prefix: Prefix = prefix
        self.has_classes = classes
        self._replay = self._run

    @classmethod
    def from_timm(
        cls,
        model: nn.Module,
        tail: Literal["auto"] | Sequence[nn.Module] = "auto",
        tail_blocks: int = 2,
        prefix: Prefix = "teacher",
    ) -> "TeacherSplit":
        """Cut a timm model: the last stage of a hierarchy, the last blocks of a plain transformer.

        Args:
            model: Teacher.
            tail: Modules to use instead of the automatic choice.
            tail_blocks: Blocks in the tail of a plain transformer.
            prefix: See the class.

        Raises:
            InputError: If the family has no known tail.
        """
        modules = _find_tail(model, tail_blocks) if tail == "auto" else list(tail)
        attrs: Any = model
        plain = hasattr(model, "blocks")
        layout: Layout = "NLC" if plain else str(getattr(model, "output_fmt", "NCHW"))  # pyright: ignore[reportAssignmentType]
        return cls(
            model,
            modules,
            layout,
            getattr(model, "num_prefix_tokens", 0) if plain else 0,
            prefix,
            classes=getattr(attrs, "num_classes", 1) > 0,
        )

    @property
    def plain(self) -> bool:
        """Whether the teacher is a plain transformer rather than a hierarchy."""
        return self.layout == "NLC"

    @torch.no_grad()
    def forward(self, x: Tensor) -> TeacherOut:
        """Run the whole teacher on images normalised for it, [b, 3, h, w], and record."""
        assert not self.model.training, "the teacher must stay in evaluation mode"
        inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        outputs: list[Any] = []
        with ExitStack() as hooks:
            for i, module in enumerate(self.modules):
                handle = module.register_forward_pre_hook(
                    lambda _m, args, kwargs, i=i: inputs.__setitem__(i, (args, kwargs)),
                    with_kwargs=True,
                )
                hooks.callback(handle.remove)
            handle = self.modules[-1].register_forward_hook(lambda _m, _a, y: outputs.append(y))
            hooks.callback(handle.remove)
            logits = self.model(x)
        if len(inputs) < len(self.modules) or not outputs:
            raise InputError(
                "a module of the tail was not called by the teacher; name modules that its forward runs"
            )
        start, size = inputs[0][0][0], tuple(x.shape[-2:])
        context = Context(
            layout=self.layout,
            grid=self._grid(start, size),
            calls=tuple((inputs[i][0][1:], inputs[i][1]) for i in range(len(self.modules))),
            prefix=start[:, : self.prefix_tokens] if self.layout == "NLC" else None,
        )
        return TeacherOut(
            logits=logits if self.has_classes else None,
            tokens=self._tokens(outputs[-1]),
            grid=self._grid(outputs[-1], size),
            split=self._tokens(start),
            context=context,
        )

    def tail(self, tokens: Tensor, context: Context) -> Tensor:
        """Replay the tail on other tokens; gradients flow to them.

        Args:
            tokens: [m b, n3, d3] on the grid of the tail's input; several views of one batch of b
                images go in one call.
            context: What ``forward`` recorded for those b images.

        Returns:
            [m b, n, d].
        """
        prefix = context.prefix if self.prefix == "teacher" else None
        return self._replay(tokens, prefix, context)

    def compile(self, **options: Any) -> None:
        """Compile the replay; the trunk keeps its recording, which a compiler cannot see through."""
        self._replay = torch.compile(self._run, **options)

    def check_replay(self, x: Tensor) -> float:
        """Largest relative gap between the tail's replay of the teacher's own tokens and the teacher.

        Raises:
            InputError: If it is not rounding: then the modules are not the teacher's whole end.
        """
        out = self.forward(x)
        with torch.no_grad():
            keep, self.prefix = self.prefix, "teacher"
            try:
                again = self.tail(out.split, out.context)
            finally:
                self.prefix = keep
        gap = float((again - out.tokens).abs().max() / out.tokens.abs().max().clamp(min=1e-12))
        limit = TOLERANCE if out.tokens.dtype in (torch.float32, torch.float64) else 0.05
        if gap > limit:
            raise InputError(
                f"replaying the tail differs from the teacher by {gap:.1e} of its largest feature; "
                "pass tail=[modules] that run one after the other, or use_tpp=False"
            )
        return gap

    def _run(self, tokens: Tensor, prefix: Tensor | None, context: Context) -> Tensor:
        h, w = context.grid
        x = tokens
        if context.layout == "NHWC":
            x = tokens.unflatten(1, (h, w))
        elif context.layout == "NCHW":
            x = tokens.transpose(1, 2).unflatten(2, (h, w))
        elif prefix is not None and self.prefix_tokens:
            copies = len(tokens) // len(prefix)
            x = torch.cat([prefix.repeat(copies, 1, 1).to(tokens.dtype), tokens], dim=1)
        for module, (args, kwargs) in zip(self.modules, context.calls, strict=True):
            x = module(x, *args, **kwargs)
        skip = self.prefix_tokens if x.ndim == 3 and x.shape[1] != tokens.shape[1] else 0
        return self._tokens(x, skip)

    def _tokens(self, x: Tensor, prefix_tokens: int | None = None) -> Tensor:
        if self.layout == "NHWC":
            return x.flatten(1, 2)
        if self.layout == "NCHW":
            return x.flatten(2).transpose(1, 2)
        return x[:, self.prefix_tokens if prefix_tokens is None else prefix_tokens :]

    def _grid(self, x: Tensor, image: tuple[int, ...]) -> tuple[int, int]:
        if self.layout == "NHWC":
            return x.shape[1], x.shape[2]
        if self.layout == "NCHW":
            return x.shape[2], x.shape[3]
        return token_grid(x.shape[1] - self.prefix_tokens, image)


def token_grid(tokens: int, image: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a token sequence, from the proportions of the image.

    Raises:
        InputError: If the tokens fill no such grid (patches dropped, an unknown prefix).
    """
    h = round((tokens * image[-2] / image[-1]) ** 0.5)
    if h < 1 or tokens % h:
        raise InputError(
            f"{tokens} tokens fill no grid over an image of {image[-2]}x{image[-1]}; switch off "
            "patch dropout or token pruning, or give the number of prefix tokens"
        )
    return h, tokens // h


def _find_tail(model: nn.Module, tail_blocks: int) -> list[nn.Module]:
    parts: Any = model
    name = type(model).__name__
    if hasattr(model, "blocks") and hasattr(model, "norm"):
        if getattr(getattr(model, "patch_drop", None), "prob", 0):
            raise InputError(
                f"{name} drops patches, which loses the token grid; set patch_drop_rate=0"
            )
        depth = len(parts.blocks)
        if not 1 <= tail_blocks < depth:
            raise ConfigError(
                f"tail_blocks is {tail_blocks} but {name} has {depth} blocks; use 1 to {depth - 1}"
            )
        return [*parts.blocks[depth - tail_blocks :], parts.norm]
    for stages in ("layers", "stages"):
        if hasattr(model, stages) and len(getattr(parts, stages)) > 1:
            norm = getattr(parts, "norm" if hasattr(model, "norm") else "norm_pre", None)
            end = [norm] if isinstance(norm, nn.Module) else []
            return [getattr(parts, stages)[-1], *end]
    raise InputError(
        f"no tail is known for {name} (tried {', '.join(TRIED)}); pass tail=[modules] to "
        "TeacherSplit, or use_tpp=False"
    )
