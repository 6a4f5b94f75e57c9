"""All metrics of random models on one folder; a program, so that several processes can measure them."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from com_pt_tiny import WORDS, clip, vit

from com_pt.method.metrics import linear_probe
from com_pt.training.data.captions import CaptionData
from com_pt.training.embedding import encode_pictures
from com_pt.training.streaming import Reading
from com_pt.training.tasks.causal_lm import CausalLMTask
from com_pt.training.tasks.classify import ClassifyTask
from com_pt.training.tasks.clip import ClipTask


class Language(torch.nn.Embedding):
    """A language model that looks at the last token only."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(input_ids))


def measure(folder: Path) -> dict[str, Any]:
    """Zero-shot, retrieval, probe, top-1 and perplexity; the folder holds pictures and tables."""
    # A CLIP, in batches that do not divide 48.
    torch.manual_seed(0)
    data = {"val_batch": 5, "image_size": [8, 16]}
    names = {"classes": ["red", "green", "blue"], "templates": ["a {}", "a {} square"]}
    words = {"tokenizer": WORDS, "context_length": 8, "val": f"{folder}/captions.tsv"}
    zero_shot = {"images": f"{folder}/names.csv", **names}
    model = clip(32)
    task = ClipTask({**data, **words, "zero_shot": zero_shot})
    metrics: dict[str, Any] = task.evaluate(model)

    # A probe of its embeddings.
    held_out = CaptionData.open(task.data, "val", captions=None)
    features = encode_pictures(model, held_out, Reading.of(data, model))
    labels = torch.arange(48) % 3
    metrics |= linear_probe(features[:30], labels[:30], features[30:], labels[30:])
    metrics["features"] = features.double().sum(0).tolist()

    # A classifier.
    labelled = {**data, "val": f"{folder}/labels.csv", "classes": 5, "image_size": 16}
    metrics |= ClassifyTask(labelled).evaluate(vit(32))

    # Three batches, and one: a process of two gets a smaller share, and none.
    for count in (11, 3):
        blocks = {"length": 32, "val_batch": 4, "val_blocks": count}
        task = CausalLMTask({"val": f"{folder}/text.txt", **blocks})
        losses = task.evaluate(Language(257, 257))
        metrics |= {f"{name} of {count}": value for name, value in losses.items()}
    return metrics


if __name__ == "__main__":
    torch.distributed.init_process_group(
        "gloo", init_method=sys.argv[2], rank=int(os.environ["RANK"]), world_size=2
    )
    measured = measure(Path(sys.argv[1]))
    if torch.distributed.get_rank() == 0:
        print(json.dumps([torch.distributed.get_world_size(), measured]))
    torch.distributed.destroy_process_group()
