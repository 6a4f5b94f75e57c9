"""Runs in the environment of llama.cpp: perplexity, text and speed of a GGUF file, as one line of JSON.

python servers_llama_cpp.py model.gguf request.json
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def main(model_file: str, request_file: str) -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    chunks, length = request["chunks"], len(request["chunks"][0])
    model = llama_cpp.Llama(
        model_file, n_ctx=length, n_batch=length, n_threads=1, logits_all=True, verbose=False
    )
    answer = {"version": llama_cpp.__version__}

    # Every position behind the first one is scored.
    losses = []
    for chunk in chunks:
        model.reset()
        model.eval(chunk)
        scores = np.array(model.scores[: length - 1], dtype=np.float64)
        scores -= scores.max(axis=-1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        losses.append(-scores[np.arange(length - 1), chunk[1:]])
    answer["perplexity"] = float(np.exp(np.mean(losses)))

    # Tokens of a text as llama.cpp splits it, and a greedy continuation, timed token by token.
    answer["tokens"] = model.tokenize(request["text"].encode(), add_bos=False, special=True)
    model.reset()
    model.eval(request["prompt"])
    generated, begin = [], time.perf_counter()
    for _ in range(request["new_tokens"]):
        last = np.array(model.scores[model.n_tokens - 1])
        generated.append(int(last.argmax()))
        model.eval(generated[-1:])
    answer["tokens_per_second"] = len(generated) / (time.perf_counter() - begin)
    answer["generated"] = generated
    print("RESULT " + json.dumps(answer))


main(*sys.argv[1:])
