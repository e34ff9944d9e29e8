"""Tokenizers rebuilt from the vocabulary in a GGUF file, without PyTorch.

Three kinds: SentencePiece with byte fallback as in Gemma, the same with a space put before the text
as in Llama 2, and byte-level pairs as in Llama 3, Qwen and SmolLM. Others are refused. Left out: a
normaliser of SentencePiece's, which none of these families has.
"""

from __future__ import annotations

from typing import Any

from karploop.errors import UserError
from karploop.models.gguf_file import GGUFFile

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # tokenizer.ggml.token_type
_SPACE = "\u2581"  # how SentencePiece writes one

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2, _SMOLLM = "llama3", "qwen2", "smollm"
_STYLES = {  # tokenizer.ggml.pre → how text is cut before pairs are merged
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _SMOLLM,
}
_REGEX = {_LLAMA3: _WORDS + r"\p{N}{1,3}" + _OTHERS, _QWEN2: _WORDS + r"\p{N}" + _OTHERS}


def gguf_tokenizer(file: GGUFFile):
    """The fast Hugging Face tokenizer of a GGUF file, with its chat template if it has one.

    Ids are the file's. Tokens that only fill up the vocabulary (of the type UNUSED) are left out.
    The beginning of text is added if the file says so; if it says nothing, as llama.cpp would.

    Raises:
      UserError: no vocabulary in it, or a kind of vocabulary that is not supported.
    """
    from transformers import PreTrainedTokenizerFast  # seconds to import, and not needed elsewhere

    kind = file.require("tokenizer.ggml.model")
    if kind == "llama":
        tokenizer, adds_bos = _sentencepiece(file), True
    elif kind == "gpt2":
        tokenizer, adds_bos = _byte_level(file), _style(file) == _LLAMA3
    else:
        raise UserError(
            f"'{file.path}' has a vocabulary of the kind '{kind}', which is not supported. "
            "Supported are llama (SentencePiece) and gpt2 (byte-level pairs). Give the tokenizer "
            "separately"
        )
    _add_tokens(tokenizer, file)
    architecture = file.metadata.get("general.architecture")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_special_tokens(file),
        add_bos_token=file.metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        add_eos_token=file.metadata.get("tokenizer.ggml.add_eos_token", False),
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,  # text goes in and out unchanged
        padding_side="left",  # as decoders need it to continue a batch
        model_max_length=file.metadata.get(f"{architecture}.context_length", int(1e30)),
    )


def _tokens(file: GGUFFile) -> tuple[list[str], list[int]]:
    tokens = file.require("tokenizer.ggml.tokens")
    types = file.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens):
        raise UserError(
            f"'{file.path}' has {len(tokens)} tokens but the types of {len(types)}. Convert the "
            "model again"
        )
    return tokens, types


def _sentencepiece(file: GGUFFile):
    """Pairs of pieces, merged best score first; what no piece covers becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, types = _tokens(file)
    scores = file.require("tokenizer.ggml.scores")
    # A run of spaces is stored as it looks in text, and met after spaces were replaced.
    tokens = [_piece(token, kind) for token, kind in zip(tokens, types, strict=True)]
    vocabulary = {t: i for i, t in enumerate(tokens) if types[i] != _UNUSED}
    unknown = [t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN]
    unknown_id = file.metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(tokens, types, scores, vocabulary),
            unk_token=tokens[unknown_id] if unknown_id is not None else (unknown or [None])[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    normalizing = [normalizers.Replace(" ", _SPACE)]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):  # llama.cpp's default
        normalizing.insert(0, normalizers.Prepend(_SPACE))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normalizing)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _piece(token: str, kind: int) -> str:
    return token.replace(" ", _SPACE) if kind == _USER_DEFINED and not token.strip(" ") else token


def _merges(
    tokens: list[str], types: list[int], scores: list[float], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Every cut of every piece into two, in the order in which SentencePiece would join them.

    SentencePiece finds user-defined pieces before it joins anything, whatever their score; so runs
    of spaces come first. Others of them are matched whole in the text, and need no merges. (Hugging
    Face's own Gemma merges runs too, and cuts those of more than 31 spaces elsewhere.)
    """
    runs = [i for i, t in enumerate(tokens) if types[i] == _USER_DEFINED and not t.strip(_SPACE)]
    normal = [i for i, kind in enumerate(types) if kind == 1]
    normal.sort(key=lambda i: -scores[i])
    parts = {tokens[i]: i for i in runs + normal}
    merges = []
    for i in runs + normal:
        token = tokens[i]
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in parts and pair[1] in parts]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _style(file: GGUFFile) -> str:
    pre = file.require("tokenizer.ggml.pre")
    if pre not in _STYLES:
        raise UserError(
            f"'{file.path}' cuts its text by the rule '{pre}' (tokenizer.ggml.pre), which is not "
            f"supported. Supported are {', '.join(_STYLES)}. Give the tokenizer separately"
        )
    return _STYLES[pre]


def _byte_level(file: GGUFFile):
    """Pairs of bytes, written in GPT-2's alphabet, within words that a regular expression finds."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    style = _style(file)
    tokens, types = _tokens(file)
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]
    vocabulary = {t: i for i, t in enumerate(tokens) if types[i] != _UNUSED}
    # Llama 3 takes a word that is a token as it is, even if no merges lead there.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=style == _LLAMA3))
    if style == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()  # no trace in the file; llama.cpp goes without
    if style == _SMOLLM:
        cut = pre_tokenizers.Digits(individual_digits=True)
    else:
        cut = pre_tokenizers.Split(Regex(_REGEX[style]), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style == _SMOLLM)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer, file: GGUFFile) -> None:
    """Tokens that are found in the text as they stand, before anything is cut or merged."""
    from tokenizers import AddedToken

    tokens, types = _tokens(file)
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(t, normalized=False, special=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED and t.strip(" ")
        ]
    )


def _special_tokens(file: GGUFFile) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens, _ = _tokens(file)
    ids = {k: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for k, name in names.items()}
    return {f"{k}_token": tokens[i] for k, i in ids.items() if i is not None and i < len(tokens)}
