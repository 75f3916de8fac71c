"""What a model's files may say. Nothing is kept as it came: configs are written anew from the settings known
here, and weights must be those of the base model by name and shape.

    tensors             names, dtypes and shapes of a weight file, as the safetensors library reads them
    check_weights       a whole model against its base model
    adapter_settings    adapter_config.json, rewritten
    check_adapter       an adapter's weights against its settings and the base model
    model_config        config.json, rewritten: the base model's, with the model's own token ids and dtype
    generation_config   generation_config.json, rewritten
    check_tokenizer     a tokenizer and its chat template, loaded and used once in a process with limits
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from palio.errors import Crashed, Interrupted, RuleViolation
from palio.layout import BaseModelFolder
from palio.sandbox.model_room import code_of, look

HEADER_BYTES = 16 << 20
"""Of a weight file; a model of 70 billion parameters has 0.1 MB."""
CONFIG, ADAPTER, GENERATION = "config.json", "adapter_config.json", "generation_config.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAVE_AGAIN = "save the model again with save_pretrained"
_MERGE = "hand in the merged model instead"


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


Tensors = dict[str, Tensor]


# --- weights -----------------------------------------------------------------------------------------


def tensors(path: Path) -> Tensors:
    """Read the header of a weight file. The library refuses offsets that overlap, leave gaps or do not fit.

    Raises RuleViolation if it is not safetensors, torn, or of a dtype that no model is trained in.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as stream:
        if int.from_bytes(stream.read(8), "little") > HEADER_BYTES:
            raise RuleViolation(f"{path.name} is not safetensors: its header is too long", _SAVE_AGAIN)
    try:
        with safe_open(path, framework="numpy") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            found = {name: Tensor(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except SafetensorError as error:
        if "fully covered" in str(error):  # too short, or with bytes of no tensor
            fix = "save to another folder, then rename it to the result's"
            raise RuleViolation(f"{path.name} is torn", fix) from None
        raise RuleViolation(f"{path.name} is not safetensors: {error}", _SAVE_AGAIN) from None
    if not found:
        raise RuleViolation(f"{path.name} holds no tensor", _SAVE_AGAIN)
    for name, tensor in found.items():
        if tensor.dtype not in _DTYPES:
            fix = f"save weights as one of {', '.join(_DTYPES.values())}"
            raise RuleViolation(f"{path.name}: {name!r:.100} is of dtype {tensor.dtype}", fix)
    return found


def folder_tensors(folder: Path) -> Tensors:
    """Read the headers of all weight files of a folder."""
    return {
        name: found for path in sorted(folder.glob("*.safetensors")) for name, found in tensors(path).items()
    }


def check_weights(found: Tensors, base: Tensors) -> None:
    """A tuned model has the tensors of its base model, by name and shape.

    The output layer may be saved or left out where it is tied to the embedding.
    """
    expected = {_plain(name): tensor.shape for name, tensor in base.items()}
    shapes = {_plain(name): tensor.shape for name, tensor in found.items()}
    for name in shapes.keys() - expected.keys():
        if not (name == "lm_head.weight" and shapes[name] in expected.values()):
            raise RuleViolation(f"the weights hold {name!r:.100}, which the base model does not", _SAVE_AGAIN)
    for name in expected.keys() - shapes.keys():
        if name != "lm_head.weight" and not name.endswith("inv_freq"):
            raise RuleViolation(f"the weights lack {name!r}, which the base model has", _SAVE_AGAIN)
    for name in expected.keys() & shapes.keys():
        if shapes[name] != expected[name]:
            why = f"{name} has the shape {list(shapes[name])}, not {list(expected[name])}, the base model's"
            raise RuleViolation(why, "tune the entry's base model")


def _plain(name: str) -> str:
    """A tensor's name without the model's own prefix, which some checkpoints have and some lack."""
    return re.sub(r"^(model|transformer)\.", "", name)


# --- adapters ----------------------------------------------------------------------------------------

_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_NAMES_LIMIT = 2000
_TRAINING_ONLY = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
        "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "monteclora_config",
        "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
        "velora_config",
    }
)  # fmt: skip
"""Settings that change nothing of a trained adapter; they are dropped."""
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base model's weights as they are."""


def adapter_settings(content: Any, base_model_id: str, hidden_size: int) -> dict[str, Any]:
    """Return adapter_config.json with nothing in it but settings of LoRA that are known and in bounds.

    Raises RuleViolation with the key of any other setting.
    """
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise RuleViolation(f"{ADAPTER}: peft_type is not LORA", _MERGE)
    if (initial := content.get("init_lora_weights")) not in _INITIAL:
        why = f"init_lora_weights is {initial!r:.50}, which changes the base model's weights"
        raise RuleViolation(f"{ADAPTER}: {why}", _MERGE)
    known = _known_settings(hidden_size)
    kept: dict[str, Any] = {}
    for key, value in content.items():
        if key in _TRAINING_ONLY or key == "init_lora_weights":
            continue
        if key not in known:
            if value:  # null, false and empty say nothing
                raise RuleViolation(f"{ADAPTER}: {key!a:.100} is not taken", f"remove it, or {_MERGE}")
            continue
        accepts, wanted = known[key]
        if value is not None and not accepts(value):
            raise RuleViolation(f"{ADAPTER}: {key} is {value!r:.100}", f"it must be {wanted}")
        kept[key] = value
    for key in ("r", "target_modules"):
        if kept.get(key) is None:
            raise RuleViolation(f"{ADAPTER}: {key} is missing", "save the adapter with save_pretrained")
    return kept | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base_model_id,
    }


def _known_settings(hidden_size: int) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """Return, by name of a setting of LoRA, what accepts a value and what a value must be."""

    def rank(value: Any) -> bool:
        return _whole(value, 1, hidden_size)

    return {
        "r": (rank, f"a whole number from 1 to {hidden_size}, the hidden size"),
        "lora_alpha": (_number, "a positive number"),
        "target_modules": (_targets, "'all-linear' or a list of names of modules, no regular expression"),
        "exclude_modules": (_names, "a list of names of modules, no regular expression"),
        "modules_to_save": (_names, "a list of names of modules"),
        "layers_to_transform": (_layers, "a list of numbers of layers"),
        "layers_pattern": (_names, "a list of names of modules, no regular expression"),
        "rank_pattern": (_pattern(rank), f"ranks of up to {hidden_size} by names of modules"),
        "alpha_pattern": (_pattern(_number), "positive numbers by names of modules"),
        "bias": (("none", "all", "lora_only").__contains__, "none, all or lora_only"),
        **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"), (_bool, "true or false")),
    }


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6


def _bool(value: Any) -> bool:
    return isinstance(value, bool)


def _names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _NAMES_LIMIT
        and all(isinstance(name, str) and len(name) < 200 and _MODULE.fullmatch(name) for name in value)
    )


def _targets(value: Any) -> bool:
    return value == "all-linear" or (bool(value) and _names(value))


def _layers(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return len(values) <= _NAMES_LIMIT and all(_whole(layer, 0, _NAMES_LIMIT) for layer in values)


def _pattern(accepts: Any) -> Any:
    return lambda value: isinstance(value, dict) and _names(list(value)) and all(map(accepts, value.values()))


_PART = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.(weight|bias))?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(\.weight)?")


def check_adapter(found: Tensors, settings: Mapping[str, Any], base: Tensors) -> None:
    """Every tensor of an adapter belongs to a module of the base model and has the shape that this needs."""
    shapes = {_plain(name): tensor.shape for name, tensor in base.items()}
    ranks = {settings["r"], *(settings.get("rank_pattern") or {}).values()}
    for name, tensor in found.items():
        inner = _plain(name.removeprefix("base_model.model."))
        part, magnitude = _PART.fullmatch(inner), _MAGNITUDE.fullmatch(inner)
        module = (part or magnitude or {1: inner.removesuffix(".weight")})[1]
        weight = shapes.get(inner) or shapes.get(f"{module}.weight")
        if weight is None:
            raise RuleViolation(f"the adapter's {name!r:.150} belongs to no module of the base model")
        if part and part[3] != "bias":
            fits = len(tensor.shape) == len(weight) and any(
                rank in tensor.shape and _others(tensor.shape, rank) <= Counter((*weight, 1, 1))
                for rank in ranks
            )
        elif part or magnitude:
            fits = math.prod(tensor.shape) in weight
        else:
            fits = tensor.shape == weight
        if not fits:
            why = f"the adapter's {name!r:.150} has the shape {list(tensor.shape)}"
            raise RuleViolation(why, f"it must fit {list(weight)} at the rank of {ADAPTER}")


def _others(shape: tuple[int, ...], rank: int) -> Counter[int]:
    sizes = Counter(shape)
    sizes[rank] -= 1
    return +sizes


# --- configs -----------------------------------------------------------------------------------------

_FREE = frozenset(
    {
        "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "model_type",
        "num_labels", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
"""Keys of config.json that are checked on their own, or that nothing of a language model depends on."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_config(content: Any, base_model: Path, found: Tensors) -> dict[str, Any]:
    """Return the config of a tuned model: the base model's, with the ids of its own special tokens and the
    dtype of its weights.

    Raises RuleViolation with the key of any setting that differs from the base model's.
    """
    base = json.loads((base_model / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        content = {}
    if (named := content.get("auto_map")) and named != base.get("auto_map"):
        raise RuleViolation(f"{CONFIG} has auto_map, code of its own", "hand in a model without")
    for key in ("model_type", "architectures"):
        if content.get(key) != base.get(key):
            raise RuleViolation(
                f"{CONFIG}: {key} is not {base.get(key)!r}, the base model's", "tune the entry's base model"
            )
    full = None
    for key, value in content.items():
        if key in _FREE or key.startswith("_") or (key in base and base[key] == value):
            continue
        if key not in base:
            full = full or _full_config(base_model)
            if not value or full.get(key, full.get("rope_parameters", {}).get(key)) == value:
                continue
        why = f"{CONFIG}: {ascii(key)[1:-1]:.100} is {value!r:.100}"
        raise RuleViolation(why, f"it must be {base.get(key, 'absent')!r:.100}, as in the base model")
    size = base.get("vocab_size", 0)
    tokens = {key: content[key] for key in _TOKENS if _is_token(content.get(key), size)}
    return {**with_dtype(base, found), **tokens}


def with_dtype(config: dict[str, Any], found: Tensors) -> dict[str, Any]:
    """Return a config with the dtype of the weights, if they have one in common."""
    dtypes = {tensor.dtype for tensor in found.values()}
    if len(dtypes) != 1:
        return config
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    return kept | {"dtype": _DTYPES[dtypes.pop()]}


def _full_config(base_model: Path) -> dict[str, Any]:
    """The base model's config with the defaults that its file leaves out."""
    config: dict[str, Any]
    if any(base_model.glob("*.py")):  # its own code says what they are
        config = look("config", base_model, code_of(BaseModelFolder(base_model.parent)))
        if not isinstance(config, dict):
            raise Crashed("the process with the model's own code did not report its config")
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(base_model, trust_remote_code=False).to_dict()
    rope = config.get("rope_parameters")
    return config | {"rope_parameters": rope if isinstance(rope, dict) else {}}


def _is_token(value: Any, vocabulary: int) -> bool:
    values = value if isinstance(value, list) else [value]
    return 0 < len(values) <= 100 and all(_whole(one, 0, vocabulary - 1) for one in values)


def generation_config(content: Any, vocabulary: int) -> dict[str, Any]:
    """Return generation_config.json with its token ids alone: how to sample is the request's to say."""
    if not isinstance(content, dict):
        raise RuleViolation(f"{GENERATION} is not a JSON object", _SAVE_AGAIN)
    return {key: content[key] for key in _TOKENS if _is_token(content.get(key), vocabulary)}


def check_claims(config: Mapping[str, Any], found: Tensors) -> None:
    """A config claims no more than the weights hold; loading makes every layer that it claims.

    Raises RuleViolation with the key.
    """
    sizes = {size for tensor in found.values() for size in tensor.shape}
    for key in ("num_hidden_layers", "n_layer"):
        if key in config and not _whole(config[key], 1, len(found)):
            why = f"{CONFIG}: {key} is {config[key]!r:.50}, but the weights are {len(found)} tensors"
            raise RuleViolation(why, "restore the model's own config.json")
    for key in ("hidden_size", "vocab_size", "intermediate_size", "n_embd"):
        value = config.get(key)
        if value is not None and (not _whole(value, 1, 1 << 40) or value not in sizes):
            if key == "intermediate_size" and any(size % value == 0 for size in sizes if value):
                continue  # two matrices in one
            why = f"{CONFIG}: {key} is {value!r:.50}, which is no size of any tensor"
            raise RuleViolation(why, "restore the model's own config.json")


# --- tokenizer and chat template -----------------------------------------------------------------------

TOKENIZER_SECONDS = 15
"""CPU time; an honest one takes about two, most of it for libraries."""
TOKENIZER_MEMORY = 4 << 30
WALL_SECONDS = 600
"""On a machine that is busy with something else; the entry's own share is limited in CPU time."""
_USES = """
import resource, sys
from transformers import AutoTokenizer
print("ready", flush=True)
folder, vocabulary, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 1
resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds))
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
texts = ["The capital of France is", "a" * 4000, " " * 4000, "ab" * 2000 + "!", "\\n" * 1000, "1" * 4000]
if max(max(tokenizer(text)["input_ids"], default=0) for text in texts) >= vocabulary:
    print("uses tokens that the base model has no embedding for: it has", vocabulary)
elif getattr(tokenizer, "chat_template", None):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], tokenize=False
    )
    print("has a chat template that writes a page for two words" if len(text) > 20_000 else "ok")
else:
    print("ok")
"""


def check_tokenizer(folder: Path, vocabulary: int, seconds: int = TOKENIZER_SECONDS) -> None:
    """Load a tokenizer and use it and its chat template once, in a process with limits.

    Raises RuleViolation if it takes more than `seconds` of CPU time or 4 GB, has tokens that the model has
    no embedding for, or does not load.
    """
    line = ["prlimit", f"--data={TOKENIZER_MEMORY}", "--core=0", "--", sys.executable, "-I", "-c", _USES]
    given = [str(folder.resolve()), str(vocabulary), str(seconds)]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [*line, *given],
            env=environment | {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
            stdin=subprocess.DEVNULL, capture_output=True, timeout=WALL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Interrupted(f"the machine did not load a tokenizer in {WALL_SECONDS} s; start again") from None
    said = done.stdout.decode(errors="replace").splitlines()
    if done.returncode == 0 and said[-1:] == ["ok"]:
        return
    if done.returncode < 0 and said == ["ready"]:
        raise RuleViolation(
            f"the tokenizer or its chat template took more than {seconds} s or {TOKENIZER_MEMORY >> 30} GB "
            "to load and to encode six short texts",
            "hand in the base model's tokenizer",
        )
    errors = done.stderr.decode(errors="replace").strip().splitlines()
    why = (
        said[-1] if done.returncode == 0 and said else f"does not load: {(errors or ['no message'])[-1]:.200}"
    )
    raise RuleViolation(f"the tokenizer {why}", "hand in the base model's tokenizer")
