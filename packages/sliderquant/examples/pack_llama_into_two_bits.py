"""Pack a language model into 2 bits that stay packed in memory, and make a copy for servers.

    python pack_llama_into_two_bits.py models/llama notes.txt [SAMPLES LENGTH]

The script writes the folder ``llama-w2-native``, which ``sliderquant.load`` reads. It also writes
``llama-w2-served``, which holds the same values in the space of 4 bits, because servers read no
asymmetric 2 bits. It prints the memory of the packed model and a text that it writes.
"""

import sys

from transformers import AutoTokenizer

import sliderquant
from sliderquant.config import ExportConfig

model_folder, calibration_text = sys.argv[1:3]
samples, length = map(int, sys.argv[3:5] or (128, 2048))

# Small groups and a zero point: two bits need both.
config = sliderquant.QuantizeConfig(
    model=model_folder,
    calib=(calibration_text,),
    out="llama-w2-native",
    wbits=2,
    group_size=64,
    sym=False,
    format="native",
    nsamples=samples,
    seqlen=length,
)
sliderquant.quantize(config)

# Linear layers hold packed codes; embeddings and head are as they were.
model = sliderquant.load("llama-w2-native")
held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
print(f"{held / 1e6:.1f} MB in memory")

tokenizer = AutoTokenizer.from_pretrained("llama-w2-native")
prompt = tokenizer("The window", return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
text = tokenizer.decode(ids[0])
print(text)

# The same values in a container that transformers and vLLM read.
sliderquant.export(ExportConfig(model="llama-w2-native", out="llama-w2-served", container_bits=4))
