"""Runs in the environment of vLLM: perplexity and a greedy continuation, as one line of JSON.

python servers_vllm.py MODEL_FOLDER request.json
"""

import json
import math
import os
import sys
from pathlib import Path

# Else it rounds the activations of 4-bit weights to 8 bits, on processors with AMX.
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(folder: str, request_file: str) -> None:
    import vllm  # pyright: ignore[reportMissingImports]

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    answer = {"version": vllm.__version__, "loads": False}
    try:
        measure(folder, request, answer)
    except Exception as error:  # what a server refuses is a result
        answer["error"] = " ".join(str(error).split())[-300:]
    print("RESULT " + json.dumps(answer))


def measure(folder, request, answer) -> None:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    # One token of a prompt is left off: vLLM wants room for one more.
    prompts = [{"prompt_token_ids": chunk[:-1]} for chunk in request["chunks"]]
    model = LLM(
        model=folder,
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=len(request["chunks"][0]),
        max_num_seqs=1,
    )
    answer["loads"] = True
    scoring = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0)
    losses = [
        -scores[token].logprob
        for result in model.generate(prompts, scoring)
        for token, scores in list(
            zip(result.prompt_token_ids, result.prompt_logprobs, strict=True)
        )[1:]
    ]
    answer["perplexity"] = math.exp(sum(losses) / len(losses))

    # The most likely next tokens, whatever they are.
    greedy = SamplingParams(max_tokens=request["new_tokens"], temperature=0, ignore_eos=True)
    (result,) = model.generate([{"prompt_token_ids": request["prompt"]}], greedy)
    answer["generated"] = list(result.outputs[0].token_ids)


main(*sys.argv[1:])
