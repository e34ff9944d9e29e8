"""Published architectures as values of `ModelConfig`, and their tensors' names.

A family is a reading of a Hugging Face `config.json`. The way back is checked rather than trusted:
`to_hf` writes a config for each family and takes the one that reads back as the same model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from karploop.config import ModelConfig
from karploop.errors import UserError

_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_tanh")
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Keys of a ModelConfig that say how it runs, not what it is.
EXECUTION = ("dtype", "scan", "remat", "max_length")


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
      architecture: its causal language model's class there.
      fixed: what every member has.
      activations: names of its feed-forward activation.
      tied: whether embedding and output matrix are one.
      window: whether sliding windows are "never", "switched" (use_sliding_window) or "always".
      period: every `period`-th layer has full attention where `layer_types` is absent.
      rope_base, head_width: where the config does not say; 0: width over heads.
    """

    model_type: str
    architecture: str
    fixed: Mapping[str, Any]
    activations: Sequence[str] = _SILU
    tied: bool = False
    window: str = "never"
    period: int = 1
    rope_base: float = 10_000.0
    head_width: int = 0


_GEMMA = dict(activation="geglu", norm_offset=True, post_norms=True, embedding_scale=True)
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", dict(activation="swiglu")),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            dict(activation="swiglu", qkv_bias=True),
            window="switched",
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            dict(activation="swiglu", qk_norm=True),
            window="switched",
            head_width=128,
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            _GEMMA,
            activations=_GELU,
            tied=True,
            window="always",
            period=2,
            head_width=256,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _GEMMA | dict(qk_norm=True),
            activations=_GELU,
            tied=True,
            window="always",
            period=6,
            rope_base=1_000_000.0,
            head_width=256,
        ),
    )
}


def from_hf(config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """The model that a Hugging Face config describes, and its vocabulary size.

    Raises:
      UserError: an architecture that is not known, or a setting of it that is not supported.
    """
    config = config.get("text_config", config) if "text_config" in config else config
    family = _family(config)
    read = _Reader(config)
    width, heads = read("hidden_size"), read("num_attention_heads")
    layers = read("num_hidden_layers")
    activation = read.get("hidden_activation") or read.get("hidden_act") or family.activations[0]
    if activation not in family.activations:
        raise UserError(
            f"the model's activation is '{activation}': of {family.model_type}, karploop knows "
            f"{family.activations[0]}"
        )
    attention_bias = bool(read.get("attention_bias"))
    fields = dict(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=read.get("num_key_value_heads") or heads,
        head_width=read.get("head_dim") or family.head_width or width // heads,
        mlp_width=read("intermediate_size"),
        max_length=read("max_position_embeddings"),
        norm_epsilon=float(read.get("rms_norm_eps", 1e-6)),
        tied=bool(read.get("tie_word_embeddings", family.tied)),
        positions="rope",
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=bool(read.get("mlp_bias")) and family.model_type == "llama",
    )
    fields |= family.fixed | _windows(family, read, layers) | _rope(family, config)
    if "gemma" in family.model_type:
        fields |= dict(
            attention_scale=float(read.get("query_pre_attn_scalar") or 256) ** -0.5,
            attention_softcap=_cap(config, family, "attn_logit_softcapping", 50.0),
            logit_softcap=_cap(config, family, "final_logit_softcapping", 30.0),
        )
    return ModelConfig(**fields), read("vocab_size")


def to_hf(model: ModelConfig, vocabulary: int, dtype: str = "float32") -> dict[str, Any]:
    """A Hugging Face config that describes this model.

    Raises:
      UserError: no family of transformers has this architecture.
    """
    for family in FAMILIES.values():
        written = _write(family, model, vocabulary, dtype)
        if _is_same(from_hf(written)[0], model):
            return written
    raise UserError(
        "no model family of transformers is built like this one, so it cannot be exported: "
        f"export knows {', '.join(FAMILIES)}. A model trained from scratch fits llama with "
        "positions=rope, activation=swiglu and qk_norm=false"
    )


def period(flags: Sequence[bool]) -> str:
    """The shortest pattern of f (full) and s (sliding) that repeats to these layers."""
    text = "".join("s" if sliding else "f" for sliding in flags)
    for length in range(1, len(text) + 1):
        if (text[:length] * len(text))[: len(text)] == text:
            return text[:length]
    return "f"


@dataclass(frozen=True)
class Slot:
    """Where a parameter of ours lies in a checkpoint: a name, and how many axes are its inputs.

    A linear layer's weight is kept as (outputs, inputs) there and as (inputs …, outputs …) here, a
    bias flat. The embedding is a table, kept as it is here.
    """

    name: str
    inputs: int = 0
    table: bool = False

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The checkpoint's shape of a parameter of shape `ours`."""
        if self.table:
            return tuple(ours)
        if not self.inputs:
            return (math.prod(ours),)
        return math.prod(ours[self.inputs :]), math.prod(ours[: self.inputs])

    def to_ours(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        return (array.T if self.inputs else array).reshape(shape)

    def from_ours(self, array: np.ndarray) -> np.ndarray:
        theirs = self.shape(array.shape)
        return array.reshape(theirs[::-1]).T if self.inputs else array.reshape(theirs)


def slot(path: tuple[str, ...], model: ModelConfig) -> Slot:
    """The slot of one parameter, by its path; `{}` in the name stands for the layer's number.

    Args:
      path: as in ("layers_3", "attention", "query") or, scanned, ("layers", "attention", "query").
    """
    if not path[0].startswith("layers"):
        return _OUTSIDE[path[0]]
    names = _IN_LAYER | (_FOUR_NORMS if model.post_norms else _TWO_NORMS)
    found = names["/".join(path[1:])]
    number = path[0].removeprefix("layers").removeprefix("_") or "{}"
    return Slot(f"model.layers.{number}.{found.name}", found.inputs)


_OUTSIDE = {
    "embedding": Slot("model.embed_tokens.weight", table=True),
    "head": Slot("lm_head.weight", 1),
    "final_norm": Slot("model.norm.weight"),
}
_IN_LAYER = {
    "attention/query": Slot("self_attn.q_proj.weight", 1),
    "attention/key": Slot("self_attn.k_proj.weight", 1),
    "attention/value": Slot("self_attn.v_proj.weight", 1),
    "attention/out": Slot("self_attn.o_proj.weight", 2),
    "attention/query_bias": Slot("self_attn.q_proj.bias"),
    "attention/key_bias": Slot("self_attn.k_proj.bias"),
    "attention/value_bias": Slot("self_attn.v_proj.bias"),
    "attention/out_bias": Slot("self_attn.o_proj.bias"),
    "attention/query_norm/scale": Slot("self_attn.q_norm.weight"),
    "attention/key_norm/scale": Slot("self_attn.k_norm.weight"),
    "attention_norm/scale": Slot("input_layernorm.weight"),
    "mlp/up": Slot("mlp.up_proj.weight", 1),
    "mlp/gate": Slot("mlp.gate_proj.weight", 1),
    "mlp/down": Slot("mlp.down_proj.weight", 1),
    "mlp/up_bias": Slot("mlp.up_proj.bias"),
    "mlp/gate_bias": Slot("mlp.gate_proj.bias"),
    "mlp/down_bias": Slot("mlp.down_proj.bias"),
}
_TWO_NORMS = {"mlp_norm/scale": Slot("post_attention_layernorm.weight")}
_FOUR_NORMS = {
    "attention_post_norm/scale": Slot("post_attention_layernorm.weight"),
    "mlp_norm/scale": Slot("pre_feedforward_layernorm.weight"),
    "mlp_post_norm/scale": Slot("post_feedforward_layernorm.weight"),
}


class _Reader:
    """Values of a config.json, with an error that names what is missing."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config

    def __call__(self, key: str) -> Any:
        if self._config.get(key) is None:
            raise UserError(f"the model's config.json has no '{key}': is it whole?")
        return self._config[key]

    def get(self, key: str, default: Any = None) -> Any:
        value = self._config.get(key)
        return default if value is None else value


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        raise UserError(
            f"the model's config.json has the model_type '{model_type}', and the decoder covers "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _windows(family: Family, read: _Reader, layers: int) -> dict[str, Any]:
    window = read.get("sliding_window", 4096 if family.window == "always" else 0)
    switched_on = family.window == "always" or (
        family.window == "switched" and bool(read.get("use_sliding_window"))
    )
    kinds = read.get("layer_types")
    if kinds is None and family.window == "switched":
        first = read.get("max_window_layers", 28)
        kinds = [_SLIDING if layer >= first else _FULL for layer in range(layers)]
    elif kinds is None:
        every = read.get("sliding_window_pattern", family.period)
        kinds = [_SLIDING if (layer + 1) % every else _FULL for layer in range(layers)]
    unknown = sorted(set(kinds) - {_SLIDING, _FULL})
    if unknown or len(kinds) != layers:
        raise UserError(
            f"the model's 'layer_types' has {len(kinds)} entries for {layers} layers, among them "
            f"{unknown or kinds[:1]}: karploop knows {_SLIDING} and {_FULL}"
        )
    pattern = period([kind == _SLIDING for kind in kinds])
    if not switched_on or not window or "s" not in pattern:
        return dict(window=0, pattern="f")
    return dict(window=int(window), pattern=pattern)


def _rope(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`."""
    given = dict(config.get("rope_parameters") or {})
    local = dict(given.get(_SLIDING) or {})
    full = dict(given.get(_FULL) or {}) if _FULL in given or _SLIDING in given else given
    full = (config.get("rope_scaling") or {}) | full
    base = full.get("rope_theta") or config.get("rope_theta") or family.rope_base
    fields: dict[str, Any] = dict(rope_base=float(base))
    if family.model_type == "gemma3_text":
        base = local.get("rope_theta") or config.get("rope_local_base_freq") or 10_000.0
        fields["rope_local_base"] = float(base)
    kind = full.get("rope_type") or full.get("type") or "default"
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"the model scales its rotary positions by '{kind}': karploop knows linear and llama3"
        )
    fields |= dict(rope_scaling=kind, rope_factor=float(full["factor"]))
    if kind == "llama3":
        fields |= dict(
            rope_low=float(full["low_freq_factor"]),
            rope_high=float(full["high_freq_factor"]),
            rope_original_length=int(full["original_max_position_embeddings"]),
        )
    return fields


def _cap(config: Mapping[str, Any], family: Family, key: str, gemma2: float) -> float:
    """A soft-cap; absent, Gemma 2 has its default and Gemma 3 none. An explicit null is none."""
    if key in config:
        return float(config[key] or 0.0)
    return gemma2 if family.model_type == "gemma2" else 0.0


def _write(family: Family, model: ModelConfig, vocabulary: int, dtype: str) -> dict[str, Any]:
    """The config of `family` that comes nearest to `model`."""
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "vocab_size": vocabulary,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_width,
        "max_position_embeddings": model.max_length,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied,
        "attention_bias": model.out_bias,
    }
    gemma = family.model_type.startswith("gemma")
    config["hidden_activation" if gemma else "hidden_act"] = family.activations[0]
    if family.model_type == "llama":
        config["mlp_bias"] = model.mlp_bias
    if family.window != "never":
        config["sliding_window"] = model.window or None
        config["layer_types"] = [_SLIDING if s else _FULL for s in model.sliding_layers]
    if family.window == "switched":
        config["use_sliding_window"] = bool(model.window)
    if gemma:
        scale = model.attention_scale or model.head_width**-0.5
        scalar = scale**-2
        near = abs(scalar - round(scalar)) < 1e-6  # transformers wants an integer
        config["query_pre_attn_scalar"] = round(scalar) if near else scalar
        config["attn_logit_softcapping"] = model.attention_softcap or None
        config["final_logit_softcapping"] = model.logit_softcap or None
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_base}
    if model.rope_scaling != "none":
        rope |= {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": model.rope_low,
            "high_freq_factor": model.rope_high,
            "original_max_position_embeddings": model.rope_original_length,
        }
    config["rope_parameters"] = rope
    if family.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": model.rope_local_base or model.rope_base}
        config["rope_parameters"] = {_FULL: rope, _SLIDING: local}
    return config


def _is_same(one: ModelConfig, other: ModelConfig) -> bool:
    return _essence(one) == _essence(other)


def _essence(model: ModelConfig) -> dict[str, Any]:
    """What decides a model's outputs, each in one spelling."""
    fields = dataclasses.asdict(model)
    for name in EXECUTION:
        del fields[name]
    fields |= dict(
        kv_heads=model.key_value_heads,
        pattern=model.sliding_layers,
        attention_scale=round(model.attention_scale or model.head_width**-0.5, 12),
        rope_local_base=(model.rope_local_base or model.rope_base) if model.window else 0.0,
    )
    if model.rope_scaling != "llama3":
        del fields["rope_low"], fields["rope_high"], fields["rope_original_length"]
    if model.rope_scaling == "none":
        del fields["rope_factor"]
    return fields
