"""Where a student's features are taken: two maps beside the logits, in one forward pass."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

from torch import Tensor, nn

from effml_common.errors import InputError
from scalekd.adapters.layouts import token_grid
from scalekd.adapters.student_families import default_taps, last_map

Taps = Literal["auto"] | Sequence[int] | Sequence[str]


class StudentTap(nn.Module):
    """A student that also returns two maps; its weights are the student's own.

    Args:
        model: Student: of timm, or any module that maps images to logits.
        taps: ``auto`` and pairs of indices use timm's ``forward_intermediates``; a pair of module
            names (``layer3``, ``layer4``) works for any network.
        prefix_tokens: Leading tokens to drop where a named module returns [b, n, c].

    Raises:
        InputError: If the model offers neither, a name is unknown, or it drops patches.

    >>> import timm, torch
    >>> student = StudentTap(timm.create_model("test_resnet", num_classes=10))
    >>> logits, s3, s4 = student(torch.randn(2, 3, 64, 64))
    >>> tuple(logits.shape), tuple(s3.shape), tuple(s4.shape)
    ((2, 10), (2, 192, 4, 4), (2, 96, 2, 2))
    """

    def __init__(self, model: nn.Module, taps: Taps = "auto", prefix_tokens: int = 0) -> None:
        super().__init__()
        self.model, self.prefix_tokens = model, prefix_tokens
        name = type(model).__name__
        if getattr(getattr(model, "patch_drop", None), "prob", 0) or "naflex" in name.lower():
            raise InputError(
                f"{name} drops or packs patches, which loses the token grid; "
                "set patch_drop_rate=0, or use a fixed-size student"
            )

        # Only networks of timm know their own intermediate maps.
        if taps == "auto":
            if not hasattr(model, "forward_intermediates"):
                raise InputError(
                    f"{name} has no forward_intermediates; name two modules, as in "
                    'taps=("layer3", "layer4")'
                )
            taps = default_taps(model)

        # Two places, and both of them there.
        if len(taps) != 2:
            raise InputError(f"{len(taps)} taps were given; give two, the earlier first")
        self.taps = tuple(taps)
        if isinstance(self.taps[0], str):
            known = dict(model.named_modules())
            if missing := [tap for tap in self.taps if tap not in known]:
                children = ", ".join(list(dict(model.named_children())))
                raise InputError(f"{name} has no module {missing[0]}; it has {children}")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [b, classes] and the maps S3 and S4, [b, c, h, w] each."""
        if isinstance(self.taps[0], str):
            return self._forward_with_hooks(x)
        model: Any = self.model
        # timm sorts the indices, so equal depths cannot be asked for twice.
        final, maps = model.forward_intermediates(x, indices=list(self.taps), output_fmt="NCHW")
        s4 = last_map(model, final, maps[1]) if self.taps[1] == -1 else maps[1]
        return model.forward_head(final), maps[0], s4

    def _forward_with_hooks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run a network that knows nothing of taps, and catch what two of its modules return."""
        outputs: dict[str, Any] = {}
        modules = dict(self.model.named_modules())
        with ExitStack() as hooks:
            for tap in map(str, self.taps):
                handle = modules[tap].register_forward_hook(
                    lambda _m, _a, y, tap=tap: outputs.__setitem__(tap, y)
                )
                hooks.callback(handle.remove)
            logits = self.model(x)
        s3, s4 = (self._as_map(str(tap), outputs.get(str(tap)), x) for tap in self.taps)
        return getattr(logits, "logits", logits), s3, s4

    def _as_map(self, tap: str, value: Any, x: Tensor) -> Tensor:
        """Turn whatever a named module returns into a map."""
        value = getattr(value, "last_hidden_state", value)
        value = value[0] if isinstance(value, tuple) else value
        if not isinstance(value, Tensor) or value.ndim not in (3, 4):
            raise InputError(f"module {tap} returns no map or tokens; name another")
        if value.ndim == 4:
            return value
        spatial = value[:, self.prefix_tokens :]
        return spatial.transpose(1, 2).unflatten(2, token_grid(spatial.shape[1], tuple(x.shape)))
