"""Quantize a model that is in memory, on token ids of your own, in a script of your own.

    python quantize_model_in_memory.py models/llama notes.txt [SAMPLES LENGTH]

The model gets dequantized 4-bit weights in place of its own, so that it can be judged by your own
measures at once: the script prints its loss before and after. Then it is saved in 4 bits.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sliderquant import SliderConfig, quantize_model

model_folder, text = sys.argv[1:3]
samples, length = map(int, sys.argv[3:5] or (64, 512))
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(model_folder).to(device).eval()
tokenizer = AutoTokenizer.from_pretrained(model_folder)

# Any token ids [samples, length] will do. Where the model expects BOS in front of a text, it belongs
# in front of every sample. The last row is held out.
stream = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
room = length - len(begin)
starts = range(0, min((samples + 1) * room, len(stream) - room + 1), room)
tokens = torch.tensor([begin + stream[start : start + room] for start in starts])
held_out = tokens[-1:].to(device)
with torch.no_grad():
    before = float(model(input_ids=held_out, labels=held_out).loss)

# In place: the linear weights of ``model`` hold the values of their codes.
result = quantize_model(model, tokens[:-1], SliderConfig(wbits=4, group_size=64))
with torch.no_grad():
    after = float(model(input_ids=held_out, labels=held_out).loss)
print(f"{before:.4f} nats per token before, {after:.4f} after")

# The folder that ``sliderquant quantize`` would write.
result.save("llama-w4-from-memory", tokenizer=tokenizer)
