"""ScaleKD as a training task of timm.

Only ``trainable_module`` (student and projectors) is wrapped by DDP, compiled and averaged; the teacher
is no submodule, so nothing of it reaches a checkpoint.
"""

import copy
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from effml_common.errors import ConfigError, InputError
from scalekd.adapters.pairing import Plan, plan_pair
from scalekd.adapters.pixels import PixelStatistics, resolve_images
from scalekd.adapters.student import StudentTap, Taps
from scalekd.adapters.teacher import TeacherOut, TeacherSplit
from scalekd.config import ScaleKDConfig
from scalekd.method.logit_distillation import logit_loss
from scalekd.method.parameter_perception import Projectors

# Names of the terms in results and logs, by stage and view.
TERM_NAMES = {"s3_full": "spat_s3", "s3_ac": "ac_s3", "s4_full": "spat_s4", "s4_ac": "ac_s4"}


class ScaleKDTrainable(nn.Module):
    """Student and projectors: all that has gradients, in one forward pass for DDP.

    Args:
        tap: Tapped student.
        projectors: Built for it and the teacher; None trains the student alone.
    """

    def __init__(self, tap: StudentTap, projectors: Projectors | None) -> None:
        super().__init__()
        # The student is registered once, under a name of its own; the tap only calls it.
        self.student = tap.model
        self.projectors = projectors
        self._tap = [tap]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScaleKDTrainable":
        # For averages of the weights: the tap of a copy must call the copy's student.
        tap = self._tap[0]
        student = copy.deepcopy(self.student, memo)
        tap_copy = StudentTap(student, tap.taps, tap.prefix_tokens)  # pyright: ignore[reportArgumentType]
        trainable = ScaleKDTrainable(tap_copy, copy.deepcopy(self.projectors, memo))
        trainable.train(self.training)
        return trainable

    @property
    def tap(self) -> StudentTap:
        """The student with its two maps."""
        return self._tap[0]

    def forward(
        self, x: Tensor, teacher: TeacherOut, split: TeacherSplit
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits, and the unweighted terms of the mimicking loss by stage and view."""
        logits, s3, s4 = self._tap[0](x)
        if self.projectors is None:
            return logits, {}

        def tail(tokens: Tensor) -> Tensor:
            return split.tail(tokens, teacher.context)

        return logits, self.projectors(s3, s4, teacher.tokens, tail)

    def no_weight_decay(self) -> set[str]:
        """Return names that weight decay leaves alone: the student's, positions and queries."""
        of_student = getattr(unwrap_model(self.student), "no_weight_decay", set)()
        learned_inputs = (".position", ".queries")
        of_projectors = {n for n, _ in self.named_parameters() if n.endswith(learned_inputs)}
        return {f"student.{name}" for name in of_student} | of_projectors

    def group_matcher(self, coarse: bool = False) -> Any:
        """Return layers for layer-wise decay: the student's, with the projectors on top."""
        student = unwrap_model(self.student)
        if not hasattr(student, "group_matcher"):
            return {}
        layers = group_parameters(student, student.group_matcher(coarse=coarse), reverse=True)
        top = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix("student."), top)


class ScaleKDTask(TrainingTask):
    """Train a student by its labels, the teacher's logits and the teacher's last features.

    Args:
        student: timm name (built untrained) or module.
        teacher: timm name (built with its weights), module, or ``TeacherSplit``.
        config: Method; None is the paper's.
        criterion: Loss of the labels; None is cross entropy.
        img_size: (h, w) of the student's images; None reads it off the student's timm settings.
        taps: See ``StudentTap``.
        teacher_norm: (mean, std) of the teacher's pixels; None reads it off its timm settings.
        student_norm: The same for the student, as the incoming batches are normalised.
        teacher_resize: ``auto`` resizes images for a teacher that takes one size only; ``none``
            refuses.
        device: Device.

    Raises:
        InputError: If the teacher has no known tail, or the tail does not replay to the teacher.
        ConfigError: If classes, heads or sizes do not fit.

    >>> import torch
    >>> from timm.models.resnet import BasicBlock, ResNet
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> teacher = VisionTransformer(
    ...     img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5
    ... )
    >>> student = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 8, 12, 16))
    >>> task = ScaleKDTask(student, teacher, img_size=(32, 32)).train()
    >>> result = task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    >>> result["loss"].backward()
    >>> sorted(result)
    ['ac_s3', 'ac_s4', 'kd_loss', 'loss', 'output', 'spat_s3', 'spat_s4', 'task_loss']
    >>> task.export_student() is student  # nothing of the training is in it
    True
    """

    def __init__(
        self,
        student: nn.Module | str,
        teacher: nn.Module | TeacherSplit | str,
        *,
        config: ScaleKDConfig | None = None,
        criterion: nn.Module | None = None,
        img_size: tuple[int, int] | None = None,
        taps: Taps = "auto",
        teacher_norm: PixelStatistics | None = None,
        student_norm: PixelStatistics | None = None,
        teacher_resize: Literal["auto", "none"] = "auto",
        device: torch.device | None = None,
    ) -> None:
        super().__init__(device=device, verbose=False)
        config = config or ScaleKDConfig()
        student = timm.create_model(student) if isinstance(student, str) else student
        if isinstance(teacher, str):
            teacher = timm.create_model(teacher, pretrained=True)

        # Both networks on the device. The teacher stands in a list, so that it is no submodule.
        student.to(self.device)
        if isinstance(teacher, nn.Module):
            teacher = TeacherSplit.from_timm(
                teacher, tail_blocks=config.tail_blocks, prefix=config.tpp_prefix
            )
        teacher.model.to(self.device)
        self._split = [teacher]
        # A loss may hold tensors of its own: weights of classes, say.
        self.criterion = (criterion if criterion is not None else nn.CrossEntropyLoss()).to(
            self.device
        )

        # What each network expects of its images.
        self.images = resolve_images(
            student,
            teacher.model,
            size=img_size,
            resize=teacher_resize,
            student_pixels=student_norm,
            teacher_pixels=teacher_norm,
        )
        (mean_s, std_s), (mean_t, std_t) = self.images.student_pixels, self.images.teacher_pixels
        statistics = {"mean_s": mean_s, "std_s": std_s, "mean_t": mean_t, "std_t": std_t}
        for name, values in statistics.items():
            column = torch.tensor(tuple(values), device=self.device).view(1, -1, 1, 1)
            self.register_buffer(name, column, persistent=False)

        # The method's settings for this pair. A tail that is not the teacher's own end is refused;
        # on the meta device there are no values to compare.
        tap = StudentTap(student, taps)
        sizes = self.images.student_size, self.images.teacher_size
        self.plan: Plan = plan_pair(teacher, tap, config, *sizes)
        weight = next(teacher.model.parameters())
        if config.use_tpp and weight.device.type != "meta":
            h, w = self.images.teacher_size
            teacher.check_replay(torch.linspace(-1, 1, 3 * h * w).view(1, 3, h, w).to(weight))

        # Student and projectors: all that has gradients.
        projectors = Projectors(self.plan.shape) if self.plan.shape.weights else None
        self.trainable_module: nn.Module = ScaleKDTrainable(tap, projectors).to(self.device)

    @property
    def split(self) -> TeacherSplit:
        """The teacher."""
        return self._split[0]

    def teacher_input(self, x: Tensor) -> Tensor:
        """Turn a batch normalised for the student into what the teacher expects."""
        mean_s, std_s, mean_t, std_t = self.mean_s, self.std_s, self.mean_t, self.std_t
        pixels = (x.float() * std_s + mean_s - mean_t) / std_t  # pyright: ignore[reportOperatorIssue]
        if tuple(pixels.shape[-2:]) != self.images.teacher_size:
            pixels = F.interpolate(pixels, self.images.teacher_size, mode="bicubic", antialias=True)
        return pixels.to(next(self.split.model.parameters()).dtype)

    def teach(self, x: Tensor) -> TeacherOut:
        """Run the teacher over a batch normalised for the student, without gradients."""
        with torch.no_grad():
            return self.split.forward(self.teacher_input(x))

    def forward(
        self,
        input: Tensor,  # noqa: A002 (timm's name)
        target: Tensor,
        teacher: TeacherOut | None = None,
    ) -> dict[str, Tensor]:
        """Run one training pass: the total loss and its parts.

        Args:
            input: Images normalised for the student, [b, 3, h, w]; mix them before, not after.
            target: Labels [b], or soft ones [b, classes].
            teacher: What ``teach`` made of the same images; None runs the teacher.

        Returns:
            ``loss``, ``output`` (logits), ``task_loss``, ``kd_loss`` and the terms ``spat_s3``,
            ``ac_s3``, ``spat_s4``, ``ac_s4``, unweighted; absent where they are off.

        Raises:
            InputError: If a single image would train batch norms.
        """
        if self.training and len(input) < 2 and self.plan.shape.stem_norm == "bn":
            raise InputError(
                "a batch of 1 cannot train batch norms; use --stem-norm ln, a larger batch, or "
                "--sync-bn with several processes"
            )

        # The teacher looks first, without gradients; the student and the projectors follow.
        out = self.teach(input) if teacher is None else teacher
        logits, terms = self.trainable_module(input, out, self.split)

        # Labels, and beside them the teacher's logits.
        task_loss = self.criterion(logits, target)
        result = {"output": logits, "task_loss": task_loss}
        loss, alpha = task_loss, self.plan.kd_alpha
        if alpha:
            assert out.logits is not None
            result["kd_loss"] = logit_loss(logits, out.logits, self.plan.kd_t)
            loss = (1 - alpha) * task_loss + alpha * result["kd_loss"]

        # The teacher's last features, by stage and view.
        for (stage, view), weight in self.plan.shape.weights.items():
            term = terms[f"{stage}_{view}"]
            loss = loss + weight * term
            result[TERM_NAMES[f"{stage}_{view}"]] = term
        return {"loss": loss, **result}

    def shares(self, result: dict[str, Tensor]) -> dict[str, float]:
        """Return the share of each weighted term in the loss, in [0, 1]."""
        alpha = self.plan.kd_alpha
        parts = {"task_loss": (1 - alpha) * float(result["task_loss"].detach())}
        if alpha:
            parts["kd_loss"] = alpha * float(result["kd_loss"].detach())
        for (stage, view), weight in self.plan.shape.weights.items():
            name = TERM_NAMES[f"{stage}_{view}"]
            parts[name] = weight * float(result[name].detach())
        total = sum(parts.values()) or 1.0
        return {name: part / total for name, part in parts.items()}

    def train(self, mode: bool = True) -> "ScaleKDTask":
        """Set the mode of student and projectors; the teacher stays in evaluation mode."""
        super().train(mode)
        self.split.model.eval()
        return self

    def prepare_distributed(
        self, device_ids: list[int] | None = None, **ddp_kwargs: Any
    ) -> "ScaleKDTask":
        """Wrap what has gradients in DDP; there are no unused parameters."""
        from torch.nn.parallel import DistributedDataParallel

        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile student and projectors with the tail inside; returns the student for evaluation."""
        trainable: Any = self.trainable_module
        self.eval_model = torch.compile(
            trainable.student, backend=backend, mode=mode, **compile_kwargs
        )
        self.trainable_module = torch.compile(  # pyright: ignore[reportAttributeAccessIssue]
            trainable, backend=backend, mode=mode, **compile_kwargs
        )
        return self.eval_model  # pyright: ignore[reportReturnType]

    def inner(self, ema: bool = False) -> ScaleKDTrainable:
        """Return student and projectors without the wrappers of DDP, compilation or averaging.

        Raises:
            ConfigError: If averaged weights are wanted and there are none.
        """
        module: Any = self.get_trainable_module(ema=ema)
        while not isinstance(module, ScaleKDTrainable):
            module = getattr(module, "module", None) or getattr(module, "_orig_mod", None)
            if module is None:
                raise ConfigError("there are no averaged weights; call setup_ema first")
        return module

    def get_eval_model(
        self, module: nn.Module | None = None, ema: bool = False
    ) -> nn.Module | None:
        """Return the bare student, or its average; None without one."""
        if module is None and hasattr(self, "eval_model") and not ema:
            return self.eval_model  # pyright: ignore[reportReturnType]
        if ema and not self.has_ema():
            return None
        return self.inner(ema).student

    def export_student(self, ema: bool = False) -> nn.Module:
        """Return the student object itself; it holds nothing of the training."""
        return unwrap_model(self.inner(ema).student)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the projectors, which timm's checkpoints keep beside the student."""
        if ema and not self.has_ema():
            return {}
        projectors = self.inner(ema).projectors
        return {} if projectors is None else {"projectors": projectors.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Put the projectors back."""
        projectors = self.inner(ema).projectors
        if state and projectors is not None:
            projectors.load_state_dict(state["projectors"], strict=strict)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return parameters for gradient clipping; ``exclude_head`` omits the student's last two."""
        of_student = list(self.inner().student.parameters())
        projectors = self.inner().projectors
        of_projectors = [] if projectors is None else list(projectors.parameters())
        return (of_student[:-2] if exclude_head else of_student) + of_projectors
