"""Optimizer wrappers that clip the gradient of the distillation branch alone, as the paper does."""

from typing import Any

from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from effml_common.stopping import check_finite


class BranchClipMixin:
    """Adds a clip for the gradient of the distillation branch, the weights of ``afdcd``, alone.

    Args:
        branch_clip: Arguments of ``clip_grad_norm_``; None for no clip.
        args, kwargs: Of the optimizer wrapper.
    """

    def __init__(
        self, *args: Any, branch_clip: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.branch_clip = branch_clip
        self._branch: list[nn.Parameter] = []

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Find the branch; mmengine calls this once, before the first iteration."""
        super().initialize_count_status(model, init_counts, max_counts)  # type: ignore[misc]
        branch = getattr(getattr(model, "module", model), "afdcd", None)
        self._branch = list(branch.parameters()) if branch is not None else []

    def _clip_branch(self) -> None:
        if self.branch_clip and self._branch:
            nn.utils.clip_grad_norm_(self._branch, **self.branch_clip)


@OPTIM_WRAPPERS.register_module()
class AfDCDOptimWrapper(BranchClipMixin, OptimWrapper):
    """``OptimWrapper`` with ``branch_clip``; refuses a gradient that is not finite."""

    def step(self, **kwargs: Any) -> None:
        """Clip and update.

        Raises:
            NonFiniteError: If a gradient is NaN or infinite; nothing is updated then.
        """
        # Student and branch together; a norm that is not finite has a gradient that is not.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        gradient_norm = nn.utils.get_total_norm(gradients)
        check_finite(0.0, gradient_norm, step=self._inner_count, term="total")

        self._clip_branch()
        super().step(**kwargs)


@OPTIM_WRAPPERS.register_module()
class AfDCDAmpOptimWrapper(BranchClipMixin, AmpOptimWrapper):
    """``AmpOptimWrapper`` with ``branch_clip``; its scaler skips updates that are not finite."""

    def step(self, **kwargs: Any) -> None:
        """Unscale, clip and update."""
        self.loss_scaler.unscale_(self.optimizer)
        self._clip_branch()
        if self.clip_grad_kwargs:
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update(self._scale_update_param)
