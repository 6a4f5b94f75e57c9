"""Find the blocks of a language model that suffer most from 2 bits, without calibrating anything.

    python find_blocks_that_suffer_most.py models/llama notes.txt [CHUNKS LENGTH]

One block at a time is rounded to the nearest codes, all others stay as they are. The script prints the
blocks by the KL divergence that they cause, and writes a report with a plot to ``suffering/run``.
"""

import sys

from sliderquant.commands.sensitivity import sensitivity
from sliderquant.config import SensitivityConfig

model_folder, text = sys.argv[1:3]
chunks, length = map(int, sys.argv[3:5] or (8, 512))

report = sensitivity(
    SensitivityConfig(
        model=model_folder,
        text=(text,),
        wbits=2,
        group_size=None,  # one scale for each row
        nsamples=chunks,
        seqlen=length,
        out="suffering",
    )
)

damage = {row.name: row.metrics["kl"][0] for row in report.rows}
total = sum(damage.values())
for name in sorted(damage, key=lambda name: -damage[name]):
    print(f"{name}: KL {damage[name]:.2e} nats per token, {damage[name] / total:.0%} of the sum")
for note in report.notes:
    print(note)
