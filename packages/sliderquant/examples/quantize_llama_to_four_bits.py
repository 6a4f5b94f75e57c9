"""Quantize a language model to 4 bits, and see what it costs on text that was not calibrated on.

    python quantize_llama_to_four_bits.py models/llama notes.txt held_out.txt [SAMPLES LENGTH]

The folder holds any supported model of transformers and its tokenizer. The script writes the folder
``llama-w4``, which transformers and vLLM load, and prints the perplexity of full precision, of rounding
to the nearest and of the result. Loading needs ``pip install compressed-tensors``.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from sliderquant import QuantizeConfig, quantize

model_folder, calibration_text, held_out_text = sys.argv[1:4]
samples, length = map(int, sys.argv[4:6] or (128, 2048))

config = QuantizeConfig(
    model=model_folder,
    calib=(calibration_text,),
    eval_text=(held_out_text,),
    out="llama-w4",
    wbits=4,
    group_size=128,  # must divide the inputs of every layer
    nsamples=samples,
    seqlen=length,
)
report = quantize(config)
for row in report.rows:
    for name, values in row.metrics.items():
        print(f"{row.name}: {name} {values[0]:.4g}")

# Plain transformers from here on.
model = AutoModelForCausalLM.from_pretrained("llama-w4")
tokenizer = AutoTokenizer.from_pretrained("llama-w4")
prompt = tokenizer("The window", return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
text = tokenizer.decode(ids[0])
print(text)
