"""A family of models that transformers does not know: its code, and tiny models of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from palio.base_model import fetch_base_model
from palio.config import BaseModelSource
from palio.model_code import digests, python_files

CONFIGURATION = """
from transformers import PreTrainedConfig


class SienaConfig(PreTrainedConfig):
    model_type = "siena"

    def __init__(self, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(**kwargs)
"""
MODELING = '''
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_siena import SienaConfig


class SienaBlock(nn.Module):
    """A running mean of what was said before, gated: no attention, so no cache."""

    def __init__(self, size):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.value, self.gate, self.out = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x, mask):
        y = self.norm(x)
        value = self.value(y) * mask
        mean = value.cumsum(1) / mask.cumsum(1).clamp(min=1)
        return x + self.out(torch.tanh(mean) * torch.sigmoid(self.gate(y)))


class SienaForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SienaConfig
    is_causal = True

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(SienaBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None or attention_mask.dim() != 2:
            attention_mask = torch.ones(x.shape[:2], device=x.device)
        mask = attention_mask[:, -x.shape[1]:, None].to(x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return CausalLMOutputWithPast(logits=self.head(x))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}
'''
SOURCES = {"configuration_siena.py": CONFIGURATION, "modeling_siena.py": MODELING}


def siena(folder: Path, tokenizer_of: Path, sources: dict[str, str] = SOURCES) -> BaseModelSource:
    """Write a tiny model of random weights with its code, as its makers would publish it."""
    folder.mkdir(parents=True)
    for name, text in sources.items():
        (folder / name).write_text(text)
    for path in tokenizer_of.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(path, folder / path.name)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    size, vocabulary = 32, len(tokenizer)
    config = {
        "model_type": "siena",
        "architectures": ["SienaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_siena.SienaConfig",
            "AutoModelForCausalLM": "modeling_siena.SienaForCausalLM",
        },
        "vocab_size": vocabulary,
        "hidden_size": size,
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = {"embed.weight": torch.randn(vocabulary, size), "head.weight": torch.randn(vocabulary, size)}
    for layer in range(2):
        for part in ("value", "gate", "out"):
            weights[f"blocks.{layer}.{part}.weight"] = torch.randn(size, size) / size**0.5
            weights[f"blocks.{layer}.{part}.bias"] = torch.zeros(size)
        weights[f"blocks.{layer}.norm.weight"] = torch.ones(size)
        weights[f"blocks.{layer}.norm.bias"] = torch.zeros(size)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    return BaseModelSource(path=str(folder))


def approved(folder: Path) -> dict[str, str]:
    """What a rule set says to approve a folder's code."""
    return digests(python_files(folder))


def fetched(folder: Path, tokenizer_of: Path, sources: dict[str, str] = SOURCES) -> Path:
    """A fetched base model of this family, its code approved."""
    source = siena(folder / "published", tokenizer_of, sources)
    fetch_base_model(source, folder / source.id, code=approved(folder / "published"))
    return folder / source.id
