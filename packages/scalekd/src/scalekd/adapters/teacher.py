"""A teacher cut in two: a trunk that only looks at images, and a frozen tail that gradients pass.

The tail is a list of the teacher's own modules (``teacher_families.py`` says which). A forward pass of
the whole teacher records what each of them was called with; the tail is then replayed on other tokens
with the same extra arguments (rotary embeddings, masks, shared biases), so no family needs a copy of its
forward code.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effml_common.errors import InputError
from scalekd.adapters.layouts import Layout, token_grid
from scalekd.adapters.teacher_families import find_tail, token_layout

Prefix = Literal["teacher", "none"]
# Largest gap of a replay, relative to the largest feature. Families differ from their own forward by
# rounding only.
REPLAY_TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-4, 0.05


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
            student's tokens; ``none`` runs the tail without them, as the released code does.
        classes: Whether the output is logits.

    >>> import torch
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> teacher = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)
    >>> split = TeacherSplit.from_timm(teacher, tail_blocks=1)
    >>> out = split.forward(torch.randn(2, 3, 32, 32))
    >>> out.split.shape == split.tail(out.split, out.context).shape == out.tokens.shape
    True
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
        modules = find_tail(model, tail_blocks) if tail == "auto" else list(tail)
        layout, prefix_tokens = token_layout(model)
        classes: Any = getattr(model, "num_classes", 1)
        return cls(model, modules, layout, prefix_tokens, prefix, classes=classes > 0)

    @property
    def plain(self) -> bool:
        """Whether the teacher is a plain transformer rather than a hierarchy."""
        return self.layout == "NLC"

    @torch.no_grad()
    def forward(self, x: Tensor) -> TeacherOut:
        """Run the whole teacher on images normalised for it, [b, 3, h, w], and record.

        Raises:
            InputError: If the teacher does not call every module of the tail.
        """
        assert not self.model.training, "the teacher must stay in evaluation mode"

        # Hooks note what each module of the tail is called with, and what the last one returns.
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

        # What a replay needs beside tokens.
        start, image = inputs[0][0][0], tuple(x.shape[-2:])
        context = Context(
            layout=self.layout,
            grid=self._grid(start, image),
            calls=tuple((inputs[i][0][1:], inputs[i][1]) for i in range(len(self.modules))),
            prefix=start[:, : self.prefix_tokens] if self.layout == "NLC" else None,
        )
        return TeacherOut(
            logits=logits if self.has_classes else None,
            tokens=self._tokens(outputs[-1]),
            grid=self._grid(outputs[-1], image),
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
        """Compare the tail's replay of the teacher's own tokens with the teacher.

        Args:
            x: Images normalised for the teacher, [b, 3, h, w].

        Returns:
            Largest gap, relative to the largest feature.

        Raises:
            InputError: If it is not rounding: then the modules are not the teacher's whole end.
        """
        # The teacher's own prefix tokens take part here, whatever the students get.
        out = self.forward(x)
        with torch.no_grad():
            replayed = self._replay(out.split, out.context.prefix, out.context)
        gap = float((replayed - out.tokens).abs().max() / out.tokens.abs().max().clamp(min=1e-12))

        precise = out.tokens.dtype in (torch.float32, torch.float64)
        limit = REPLAY_TOLERANCE if precise else HALF_PRECISION_TOLERANCE
        if gap > limit:
            raise InputError(
                f"replaying the tail differs from the teacher by {gap:.1e} of its largest feature; "
                "pass tail=[modules] that run one after the other, or use_tpp=False"
            )
        return gap

    def _run(self, tokens: Tensor, prefix: Tensor | None, context: Context) -> Tensor:
        # Tokens in the layout that the first module of the tail expects.
        h, w = context.grid
        x = tokens
        if context.layout == "NHWC":
            x = tokens.unflatten(1, (h, w))
        elif context.layout == "NCHW":
            x = tokens.transpose(1, 2).unflatten(2, (h, w))
        elif prefix is not None and self.prefix_tokens:
            copies = len(tokens) // len(prefix)
            x = torch.cat([prefix.repeat(copies, 1, 1).to(tokens.dtype), tokens], dim=1)

        # The modules as the teacher called them, then spatial tokens again.
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
