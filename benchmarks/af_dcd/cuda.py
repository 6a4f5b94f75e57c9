"""Hot paths of af-dcd: a distilling step of the paper's Cityscapes pair, and its parts.

    python -m benchmarks.af_dcd.cuda --predict
    python -m benchmarks.af_dcd.cuda --out runs/cuda

Models and settings are those of ``af-dcd train --student af-dcd::cityscapes/deeplabv3_r18.py --teacher
af-dcd::cityscapes/deeplabv3_r101.py``. A step is what mmengine's loop asks of the model, without the
data loader, the copy of the batch and the hooks.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from af_dcd import PRESETS, omni_contrastive_loss
from af_dcd.adapters.mmseg.config_builder import replace_sync_bn, without_downloads
from af_dcd.adapters.mmseg.config_files import read_config
from af_dcd.adapters.mmseg.optimizer_wrappers import AfDCDOptimWrapper
from af_dcd.adapters.mmseg.segmentors import distill_step
from af_dcd.adapters.mmseg.shims import build_model, quiet
from af_dcd.method.mimicking import MaskedGeneration, feature_loss
from benchmarks.hot_path_timing import main
from benchmarks.hot_paths import HotPath, Kit, Step

SIZE = {False: (512, 1024), True: (64, 64)}  # height and width; tiny or not
CLASSES = 19


def waits(images: int) -> dict[str, Any]:
    """What a step reads from the device, and what a run without values is told.

    mmseg asks for the pixels that are not ignored, twice for the accuracy of each head, and for the
    number of ignored ones in each head's cross entropy.
    """
    height, width = SIZE[False]
    return {
        "accuracy.py:accuracy": images * height * width,
        "cross_entropy_loss.py:cross_entropy": 0,
        "segmentors.py:_check_labels": 0,
        "segmentors.py:parse_losses": 1.0,
        "stopping.py:check_finite": 1.0,
    }


class Autocast(AfDCDOptimWrapper):
    """The plain wrapper with the forward pass under autocast; mmengine's own asks for a real card."""

    def __init__(self, kit: Kit, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, branch_clip={"max_norm": 15.0})
        self._kit = kit

    @contextlib.contextmanager
    def optim_context(self, model: Any) -> Iterator[None]:
        """Autocast, as ``AmpOptimWrapper`` has it."""
        with self._kit.autocast():
            yield


def segmenter(name: str, tiny: bool, **changes: Any) -> dict[str, Any]:
    """Model of a shipped config for batches that are normalised already; narrow if tiny."""
    model = without_downloads(read_config(f"af-dcd::cityscapes/deeplabv3_{name}.py").model)
    replace_sync_bn(model)  # as mmengine does in one process
    model.data_preprocessor = {"type": "SegDataPreProcessor", "size": SIZE[tiny]}
    if tiny:
        model.backbone.update(depth=18, base_channels=8, stem_channels=8)
        model.decode_head.update(in_channels=64, channels=8)
        model.auxiliary_head.update(in_channels=32, channels=8)
    model.update(changes)
    return model


def batch_of(kit: Kit, images: int, tiny: bool) -> dict[str, Any]:
    """A batch as the model's preprocessor gives it."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = [kit.randint(CLASSES, 1, *SIZE[tiny]) for _ in range(images)]
    samples = [SegDataSample(gt_sem_seg=PixelData(data=each)) for each in labels]
    return {"inputs": kit.randn(images, 3, *SIZE[tiny]), "data_samples": samples}


def trained(kit: Kit, model: Any, autocast: bool) -> AfDCDOptimWrapper:
    """The config's optimizer, with the state that it has after the first step."""
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4)
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    clip = {"max_norm": 15.0}
    wrapper = (
        Autocast(kit, optimizer) if autocast else AfDCDOptimWrapper(optimizer, branch_clip=clip)
    )
    wrapper.initialize_count_status(model, 0, 40000)
    return wrapper


def full_step(kit: Kit, tiny: bool, *, images: int, autocast: bool) -> Step:
    """Student, teacher, branch, backward and optimizer."""
    teacher = {"config": {"model": segmenter("r101", tiny)}, "allow_untrained": True}
    small = {"groups": 4, "pool": 1, "patch": 2} if tiny else {}
    distill = {"preset": "cityscapes", **small}
    config = segmenter("r18", tiny, type="AfDCDEncoderDecoder", teacher=teacher, distill=distill)
    model: Any = kit.module(lambda: build_model(config))
    model.teacher.model = kit.module(lambda: model.teacher.model)  # no submodule of the student
    wrapper = trained(kit, model, autocast)
    batch = batch_of(kit, 2 if tiny else images, tiny)

    def step() -> object:
        with quiet():  # mmseg warns of sizes, at every step
            return distill_step(model, batch, wrapper)

    return step


def student_step(kit: Kit, tiny: bool) -> Step:
    """The student without distillation, under autocast where the device has it."""
    model: Any = kit.module(lambda: build_model(segmenter("r18", tiny)))
    wrapper, batch = trained(kit, model, autocast=True), batch_of(kit, 2 if tiny else 8, tiny)

    def step() -> None:
        with quiet(), wrapper.optim_context(model):
            losses = model(**batch, mode="loss")
        wrapper.update_params(model.parse_losses(losses)[0])

    return step


def contrast(kit: Kit, tiny: bool) -> Step:
    """Forward and backward of the contrast on a generated map and the teacher's."""
    shape = (2, 64, 16, 16) if tiny else (8, 2048, 64, 128)
    settings = PRESETS["cityscapes"].contrast_settings()
    generated, teacher = kit.randn(*shape).requires_grad_(), kit.randn(*shape)

    def step() -> torch.Tensor:
        loss = omni_contrastive_loss(generated, teacher, **settings)
        return torch.autograd.grad(loss, generated)[0]

    return step


def generator(kit: Kit, tiny: bool) -> Step:
    """Forward and backward of alignment, generator and mimicking under autocast."""
    count, widths, size = (2, (8, 16), (16, 16)) if tiny else (8, (512, 2048), (64, 128))
    module = kit.module(lambda: MaskedGeneration(*widths))
    student = kit.randn(count, widths[0], *size).requires_grad_()
    teacher = kit.randn(count, widths[1], *size)

    def step() -> object:
        with kit.autocast():
            generated = module(student)
        loss = feature_loss(generated.float(), teacher)
        return torch.autograd.grad(loss, [student, *module.parameters()])

    return step


PAIR = "DeepLabV3-R101 to DeepLabV3-R18, 512 x 1024, full method"
PATHS = [
    HotPath(
        f"one step, {PAIR}, batch 8, bf16 autocast",
        partial(full_step, images=8, autocast=True),
        fake="cpu",
        allow=waits(8),
        compile=False,  # what watches features and scores inside mmseg breaks the graph
    ),
    # On "gpu:0" a tensor on the wrong device raises; batch 2, because every block of the contrast is
    # a row of small operations, which the fake run takes long for.
    HotPath(
        f"one step, {PAIR}, batch 2, float32",
        partial(full_step, images=2, autocast=False),
        fake="gpu:0",
        allow=waits(2),
        compile=False,
    ),
    HotPath("the contrast alone, forward and backward", contrast, fake="gpu:0"),
    HotPath("the generator and mimicking alone, bf16 autocast", generator, fake="cpu"),
    HotPath(
        "student step alone, DeepLabV3-R18, batch 8, 512 x 1024, bf16 autocast",
        student_step,
        fake="cpu",
        allow=waits(8),
        compile=False,
    ),
]

if __name__ == "__main__":
    main("af_dcd", PATHS)
