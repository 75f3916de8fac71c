"""A small inference server that passes Palio's probe: a start, to be replaced by your own.

It speaks /process, /tokenize and /decode, cuts at stop sequences, shortens what is too long from the left
and refuses nonsense with a 4xx. One request at a time: batch them if you want to be faster. In an entry that is
trained, too, it serves what training handed in.
"""

import os
import threading
import time

import torch
from fastapi import FastAPI
from peft import PeftModel
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_LENGTH = 2048
BASE = os.environ["PALIO_BASE_MODEL"]

tokenizer = AutoTokenizer.from_pretrained(BASE)
model = AutoModelForCausalLM.from_pretrained(os.environ.get("PALIO_MODEL", BASE)).eval()
if adapter := os.environ.get("PALIO_ADAPTER"):
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
one_at_a_time = threading.Lock()
app = FastAPI()


class ProcessRequest(BaseModel):
    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k_per_token: int = 1
    echo_prompt: bool | None = False
    stop_sequences: list[str] | None = None


class TokenizeRequest(BaseModel):
    text: str
    truncation: bool | None = False
    max_length: int = MAX_LENGTH


class DecodeRequest(BaseModel):
    tokens: list[int]


@app.post("/process")
def process(request: ProcessRequest):
    started = time.monotonic()
    new = max(1, min(request.max_new_tokens, MAX_LENGTH - 1))
    ids = tokenizer(request.prompt or " ", return_tensors="pt")["input_ids"][:, -(MAX_LENGTH - new) :]
    with one_at_a_time, torch.inference_mode():
        sampling = (
            {"temperature": request.temperature, "top_p": request.top_p} if request.temperature > 0.01 else {}
        )
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=bool(sampling),
            pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
            **sampling,
        )
    tokens = []
    for token, logits in zip(made.sequences[0, ids.shape[1] :], made.logits, strict=True):
        if token == tokenizer.eos_token_id:
            break
        logprob = logits[0].log_softmax(-1)[token].item()
        tokens.append({"text": tokenizer.decode(token), "logprob": logprob, "top_logprob": {}})
        text = "".join(one["text"] for one in tokens)
        if any(stop and stop in text for stop in request.stop_sequences or ()):
            tokens.pop()
            break
    text = ("" if not request.echo_prompt else request.prompt) + "".join(one["text"] for one in tokens)
    return {
        "text": text,
        "tokens": tokens,
        "logprob": sum(one["logprob"] for one in tokens),
        "request_time": time.monotonic() - started,
    }


@app.post("/tokenize")
def tokenize(request: TokenizeRequest):
    started = time.monotonic()
    tokens = tokenizer(request.text)["input_ids"]
    if request.truncation:
        tokens = tokens[: request.max_length]
    return {"tokens": tokens, "request_time": time.monotonic() - started}


@app.post("/decode")
def decode(request: DecodeRequest):
    started = time.monotonic()
    return {"text": tokenizer.decode(request.tokens), "request_time": time.monotonic() - started}


@app.get("/health")
def health():
    return {"ok": True}
