"""A tokenizer of characters as a file of `transformers`."""

from __future__ import annotations

import pathlib

from karploop.data.tokenizer import CharTokenizer


def save_characters(characters: CharTokenizer, folder: pathlib.Path) -> None:
    """Writes what `transformers` and `data.pretrained.load_tokenizer` read as the same tokenizer.

    Ids are the same, and a text begins with the start token. A character outside the alphabet is
    an error there, too: there is no token for what is unknown.
    """
    import tokenizers  # both: seconds to import, and not needed elsewhere
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = characters.special
    made = tokenizers.Tokenizer(models.WordLevel(characters.tokens(characters.vocab_size)))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, characters.bos_id)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def ends(characters: CharTokenizer) -> dict[str, int]:
    """The special tokens by what a config.json calls them."""
    return {f"{name}_token_id": getattr(characters, f"{name}_id") for name in ("pad", "bos", "eos")}
