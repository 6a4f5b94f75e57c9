"""The updates that fp16's scaler leaves out, counted on the device."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effml_common.errors import NonFiniteError

SMALLEST_SCALE = 1.0  # gradients that overflow without being scaled up are no matter of the scale


class OverflowCounter:
    """Counts overflowing updates, and tells when lowering the scale no longer helps.

    The scaler starts at 65536 and halves its scale whenever a gradient overflows, so that several
    skipped updates in a row are how it finds its scale. Only a scale below 1 is a sign of divergence.

    Args:
        scaler: A ``torch.amp.GradScaler``.
        device: Where the gradients are.
        skipped: How many updates were skipped before.
    """

    def __init__(self, scaler: Any, device: torch.device, skipped: int = 0) -> None:
        self.scaler = scaler
        self._skipped = torch.full((), float(skipped), device=device)

    def count(self, scaled_norm: Tensor) -> None:
        """Count an update by the norm of its scaled gradient; nothing waits for the device."""
        self._skipped += 1 - scaled_norm.isfinite().float()

    def read(self, step: int, last_good: Path) -> int:
        """Return how many updates were skipped in all.

        Raises:
            NonFiniteError: If the scale has fallen below 1.
        """
        scale = self.scaler.get_scale()
        if scale < SMALLEST_SCALE:
            raise NonFiniteError(
                f"gradients overflow in fp16 at step {step}, and their scale is down to {scale:.3g} "
                f"(last good checkpoint: {last_good}); use bf16 or lower the learning rate"
            )
        return int(self._skipped)
