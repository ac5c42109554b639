"""Rewards by programs that know nothing of rayrm: `python outside_readers.py transformers|vllm model.json`.

Reads `{"model": path, "rows": [[token ids], …]}` and prints the raw logits as JSON.
"""

import json
import sys


def by_transformers(model, rows):
    import torch
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return [network(input_ids=torch.tensor([row])).logits[0].tolist() for row in rows]


def by_vllm(model, rows):
    import os

    # In this process, so that nothing outlives it.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, PoolingParams

    engine = LLM(model, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=128)
    prompts = [{"prompt_token_ids": row} for row in rows]
    outputs = engine.encode(prompts, PoolingParams(use_activation=False), pooling_task="classify", use_tqdm=False)
    return [output.outputs.data.tolist() for output in outputs]


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        given = json.load(file)
    found = {"transformers": by_transformers, "vllm": by_vllm}[sys.argv[1]](given["model"], given["rows"])
    print("\n" + json.dumps(found))
