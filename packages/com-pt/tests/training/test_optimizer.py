"""The optimizer of a stage."""

from pathlib import Path

from com_pt_tiny import spec, task_of

from com_pt.training.optimizer import parameter_groups
from com_pt.training.stage_model import StageModel


def test_decay_spares_norms_biases_scales_and_positions() -> None:
    model = StageModel(None, task_of(Path()).build(spec(32)), None)  # pyright: ignore
    names = {id(p): n.removeprefix("model.") for n, p in model.named_parameters()}
    spared = {names[id(p)] for p in parameter_groups(model, 0.1)[1]["params"]}
    decayed = {names[id(p)] for p in parameter_groups(model, 0.1)[0]["params"]}
    assert {"logit_scale", "positional_embedding", "visual.class_embedding", "ln_final.weight",
            "visual.positional_embedding"} <= spared  # fmt: skip
    assert {"token_embedding.weight", "visual.proj", "visual.conv1.weight"} <= decayed
