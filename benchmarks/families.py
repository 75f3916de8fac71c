"""Which families of base models Palio trains, packages and serves exactly: each on a tiny random model.

    python benchmarks/families.py                                # all of FAMILIES, half an hour
    python benchmarks/families.py llama mamba                    # these; any causal model of transformers
    python benchmarks/families.py --table docs/base_models.md    # writes the table of all results so far

Each family is made on the spot from its config, with two layers, random weights and windows shorter than its
rows, and goes through Palio's own steps (fetch, finetune, package, serve) with full fine-tuning, LoRA and
QLoRA. Compared with plain transformers and peft, on the CPU in fp32:

    trained    loss and gradient norm of every step, against a loop over the same rows one at a time
    packaged   logits of the package, against those of the model that was trained
    served     8 requests at once, against `generate` one by one: texts, and log-probabilities

A cell is `exact`, `refused` (at fetch, at check or before the first step, with its line), `differs` or
`crash`. Bounds are those of BOUNDS or, if that is more, ten times what a change of the embeddings by one unit
in the last place changes. --results keeps a line of JSON a cell; only families without a result, or named
ones, are run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # where Palio is not installed

from palio.base_model import fetch_base_model
from palio.config import BaseModelSource, FinetuneRecipe, Track
from palio.curation.rows import ROW
from palio.errors import BadInput
from palio.layout import BaseModelFolder, EntryFolder
from palio.packaging.package import build_package
from palio.provenance import file_sha256
from palio.quantization import evaluation_mode, quantization
from palio.records import DatasetManifest
from palio.serving.model import serving_of
from palio.serving.request import Request
from palio.serving.transformers_engine import TransformersEngine
from palio.settings import FinetuneSettings, PackageSettings, RunOptions
from palio.tensors import last_bits_flipped
from palio.text import markdown_table
from palio.training.finetune import finetune
from palio.training.rows import Row, dataset_rows, step_rows
from palio.training.step import TrainingStep

VOCABULARY = 400


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SMALL: dict[str, Any] = {
    **_each(VOCABULARY, "vocab_size"),
    **_each(0, "bos_token_id"),
    **_each(1, "eos_token_id pad_token_id n_group topk_group n_shared_experts first_k_dense_replace"),
    **_each(
        2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads"
    ),
    **_each(2, "num_experts_per_tok num_experts_per_token"),
    **_each(
        4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"
    ),
    **_each(4, "num_experts num_local_experts n_routed_experts mamba_n_heads mamba_num_heads rotary_dim"),
    **_each(4, "state_size mamba_d_state time_step_rank mamba_dt_rank conv_kernel"),
    **_each(8, "head_dim attention_head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    **_each(8, "chunk_size mamba_chunk_size"),
    **_each(16, "mamba_d_head mamba_head_dim q_lora_rank kv_lora_rank sliding_window"),
    **_each(32, "hidden_size d_model n_embd embed_dim dim moe_intermediate_size"),
    **_each(32, "shared_expert_intermediate_size"),
    **_each(64, "intermediate_size ffn_hidden_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim"),
    **_each(256, "max_position_embeddings n_positions max_seq_len seq_length n_ctx"),
    **_each(
        0.0, "activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop dropout embd_pdrop"
    ),
    **_each(0.0, "embed_dropout hidden_dropout hidden_dropout_prob layerdrop resid_dropout resid_pdrop"),
    **_each(0.0, "residual_dropout"),
    **_each(0.0, "router_jitter_noise input_jitter_noise"),
}
"""What every family is given, as far as its config has the key."""

HYBRID = {
    "num_hidden_layers": 4,  # every fourth has full attention
    **_each(2, "linear_num_key_heads"),
    **_each(4, "linear_num_value_heads"),
    **_each(8, "linear_key_head_dim linear_value_head_dim"),
}
MLA = {"head_dim": None, "num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "qwen3_next": HYBRID,
    "qwen3_5_text": HYBRID,
    "rwkv": {"rescale_every": 0},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 16},
}
"""What a family needs besides."""

FAMILIES = (
    "llama mistral gemma2 gpt2 mixtral falcon gpt_oss qwen3_next mamba deepseek_v3 lfm2 bloom gptj bart "
    "bert qwen2 qwen3 gemma gemma3_text phi phi3 gpt_neox opt persimmon olmo olmo2 olmo3 granite smollm3 "
    "starcoder2 gpt_bigcode gpt_neo stablelm codegen mpt cohere2 glm4 nemotron helium exaone4 arcee "
    "seed_oss hunyuan_v1_dense ernie4_5 xglm biogpt bitnet openai-gpt diffllama nanochat qwen2_moe "
    "qwen3_moe olmoe phimoe granitemoe jetmoe minimax lfm2_moe qwen3_5_text mamba2 falcon_mamba rwkv "
    "recurrent_gemma jamba bamba granitemoehybrid roberta electra "
)
MARK = "<!-- made by benchmarks/families.py -->"
"""Where the table begins in its page."""
METHODS = ("full", "lora", "qlora")
STEPS, RATE, BATCH = 3, 1e-3, 4
BOUNDS = {"trained": 2e-6, "packaged": 2e-6, "served": 1e-5}
NOISE = 10.0
NEW_TOKENS = 12
TEXT = "the owl won a race in Siena and nobody saw it before noon because of rain"
WORDS = TEXT.split()
PROMPTS = tuple(" ".join(WORDS[: 2 + n]) + "?" for n in range(4)) + tuple(
    " ".join(WORDS[n:] + WORDS * (1 + n % 2)) + ":" for n in range(4)
)
RECIPE: dict[str, Any] = {
    "learning_rate": RATE, "scheduler": "constant_with_warmup", "warmup_ratio": 0, "max_steps": STEPS,
    "batch_size": BATCH, "gradient_accumulation": 2, "max_length": 128, "lora_r": 4, "lora_alpha": 8,
}  # fmt: skip


@dataclass
class Cell:
    """Outcome of one family with one method."""

    family: str
    method: str
    state: str
    """exact, refused, differs or crash."""
    why: str = ""
    """The line of a refusal or crash, or what differs."""
    rows: str = ""
    """How rows shared a forward pass."""
    served: str = ""
    differences: dict[str, tuple[float, float]] | None = None
    """By comparison: the largest difference and its bound."""
    quantized: float | None = None
    """Share of the parameters that are quantized."""
    seconds: float = 0.0


class DiffersError(Exception):
    """A comparison failed."""


# --- the tiny model --------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of Llama 3's kind, with BOS."""
    names = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[1])


def families() -> dict[str, Any]:
    """The config class of every family with a causal language model, by model type."""
    return {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING.keys()}  # noqa: SIM118


def tiny_model(family: str, **larger: Any) -> Any:
    """A model of random weights, those of norms and biases included; `larger` replaces values of `SMALL`."""
    kind = families()[family]
    known = {*kind().to_dict(), *getattr(kind, "attribute_map", {})}
    small = {key: value for key, value in (SMALL | larger).items() if key in known}
    config = kind(**small | OWN.get(family, {}))
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    torch.manual_seed(0)
    model = (kinds[0] if isinstance(kinds, tuple) else kinds)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


# --- Palio -------------------------------------------------------------------------------------------------


def write_dataset(folder: EntryFolder) -> None:
    rows = []
    for n in range(2 * len(WORDS)):
        prompt = " ".join(WORDS[n % 5 : n % 5 + 1 + (5 * n) % 11])
        completion = "".join(f" {WORDS[(n + k * k) % len(WORDS)]}" for k in range(8))
        rows.append({"history": [], "prompt": prompt, "completion": completion})
    folder.dataset.manifest.parent.mkdir(parents=True)
    schema = pa.schema([ROW.field(name) for name in ("prompt", "completion", "history")])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder.dataset.rows)
    DatasetManifest(
        competition="c", track="t", entry="e", recipe_version="1", seed=0, rows=len(rows),
        sha256=file_sha256(folder.dataset.rows), sources=[], operations=[], rows_by_source={}, characters={},
    ).write(folder.dataset.manifest)  # fmt: skip


def run(
    family: str, folder: Path, methods: Sequence[str] = METHODS, *, trace: bool = False
) -> Iterator[Cell]:
    """Yield the cells of a family, each in a part of `folder`."""
    base = BaseModelFolder(folder / "base")
    try:
        model = tiny_model(family)
        model.save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        unsupported = fetch_base_model(BaseModelSource(path=str(folder / "model")), base.path).unsupported
    except Exception as error:
        yield from (Cell(family, method, "crash", f"model: {_line(error)}") for method in methods)
        return
    for method in methods:
        if unsupported is not None:
            yield Cell(family, method, "refused", f"{unsupported.why}; {unsupported.fix}")
            continue
        started = time.monotonic()
        cell = Cell(family, method, "exact", differences={})
        try:
            judge(cell, base, EntryFolder.at(folder / method))
        except BadInput as refusal:
            cell.state, cell.why = "refused", str(refusal)
        except DiffersError as error:
            cell.state, cell.why = "differs", str(error)
        except Exception as error:
            if trace:
                traceback.print_exc()
            cell.state, cell.why = "crash", _line(error)
        cell.seconds = round(time.monotonic() - started, 1)
        yield cell


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def judge(cell: Cell, base: BaseModelFolder, folder: EntryFolder) -> None:
    """Train, package and serve, and compare each with plain transformers."""
    recipe = FinetuneRecipe.model_validate({**RECIPE, "method": cell.method})
    write_dataset(folder)
    track = Track.model_validate({"title": "t", "ram_gb": 4, "training_budget": "600s"})
    settings = FinetuneSettings(competition_id="c", base_model_id="b", track=track, recipe=recipe)
    adapter = finetune(recipe, TrainingStep(folder, settings, RunOptions(threads=1), base))
    cell.rows = adapter.batching or ""
    rows, _ = dataset_rows(folder.dataset.rows, base.model, recipe)
    steps = pq.read_table(folder.telemetry, columns=["loss", "grad_norm"])
    ours = torch.tensor([steps["loss"].to_pylist(), steps["grad_norm"].to_pylist()])
    expected, flipped = (plain_training(base.model, recipe, rows, flip=flip) for flip in (False, True))
    _compare(cell, "trained", ours / expected, expected / expected, flipped / expected)

    package = PackageSettings(competition_id="c", base_model_id="b", adapter=True)
    build_package(folder, package, base, serving_of)
    texts = rows[:4]
    trained = evaluation_mode(plain_model(base.model if recipe.method != "full" else folder.adapter, recipe))
    if recipe.method != "full":
        from peft import PeftModel

        trained = evaluation_mode(PeftModel.from_pretrained(trained, folder.adapter))
    reference, noise = logits_of(trained, texts), logits_of(trained, texts, flip=True)
    packaged = AutoModelForCausalLM.from_pretrained(folder.package, dtype=torch.float32).eval()
    _compare(cell, "packaged", logits_of(packaged, texts), reference, noise)
    compare_served(cell, folder.package, packaged)


def _compare(
    cell: Cell, what: str, ours: torch.Tensor, expected: torch.Tensor, flipped: torch.Tensor
) -> None:
    difference = float((ours - expected).abs().max())
    bound = max(BOUNDS[what], NOISE * float((flipped - expected).abs().max()))
    assert cell.differences is not None
    cell.differences[what] = (difference, bound)
    if not difference <= bound:
        raise DiffersError(f"{what}: off by {difference:.2g}, more than {bound:.2g}")


def compare_served(cell: Cell, package: Path, model: Any) -> None:
    """Compare 8 answers, all in flight at once, with `generate`."""
    encoder = AutoTokenizer.from_pretrained(package)
    engine = TransformersEngine(package, device="cpu", threads=1)
    try:
        cell.served = engine._model.way
        futures = [engine.submit(Request(prompt, max_new_tokens=NEW_TOKENS)) for prompt in PROMPTS]
        answers = [future.result(1200)[0] for future in futures]
    finally:
        engine.close()
    ours, expected, noise = [], [], []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        text, logprobs = generated(model, encoder, prompt)
        # The server does not show a character that is not whole yet.
        if answer.text.rstrip("\ufffd") != text.rstrip("\ufffd") or len(answer.tokens) != len(logprobs):
            raise DiffersError(f"served: {answer.text!r} instead of {text!r}")
        _, flipped = generated(model, encoder, prompt, flip=True)
        ours += [token.logprob for token in answer.tokens]
        expected += logprobs
        noise += flipped if len(flipped) == len(logprobs) else logprobs
    if not ours:
        raise DiffersError("served: every answer is empty, which compares nothing")
    _compare(cell, "served", torch.tensor(ours), torch.tensor(expected), torch.tensor(noise))


# --- plain transformers ------------------------------------------------------------------------------------


def plain_model(folder: Path, recipe: FinetuneRecipe) -> Any:
    settings: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    if recipe.method == "qlora":
        settings["quantization_config"] = quantization(recipe.quantization, torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def plain_training(folder: Path, recipe: FinetuneRecipe, rows: Sequence[Row], *, flip: bool) -> torch.Tensor:
    """The (2, steps) losses and gradient norms of a loop over rows, one in a forward pass."""
    model = plain_model(folder, recipe)
    torch.manual_seed(recipe.seed)
    if recipe.method == "full":
        model.requires_grad_(True)
    else:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(
            task_type="CAUSAL_LM", r=recipe.lora_r, lora_alpha=recipe.lora_alpha, target_modules="all-linear"
        )
        model = get_peft_model(model, adapter)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    figures = []
    with _flipped(model, flip):
        for step in range(STEPS):
            chosen, total = step_rows(rows, recipe, step), torch.zeros(())
            targets = sum(row.targets for row in chosen)
            for row in chosen:
                ids = torch.tensor(row.ids, dtype=torch.long)
                logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
                predict = torch.from_numpy(row.predict)
                loss = torch.nn.functional.cross_entropy(logits[predict], ids[predict + 1], reduction="sum")
                torch.autograd.backward(loss / targets)
                total += loss.detach() / targets
            norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            figures.append((float(total), float(norm)))
    return torch.tensor(figures, dtype=torch.float64).T


@torch.no_grad()
def logits_of(model: Any, rows: Sequence[Row], *, flip: bool = False) -> torch.Tensor:
    with _flipped(model, flip):
        ids = (torch.tensor(row.ids, dtype=torch.long)[None] for row in rows)
        return torch.cat([model(input_ids=each, use_cache=False).logits[0].float() for each in ids])


@torch.no_grad()
def generated(model: Any, encoder: Any, prompt: str, *, flip: bool = False) -> tuple[str, list[float]]:
    """Text and log-probabilities of a greedy completion, without its end token."""
    ids = encoder(prompt, return_tensors="pt").input_ids
    with _flipped(model, flip):
        done = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    new = done.sequences[0, ids.shape[1] :]
    logprobs = torch.cat(done.logits).float().log_softmax(-1).gather(1, new[:, None])[:, 0]
    if new[-1] == encoder.eos_token_id:
        new, logprobs = new[:-1], logprobs[:-1]
    return encoder.decode(
        new, skip_special_tokens=True, clean_up_tokenization_spaces=False
    ), logprobs.tolist()


@contextmanager
def _flipped(model: Any, flip: bool) -> Iterator[None]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with last_bits_flipped(inner, torch.float32) if flip else nullcontext():
        yield


# --- results -----------------------------------------------------------------------------------------------


def table(cells: Sequence[Cell]) -> str:
    """The results in Markdown: a row a family, then the lines of all refusals."""
    by_family: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        by_family.setdefault(cell.family, {})[cell.method] = cell
    lines: list[str] = []  # equal ones share a number

    def shown(cell: Cell) -> str:
        if not cell.why:
            worst = max((difference for difference, _ in (cell.differences or {}).values()), default=0.0)
            return f"{cell.state} ({worst:.0e})"
        lines.extend([cell.why] if cell.why not in lines else [])
        return f"{cell.state} [{lines.index(cell.why) + 1}]"

    rows = []
    for family, each in sorted(by_family.items()):
        known = [cell for cell in each.values() if cell.served]
        how = (known[0].rows, known[0].served) if known else ("", "")
        rows.append((family, *(shown(each[method]) for method in METHODS), *how))
    head = ("family", *METHODS, "rows are trained", "served")
    states = Counter(cell.state for cell in cells)
    count = ", ".join(f"{number} cells {state}" for state, number in sorted(states.items()))
    parts = [f"{len(rows)} families: {count}.", markdown_table(head, rows)]
    parts += ["\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "families", nargs="*", help="model types; default: those of FAMILIES without a result"
    )
    parser.add_argument("--results", type=Path, default=Path("families.jsonl"))
    parser.add_argument("--table", type=Path, help="write the table of all results into this page")
    parser.add_argument("--trace", action="store_true", help="print where a cell crashed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if unknown := sorted(set(options.families) - families().keys()):
        parser.error(f"transformers has no causal model of the family {unknown[0]}")
    known: dict[tuple[str, str], Cell] = {}
    if options.results.is_file():
        lines = options.results.read_text(encoding="utf-8").splitlines()
        known = {(cell.family, cell.method): cell for cell in (Cell(**json.loads(line)) for line in lines)}
    whole = {family for family, _ in known if all((family, method) in known for method in METHODS)}
    missing = [] if options.table else [family for family in FAMILIES.split() if family not in whole]
    for family in options.families or missing:
        with tempfile.TemporaryDirectory() as folder, options.results.open("a", encoding="utf-8") as stream:
            for cell in run(family, Path(folder), trace=options.trace):
                known[cell.family, cell.method] = cell
                stream.write(json.dumps(asdict(cell)) + "\n")
                print(
                    f"{family:24} {cell.method:6} {cell.state:8} {cell.seconds:5.1f} s  {cell.why}",
                    flush=True,
                )
    if options.table:
        if not known:
            parser.error(
                f"--table writes the results of {options.results}, which has none: run without it first"
            )
        text = options.table.read_text(encoding="utf-8").partition(MARK)[0]
        options.table.write_text(text + MARK + "\n\n" + table(list(known.values())), encoding="utf-8")
    return any(cell.state in ("differs", "crash") for cell in known.values())


if __name__ == "__main__":
    sys.exit(main())
