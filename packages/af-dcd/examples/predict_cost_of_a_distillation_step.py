"""Predict what a step of distillation costs, from two mmsegmentation configs alone.

    python predict_cost_of_a_distillation_step.py [STUDENT TEACHER]

Neither data nor weights are read: shapes and operations are counted. By default the pair is the paper's
on Cityscapes. The script prints for each setting the GMAC (10^9 multiply-accumulates) of a step on one
crop, how many times a step of logits distillation that is, and the memory of the branch with its
gradients and momentum.
"""

import sys

from af_dcd.commands.inspect import inspect
from af_dcd.config import InspectConfig

pair = ("af-dcd::cityscapes/deeplabv3_r18.py", "af-dcd::cityscapes/deeplabv3_r101.py")
student, teacher = sys.argv[1:3] or pair

settings = {"the whole method": (), "with a generator of 256 channels": ("hidden=256",)}
costs = {}
for name, method in settings.items():
    costs[name] = inspect(InspectConfig(student=student, teacher=teacher, method=method)).values
    gmac = costs[name]["GMAC a crop: step (backward counted as two forwards)"]
    times = costs[name]["step against a step of logits KD"]
    branch = costs[name]["bytes of the branch with gradient and momentum"] / 1e6
    print(f"{name}: {gmac:,.1f} GMAC, {times:.2f} times, {branch:,.1f} MB for the branch")
