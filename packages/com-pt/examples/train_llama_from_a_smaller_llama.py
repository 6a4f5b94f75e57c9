"""Train a Llama of twice the width and depth that starts from a finished one, in a loop of your own.

    python train_llama_from_a_smaller_llama.py models/small-llama text.txt [UPDATES BATCH LENGTH]

The directory holds a Llama of transformers and its tokenizer. Both parts of the method are used on
their own: ``grow`` gives the larger model the weights, and ``InverseFeatureLoss`` pulls its last hidden
states towards those of the small one. The script writes the folder ``large-llama``.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from com_pt import InverseFeatureLoss, grow

source, text = sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8")
updates, batch_size, length = map(int, sys.argv[3:6] or (10_000, 32, 512))
device = "cuda" if torch.cuda.is_available() else "cpu"

# Twice as many heads of the same size.
tokenizer = AutoTokenizer.from_pretrained(source)
small = LlamaForCausalLM.from_pretrained(source).to(device).eval().requires_grad_(False)
grown = ("hidden_size", "intermediate_size", "num_hidden_layers")
grown += ("num_attention_heads", "num_key_value_heads")
sizes = {name: 2 * getattr(small.config, name) for name in grown}
large = LlamaForCausalLM(LlamaConfig.from_pretrained(source, **sizes)).to(device)
report = grow(small, large, mode="lossless")  # the same logits as before
print(f"{report.inherited:.0%} of the weights are inherited")

# A linear map from the large model's width to the small one's; it is not saved.
widths = (large.config.hidden_size, small.config.hidden_size)
feature_loss = InverseFeatureLoss({"hidden": widths}).to(device)
parameters = [*large.parameters(), *feature_loss.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98))

ids = torch.tensor(tokenizer(text)["input_ids"])
blocks = ids[: len(ids) // length * length].view(-1, length)
losses = []
for update in range(updates):
    batch = blocks[torch.randint(len(blocks), (batch_size,))].to(device)
    with torch.no_grad():
        target = small.model(input_ids=batch).last_hidden_state
    output = large(input_ids=batch, labels=batch, output_hidden_states=True)
    hidden = feature_loss.project("hidden", output.hidden_states[-1])
    loss = output.loss + feature_loss({"hidden": hidden}, {"hidden": target})
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(output.loss.detach()))
    if update % 100 == 0 or update == updates - 1:
        print(f"update {update}: {losses[-1]:.3f} nats a token")

large.save_pretrained("large-llama")
tokenizer.save_pretrained("large-llama")
