"""A server over transformers and peft that routes each prompt to one of several adapters.

Every folder in PALIO_ADAPTER holds one (yaml_trainer/two_adapters.yml trains two). The router needs no model
of its own: the adapter under which the prompt is the likeliest answers it. On a GPU the base model is loaded
in 4 bits, by bitsandbytes.
"""

import os
import threading
import time
from pathlib import Path

import torch
from fastapi import FastAPI
from peft import PeftModel
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

MAX_LENGTH = 2048
BASE = os.environ["PALIO_BASE_MODEL"]
ADAPTERS = {folder.name: folder for folder in sorted(Path(os.environ["PALIO_ADAPTER"]).iterdir())}


def load():
    """Return the base model with all adapters on it."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    settings = {"quantization_config": four_bits} if torch.cuda.is_available() else {"dtype": torch.float32}
    (first, folder), *others = ADAPTERS.items()
    base = AutoModelForCausalLM.from_pretrained(BASE, **settings)
    model = PeftModel.from_pretrained(base, folder, adapter_name=first)
    for name, other in others:
        model.load_adapter(other, adapter_name=name)
    return model.eval()


model = load()
tokenizer = AutoTokenizer.from_pretrained(BASE)
one_at_a_time = threading.Lock()  # the adapter that is set is the model's, not the request's
app = FastAPI()


def surprise(ids):
    """Return the mean cross-entropy of a prompt under the adapter that is set, in nats a token."""
    return model(input_ids=ids, labels=ids).loss.item()


def choose(ids):
    """Set the adapter that expects the prompt; return its name."""
    losses = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        losses[name] = surprise(ids) if ids.shape[1] > 1 else 0.0
    best = min(losses, key=losses.get)
    model.set_adapter(best)
    return best


class ProcessRequest(BaseModel):
    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
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
    ids = ids.to(model.device)
    sampling = (
        {"temperature": request.temperature, "top_p": request.top_p} if request.temperature > 0.01 else {}
    )
    with one_at_a_time, torch.inference_mode():
        print(f"adapter {choose(ids)}", flush=True)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=bool(sampling),
            pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
            **sampling,
        )
    tokens, text = [], ""
    for token, logits in zip(made.sequences[0, ids.shape[1] :], made.logits, strict=True):
        if token == tokenizer.eos_token_id:
            break
        piece = tokenizer.decode(token)
        if any(stop and stop in text + piece for stop in request.stop_sequences or ()):
            break
        text += piece
        logprob = logits[0].log_softmax(-1)[token].item()
        tokens.append({"text": piece, "logprob": logprob, "top_logprob": {}})
    return {
        "text": (request.prompt if request.echo_prompt else "") + text,
        "tokens": tokens,
        "logprob": sum(token["logprob"] for token in tokens),
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
