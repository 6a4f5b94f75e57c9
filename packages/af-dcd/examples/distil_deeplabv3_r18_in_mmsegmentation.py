"""Distil a pair of mmsegmentation configs, and load the student with mmsegmentation alone.

    python distil_deeplabv3_r18_in_mmsegmentation.py teacher.pth photo.png [OUT STUDENT TEACHER ...]

The teacher and the student are config files, ``mmseg::<file>`` or ``af-dcd::<file>``; by default they
are the paper's DeepLabV3 on a ResNet-101 and on a ResNet-18 for Cityscapes. The student's config names
data and schedule. Further words are settings of the method, such as hidden=256. The script writes
``student.pth`` and ``student.py`` into OUT, and a coloured ``prediction.png`` of the photo. Run it again
to continue after an interruption.
"""

import sys

import numpy as np
from PIL import Image

from af_dcd.commands.train import train
from af_dcd.config import TrainConfig

checkpoint, photo = sys.argv[1:3]
pair = ["af-dcd::cityscapes/deeplabv3_r18.py", "af-dcd::cityscapes/deeplabv3_r101.py"]
out, student, teacher = sys.argv[3:6] or ("runs/r18", *pair)

report = train(
    TrainConfig(
        student=student,
        teacher=teacher,
        teacher_checkpoint=checkpoint,
        method=tuple(sys.argv[6:]),
        out=out,
        resume="auto",
    )
)
for name, values in report.rows[0].metrics.items():
    print(f"{name}: {values[0]:g}")

# mmsegmentation alone loads the student. Training has made it importable, also beside mmcv-lite.
from mmseg.apis import inference_model, init_model  # noqa: E402, TID253

model = init_model(f"{out}/student.py", f"{out}/student.pth", device="cpu")
prediction = inference_model(model, photo).pred_sem_seg.data[0].numpy()
palette = np.array(model.dataset_meta["palette"], dtype=np.uint8)
Image.fromarray(palette[prediction]).save("prediction.png")
classes = [model.dataset_meta["classes"][i] for i in np.unique(prediction)]
print(f"prediction.png shows {', '.join(classes)}")
