"""Llama in one file, after the paper (arXiv 2302.13971): torch, safetensors and a cache of keys."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional


@dataclass
class Shape:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def read(cls, folder):
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"] != "llama":
            raise SystemExit(f"this server knows llama, not {config['model_type']}")
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        config["rope_theta"] = (config.get("rope_parameters") or config)["rope_theta"]
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


class Layer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        heads, groups = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(shape.hidden_size, heads, bias=False),
                "k_proj": nn.Linear(shape.hidden_size, groups, bias=False),
                "v_proj": nn.Linear(shape.hidden_size, groups, bias=False),
                "o_proj": nn.Linear(heads, shape.hidden_size, bias=False),
            }
        )
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False),
                "up_proj": nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False),
                "down_proj": nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False),
            }
        )

    def forward(self, x, turn, cache):
        """Transform (T, width) hidden states; `cache` is this layer's keys and values so far, and grows."""
        x = x + self._attend(self.input_layernorm(x), turn, cache)
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(functional.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))

    def _attend(self, x, turn, cache):
        length, size = len(x), self.shape.head_dim
        q, k, v = (
            self.self_attn[name](x).view(length, -1, size).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = turn(q), turn(k)
        if cache:
            k, v = torch.cat((cache[0], k), 1), torch.cat((cache[1], v), 1)
        cache[:] = k, v
        # Position i of the new tokens sees all before it.
        seen = torch.ones(length, k.shape[1], dtype=torch.bool).tril(k.shape[1] - length)
        y = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, enable_gqa=True
        )
        return self.self_attn.o_proj(y[0].transpose(0, 1).reshape(length, -1))


class Llama(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    @classmethod
    def load(cls, folder):
        """Load a model of Hugging Face's format in fp32."""
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(Shape.read(folder))
        weights = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= {name.removeprefix("model."): one.float() for name, one in load_file(path).items()}
        weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])  # tied
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def forward(self, ids, cache):
        """Return the (T, vocabulary) logits of T tokens after those in `cache`, a list that this fills."""
        cache.extend([] for _ in self.layers[len(cache) :])
        start = cache[0][0].shape[1] if cache[0] else 0
        turn = self._rotation(torch.arange(start, start + len(ids)))
        x = self.embed_tokens(ids)
        for layer, past in zip(self.layers, cache, strict=True):
            x = layer(x, turn, past)
        return self.lm_head(self.norm(x))

    def _rotation(self, positions):
        """Return what turns (heads, T, size) queries or keys by their positions (arXiv 2104.09864)."""
        size = self.shape.head_dim
        angles = positions[:, None] / self.shape.rope_theta ** (torch.arange(0, size, 2) / size)
        cos, sin = (part.repeat(1, 2) for part in (angles.cos(), angles.sin()))

        def turn(x):
            one, other = x.chunk(2, -1)
            return x * cos + torch.cat((-other, one), -1) * sin

        return turn


@torch.inference_mode()
def generate(model, ids, most, *, temperature=0.0, top_k=None, generator=None):
    """Yield up to `most` new tokens, each with its log-probability."""
    cache = []
    given = torch.tensor(ids)
    for _ in range(most):
        logits = model(given, cache)[-1]
        logprobs = logits.log_softmax(-1)
        if temperature < 0.01:
            token = int(logits.argmax())
        else:
            kept = logits.topk(min(top_k or len(logits), len(logits)))
            chances = (kept.values / temperature).softmax(-1)
            token = int(kept.indices[torch.multinomial(chances, 1, generator=generator)])
        yield token, float(logprobs[token])
        given = torch.tensor([token])
