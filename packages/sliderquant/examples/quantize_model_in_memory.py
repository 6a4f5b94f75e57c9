"""Quantize a model that is in memory, on token ids of your own, in a script of your own.

    python quantize_model_in_memory.py models/llama notes.txt [SAMPLES LENGTH]

The model gets dequantized 4-bit weights in place of its own, so that it can be judged by your own
measures at once. The script prints its loss before and after. To store a model in fewer bytes, use
``sliderquant quantize``.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sliderquant import SliderConfig, calibrate
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.simulation import fresh_learnables, simulated_weights
from sliderquant.adapters.text import begin_tokens, chunks, encode

model_folder, text = sys.argv[1:3]
samples, length = map(int, sys.argv[3:5] or (64, 512))
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(device).eval()
tokenizer = AutoTokenizer.from_pretrained(model_folder)

# Any token ids [samples, length] will do, each row begun as the tokenizer begins a text (BOS); the
# last sample is held out.
stream = encode([Path(text).read_text(encoding="utf-8")], tokenizer)
rows = list(chunks(stream, length, begin=begin_tokens(tokenizer)))
tokens = torch.cat(rows[: samples + 1])
held_out = tokens[-1:].to(device)
with torch.no_grad():
    before = float(model(input_ids=held_out, labels=held_out).loss)

# Compensated rounding: no windows, and what it solves is kept in ``learnables``.
config = SliderConfig(wbits=4, group_size=64)
decoder = TransformersDecoder(model)
learnables = fresh_learnables(decoder, config, torch.bfloat16)  # the type of the scales
calibrate(decoder, tokens[:-1], [], learnables, config)

# The dequantized weights of each block take the place of its own.
for block, weights in zip(model.model.layers, simulated_weights(decoder, learnables), strict=True):
    block.load_state_dict(weights, strict=False)
with torch.no_grad():
    after = float(model(input_ids=held_out, labels=held_out).loss)
print(f"{before:.4f} nats per token before, {after:.4f} after")
