"""GGUF model files, read as the Hugging Face checkpoints that they were made from.

llama.cpp's converter renames tensors, reorders the query and key rows of Llama, adds one to the
norm weights of Gemma and leaves out what its own code can tell from the size of a model. All of
this is undone here. Left out: mixtures of experts, vision towers, adapters, and every family that
is not in FAMILIES.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from karploop.errors import UserError
from karploop.models.gguf_file import GGUFFile, find_package, join_parts, read_gguf
from karploop.models.gguf_tokenizer import gguf_tokenizer

__all__ = ["FAMILIES", "GGUFCheckpoint", "find_package", "gguf_tokenizer", "join_parts"]

TYPES = tuple(
    GGMLQuantizationType[name] for name in "F32 F16 BF16 Q8_0 Q4_0 Q5_0 Q4_K Q5_K Q6_K".split()
)

_NUMBERS = 8192  # of a row that is dequantised, about

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORMS = {"ffn_norm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Given for other families than these, and by another meaning than Hugging Face's attention_factor.
_YARN_UNUSUAL = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier")
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclasses.dataclass(frozen=True)
class Family:
    """How llama.cpp writes an architecture, and what Hugging Face calls it."""

    model_type: str
    model_class: str
    modules: Mapping[str, str]  # of one layer: llama.cpp's name → Hugging Face's
    permuted: bool = False  # query and key rows are interleaved for llama.cpp's rotary embedding
    norm_shift: float = 0.0  # what the converter added to norm weights
    pattern: int = 0  # every pattern-th layer attends to everything, others to a window; 0: all do


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _BLOCK | _PRE_NORMS, permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _BLOCK | _PRE_NORMS),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _BLOCK | _PRE_NORMS | _HEAD_NORMS),
    "gemma2": Family(
        "gemma2", "Gemma2ForCausalLM", _BLOCK | _SANDWICH_NORMS, norm_shift=1.0, pattern=2
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _BLOCK | _SANDWICH_NORMS | _HEAD_NORMS,
        norm_shift=1.0,
        pattern=6,
    ),
}


class GGUFCheckpoint:
    """A GGUF file, read as the Hugging Face checkpoint it was made from.

    Attributes:
      file: its metadata and stored tensors.
      config: the config.json that belongs to it, with the keys of transformers 5.
    """

    file: GGUFFile
    config: dict[str, Any]

    def __init__(self, path: str | os.PathLike):
        """Maps the file (or all of a split model's files) and checks that nothing is missing.

        Raises:
          UserError: no GGUF file, a truncated one, an unknown architecture, a tensor that is
            missing, unknown, misshapen or of an unsupported type, or metadata that is missing or
            that the family's Hugging Face config cannot express.
        """
        self.file = file = read_gguf(path)
        self.path = file.path
        architecture = file.require("general.architecture")
        if architecture not in FAMILIES:
            raise UserError(
                f"'{path}' holds a model of the architecture '{architecture}', which is not known. "
                f"Known are: {', '.join(FAMILIES)}"
            )
        self._family = FAMILIES[architecture]
        self._tensors = _renamed(file, self._family)
        self.config = _config(file, self._family, set(self._tensors))
        self._check()

    def names(self) -> list[str]:
        """Hugging Face names such as model.layers.0.self_attn.q_proj.weight.

        There is no lm_head.weight where it is the embedding (`tie_word_embeddings`).
        """
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `read` gives; reads nothing. Raises KeyError for an unknown name."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32, dequantised, its rows and values as Hugging Face has them.

        The array is the caller's own. Raises KeyError for an unknown name.
        """
        tensor = self._tensors[name]
        # The package works on sixteen rows at a time, here made long enough to be worth the calls,
        # and keeps all of them before it joins them: a part at a time stays in a core's cache.
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        together = math.gcd(len(rows), 1 << (_NUMBERS // tensor.shape[-1]).bit_length())
        rows = rows.reshape(len(rows) // together, -1)
        values = np.empty((len(rows), math.prod(tensor.shape) // len(rows)), np.float32)
        for part in (slice(start, start + 16) for start in range(0, len(rows), 16)):
            values[part] = gguf.dequantize(rows[part], tensor.type)
        values = values.reshape(tensor.shape)
        if name.endswith("norm.weight"):
            values -= np.float32(self._family.norm_shift)
        if self._family.permuted and ".self_attn.q_proj." in name:
            return _unpermute(values, self.config["num_attention_heads"])
        if self._family.permuted and ".self_attn.k_proj." in name:
            return _unpermute(values, self.config["num_key_value_heads"])
        return values

    def _check(self) -> None:
        """Raises UserError unless these are exactly the config's tensors, in types we can read."""
        expected = _shapes(self.config, self._family)
        for name, shape in expected.items():
            if name not in self._tensors:
                raise UserError(
                    f"'{self.path}' has no tensor for '{name}'. The file is incomplete, or the "
                    f"model is not a plain {self.config['model_type']}: convert it again"
                )
            if self._tensors[name].shape != shape:
                raise UserError(
                    f"'{name}' in '{self.path}' has the shape {self._tensors[name].shape}, but the "
                    f"metadata of the file ask for {shape}. Convert the model again"
                )
        for name, tensor in self._tensors.items():
            if name not in expected:
                raise UserError(
                    f"'{self.path}' has a tensor for '{name}', which a {self.config['model_type']} "
                    "with these metadata does not have. Convert the model again"
                )
            if tensor.type not in TYPES:
                raise UserError(
                    f"'{name}' in '{self.path}' is stored as {tensor.type.name}, which is not "
                    f"supported. Supported are {', '.join(t.name for t in TYPES)}: choose another "
                    "quantisation of the model, such as Q8_0 or Q4_K_M"
                )


def _renamed(file: GGUFFile, family: Family) -> dict:
    """Stored tensors by their Hugging Face names."""
    names = {}
    for stored in file.tensors:
        module, _, kind = stored.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        inner = family.modules.get(block[2]) if block else None
        if stored == "rope_freqs.weight" and family.permuted:
            continue  # becomes a part of the config
        elif inner and kind in ("weight", "bias"):
            names[f"model.layers.{block[1]}.{inner}.{kind}"] = file.tensors[stored]
        elif module in _OUTER and kind == "weight":
            names[f"{_OUTER[module]}.weight"] = file.tensors[stored]
        else:
            raise UserError(
                f"the tensor '{stored}' of '{file.path}' has no place in a {family.model_type} "
                "model: mixtures of experts, adapters and other extensions are not supported. Give "
                "a file of the plain model"
            )
    return names


def _shapes(config: dict[str, Any], family: Family) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model with this config."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    matrices = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    biased = [name for name in matrices if name.startswith(_biased(config))]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        for module in family.modules.values():
            vector = (config["head_dim"],) if module in _HEAD_NORMS.values() else (width,)
            shapes[f"model.layers.{i}.{module}.weight"] = matrices.get(module, vector)
        for module in biased:
            shapes[f"model.layers.{i}.{module}.bias"] = matrices[module][:1]
    return shapes


def _biased(config: dict[str, Any]) -> tuple[str, ...]:
    """What the names of the layers' modules with a bias begin with."""
    if config["model_type"] == "qwen2":  # always, and never on the output
        return ("self_attn.q", "self_attn.k", "self_attn.v")
    attention = ("self_attn.",) if config["attention_bias"] else ()
    return attention + (("mlp.",) if config.get("mlp_bias") else ())


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads, half, 2] of llama.cpp, partners side by side, to [heads, 2, half]."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


class _Keys:
    """The metadata of the file's architecture. What is given by layer must be the same for all."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.prefix = file.require("general.architecture")

    def required(self, key: str) -> Any:
        return self._uniform(key, self.file.require(f"{self.prefix}.{key}"))

    def optional(self, key: str, default: Any = None) -> Any:
        return self._uniform(key, self.by_layer(key, default))

    def by_layer(self, key: str, default: Any = None) -> Any:
        """A value, or a list of one for each layer."""
        return self.file.metadata.get(f"{self.prefix}.{key}", default)

    def _uniform(self, key: str, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise UserError(
                f"'{self.prefix}.{key}' in '{self.file.path}' differs between layers "
                f"({value[:4]} …), which is not supported. Give a model whose layers are alike"
            )
        return value[0]


def _config(file: GGUFFile, family: Family, names: set[str]) -> dict[str, Any]:
    """The Hugging Face config of a file with tensors of these names.

    Initialisation and dropout have no trace in the file, and are left to the config class.
    """
    keys = _Keys(file)
    layers, width = keys.required("block_count"), keys.required("embedding_length")
    heads = keys.required("attention.head_count")
    # Files of models with heads of width / heads need not say so; Llama's may say it of rope alone.
    rotary = keys.optional("rope.dimension_count")
    head_dim = keys.optional("attention.key_length", rotary or width // heads)
    if {head_dim} != {keys.optional("attention.value_length", head_dim), rotary or head_dim}:
        raise UserError(
            f"'{file.path}' has values or a rotary embedding of another width than the keys' "
            f"{head_dim}, which {family.model_type} cannot express. Give a model where all three "
            "are the same"
        )
    embedding = file.tensors.get("token_embd.weight")
    config = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        # Not from the metadata: the rows are what there is, padding of the vocabulary included.
        "vocab_size": embedding.shape[0] if embedding else keys.required("vocab_size"),
        "hidden_size": width,
        "intermediate_size": keys.required("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.optional("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.required("context_length"),
        "rms_norm_eps": keys.required("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos(file),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if family.model_type != "qwen2":  # whose config has no such key
        config["attention_bias"] = any(name.endswith("q_proj.bias") for name in names)
    if family.pattern:
        return config | _gemma(keys, family, config)
    if keys.optional("attention.sliding_window"):
        raise UserError(
            f"'{file.path}' is a {family.model_type} with a sliding window, and nothing says of "
            "which layers. Give a model that attends to everything"
        )
    rope = _rope(keys, 10000.0)  # llama.cpp's default
    config |= {"hidden_act": "silu", "rope_parameters": rope}
    if family.model_type == "llama":
        config["mlp_bias"] = any(name.endswith("gate_proj.bias") for name in names)
        if "rope_freqs.weight" in file.tensors:
            config["rope_parameters"] = _llama3_rope(file, config)
    else:  # the converter writes no window for Qwen, and llama.cpp would use none
        config |= {
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": ["full_attention"] * layers,
        }
    return config


def _gemma(keys: _Keys, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """What the configs of Gemma have besides. GGUF carries the smaller part of it."""
    gemma2 = family.model_type == "gemma2"
    layers = config["num_hidden_layers"]
    # The pattern is the family's unless a (recent) file says otherwise, as a period or by layer.
    pattern = keys.by_layer("attention.sliding_window_pattern", family.pattern)
    # Gemma 3 without windows is written as no window at all; Gemma 2 always had one.
    window = keys.optional("attention.sliding_window", 4096 if gemma2 else None)
    if isinstance(pattern, list):
        sliding = [bool(local) for local in pattern]
    else:
        sliding = [pattern == 0 or (i + 1) % pattern != 0 for i in range(layers)]
    if len(sliding) != layers:
        raise UserError(
            f"'{keys.file.path}' has a pattern of windows for {len(sliding)} layers, but {layers} "
            "layers. Convert the model again"
        )
    # The scale of attention is never written. As llama.cpp does, we know the 27B models by their
    # depth: they divide by the square root of width / heads, all others by that of head_dim.
    scalar = config["head_dim"]
    if layers == (46 if gemma2 else 62):
        scalar = config["hidden_size"] // config["num_attention_heads"]
    rope = _rope(keys, 10000.0 if gemma2 else 1000000.0)  # only Gemma 3 says it
    if not gemma2:  # layers with a window have a base of their own, which old files do not carry
        local = keys.optional("rope.freq_base_swa", 10000.0)
        rope = {
            "full_attention": rope,  # the scaling is theirs alone
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "rope_parameters": rope,
        "sliding_window": window,
        "layer_types": [
            "sliding_attention" if local and window else "full_attention" for local in sliding
        ],
        "attn_logit_softcapping": keys.optional("attn_logit_softcapping", 50.0 if gemma2 else None),
        "final_logit_softcapping": keys.optional(
            "final_logit_softcapping", 30.0 if gemma2 else None
        ),
    }


def _rope(keys: _Keys, base: float) -> dict[str, Any]:
    """rope_parameters for llama.cpp's scaling types, with `base` if the file has none.

    Raises UserError for rare types.
    """
    base = keys.optional("rope.freq_base", base)
    # Before there were types, a linear factor stood alone.
    factor = keys.optional("rope.scaling.factor", keys.optional("rope.scale_linear", 1.0))
    kind = keys.optional("rope.scaling.type", "none" if factor == 1.0 else "linear")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default", "rope_theta": base}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": base, "factor": factor}
    unusual = [key for key in _YARN_UNUSUAL if keys.optional(f"rope.scaling.{key}") is not None]
    if kind == "yarn" and not unusual:
        return {
            "rope_type": "yarn",
            "rope_theta": base,
            "factor": factor,
            "original_max_position_embeddings": keys.required(
                "rope.scaling.original_context_length"
            ),
            "beta_fast": keys.optional("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.optional("rope.scaling.yarn_beta_slow", 1.0),
        }
    raise UserError(
        f"'{keys.file.path}' scales its rotary embedding by {' with '.join([kind, *unusual])}, "
        "which is not supported. Supported are none, linear, yarn and Llama 3's. Give a model that "
        "uses one of these"
    )


def _llama3_rope(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """The scaling of Llama 3, from the factors by which the file divides each frequency.

    The factors depend on the original length over each of the two frequency factors, and so fix the
    three parameters up to a common scale. Every released model has low_freq_factor 1.

    Raises:
      UserError: factors that no such parameters give.
    """
    base = config["rope_parameters"]["rope_theta"]
    half = np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"]
    per_token_R = base**-half / (2 * math.pi)  # rotations a token, by rotary frequency
    stored = file.tensors["rope_freqs.weight"]
    factors_R = gguf.dequantize(stored.data, stored.type).astype(np.float64)
    if config["rope_parameters"]["rope_type"] == "default" and factors_R.shape == per_token_R.shape:
        factor = float(factors_R.max())
        candidates = [(4.0, 8192)]  # of every release; few frequencies fit many parameters
        between = (factors_R > 1) & (factors_R < factor)
        if between.sum() >= 2:
            smooth_R = (1 / factors_R[between] - 1 / factor) / (1 - 1 / factor)
            slope, offset = np.polyfit(per_token_R[between], smooth_R, 1)
            high = 1 - 1 / offset
            candidates.append((round(high, 3), round(slope * (high - 1))))
        for high, original in candidates:
            rope = {
                "rope_type": "llama3",
                "rope_theta": base,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
            if factor > 1 and np.allclose(_llama3_factors(rope, per_token_R), factors_R, rtol=1e-4):
                return rope
        if np.all(factors_R == 1):
            return config["rope_parameters"]
    raise UserError(
        f"the factors 'rope_freqs.weight' of '{file.path}' are not those of Llama 3's scaling, and "
        "others are not supported. Give a model without them"
    )


def _llama3_factors(rope: dict[str, Any], per_token_R: np.ndarray) -> np.ndarray:
    """By how much each frequency is divided: 1 for fast ones, `factor` for slow ones."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    if high <= low:
        return np.zeros_like(per_token_R)  # no factors at all
    turns_R = rope["original_max_position_embeddings"] * per_token_R
    smooth_R = np.clip((turns_R - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth_R) / rope["factor"] + smooth_R)


def _eos(file: GGUFFile) -> int | list[int] | None:
    """The end of text, and the end of a turn where the file has one of its own."""
    ids = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    known = list(dict.fromkeys(i for i in ids if i is not None))
    return known if len(known) > 1 else (known or [None])[0]
