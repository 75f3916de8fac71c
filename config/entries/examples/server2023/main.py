"""An inference server as many of 2023 were: it answers, and it has their defects.

It ignores stop sequences and top_p, asserts on length, blocks in an async handler, and gives a
token's id as request_time. Palio's probe names all that, and what it costs; none of it costs the run.
"""

import os

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_LENGTH = 2048

tokenizer = AutoTokenizer.from_pretrained(os.environ["PALIO_BASE_MODEL"])
model = AutoModelForCausalLM.from_pretrained(os.environ["PALIO_BASE_MODEL"], dtype=torch.float32).eval()
app = FastAPI()


class ProcessRequest(BaseModel):
    prompt: str
    num_samples: int = 1
    max_new_tokens: int = 50
    top_k: int = 200
    temperature: float = 0.8
    seed: int | None = None
    echo_prompt: bool | None = False


class TokenizeRequest(BaseModel):
    text: str
    truncation: bool = True
    max_length: int = MAX_LENGTH


class DecodeRequest(BaseModel):
    tokens: list[int]


@app.post("/process")
async def process(request: ProcessRequest):
    ids = tokenizer(request.prompt, return_tensors="pt")["input_ids"]
    assert ids.shape[1] + request.max_new_tokens <= MAX_LENGTH, "prompt too long"
    with torch.inference_mode():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            do_sample=request.temperature > 0.01,
            temperature=request.temperature or None,
            top_k=request.top_k,
            pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
    new = generated.sequences[0, ids.shape[1] :]
    tokens = []
    for token, scores in zip(new, generated.scores, strict=True):
        logprob = torch.log_softmax(scores[0], -1)[token]
        tokens.append({"text": tokenizer.decode(token), "logprob": logprob.item(), "top_logprob": {}})
    shown = generated.sequences[0] if request.echo_prompt else new
    return {
        "text": tokenizer.decode(shown, skip_special_tokens=True),
        "tokens": tokens,
        "logprob": sum(token["logprob"] for token in tokens),
        "request_time": int(new[-1]),
    }


@app.post("/tokenize")
async def tokenize(request: TokenizeRequest):
    ids = tokenizer(request.text, truncation=request.truncation, max_length=request.max_length)["input_ids"]
    return {"tokens": ids, "request_time": 0.0}


@app.post("/decode")
async def decode(request: DecodeRequest):
    return {"text": tokenizer.decode(request.tokens), "request_time": 0.0}
