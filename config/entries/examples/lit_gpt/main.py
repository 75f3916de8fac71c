"""A server in the manner of lit-gpt: its own model (model.py), and the API of 2023 over Python's own HTTP.

One request at a time is computed; the others wait. To serve weights of your own, put them into this folder
and load them in place of the base model's.
"""

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from model import Llama, generate
from tokenizers import Tokenizer

BASE = Path(os.environ["PALIO_BASE_MODEL"])
WINDOW = 2048

model = Llama.load(BASE)
tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
named = json.loads((BASE / "config.json").read_text())["eos_token_id"]
ends = set(named if isinstance(named, list) else [named])
one_at_a_time = threading.Lock()


class Invalid(Exception):
    """The request cannot be answered; the client is told why (HTTP 400)."""


def field(body, name, kind, default=None):
    value = body.get(name)
    value = default if value is None else value
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise Invalid(f"{name} is missing or of the wrong type")
    return value


def process(body):
    prompt = field(body, "prompt", str)
    most = max(1, min(field(body, "max_new_tokens", int, 50), WINDOW - 1))
    stops = [stop for stop in field(body, "stop_sequences", list, []) if stop]
    ids = (tokenizer.encode(prompt or " ").ids)[-(WINDOW - most) :]
    seed = torch.Generator().manual_seed(field(body, "seed", int, 0))
    sampling = {
        "temperature": field(body, "temperature", int | float, 0.0),
        "top_k": max(1, field(body, "top_k_per_token", int, 200)),
    }
    made, tokens, text = [], [], ""
    with one_at_a_time:
        for token, logprob in generate(model, ids, most, generator=seed, **sampling):
            if token in ends:
                break
            made.append(token)
            whole = tokenizer.decode(made, skip_special_tokens=False)
            tokens.append({"text": whole[len(text) :], "logprob": logprob, "top_logprob": {}})
            text = whole
            if any(stop in text for stop in stops):
                text = text[: min(text.index(stop) for stop in stops if stop in text)]
                break
    return {
        "text": prompt + text if field(body, "echo_prompt", bool, False) else text,
        "tokens": tokens,
        "logprob": sum(token["logprob"] for token in tokens),
    }


def tokenize(body):
    tokens = tokenizer.encode(field(body, "text", str)).ids
    if field(body, "truncation", bool, True):
        tokens = tokens[: field(body, "max_length", int, WINDOW)]
    return {"tokens": tokens}


def decode(body):
    try:
        return {"text": tokenizer.decode(field(body, "tokens", list), skip_special_tokens=False)}
    except (TypeError, OverflowError):
        raise Invalid("tokens is not a list of ids") from None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    paths = {"/process": process, "/tokenize": tokenize, "/decode": decode}

    def do_POST(self):
        started = time.monotonic()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            body = json.loads(content)
            if self.path not in self.paths or not isinstance(body, dict):
                raise Invalid(f"POST a JSON object to one of {', '.join(self.paths)}")
            self.reply(200, self.paths[self.path](body) | {"request_time": time.monotonic() - started})
        except (Invalid, ValueError) as error:
            self.reply(400, {"error": str(error)})

    def do_GET(self):
        self.reply(200, {"ok": True})

    def reply(self, code, content):
        payload = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        """Say nothing: a line for each request would fill the log."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
