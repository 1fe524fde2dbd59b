"""Create a small random model with its own tokenizer from data, for demos and tests without the Hub."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForTokenClassification, Qwen2Tokenizer, set_seed


def make_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Qwen2Tokenizer:
    """
    Train a byte-level BPE tokenizer, which can encode every text and separator.

    It is a `Qwen2Tokenizer`, because `AutoTokenizer` loads every tokenizer next to a Qwen2 configuration as this
    class. A tokenizer with other rules for splitting text would produce different ids after loading.
    """
    blank = Qwen2Tokenizer(eos_token="<|endoftext|>", pad_token="<|pad|>")
    return blank.train_new_from_iterator(texts, vocab_size, show_progress=False)


def make_tiny_model(
    texts: Iterable[str],
    output_dir: str | Path,
    kind: Literal["token", "causal"] = "token",
    hidden_size: int = 64,
    num_layers: int = 3,
    vocab_size: int = 2048,
    num_labels: int = 2,
    max_position_embeddings: int = 4096,
    seed: int = 42,
) -> None:
    """
    Save a small Qwen2 model with random weights, and a tokenizer trained on `texts`.

    Args:
        texts (`Iterable[str]`):
            Texts to train the tokenizer on.
        output_dir (`str` or `Path`):
            Output folder.
        kind (`str`, *optional*, defaults to `"token"`):
            `"token"`: token classifier with `num_labels` outputs. `"causal"`: causal language model.
        hidden_size, num_layers, vocab_size, num_labels, max_position_embeddings (`int`, *optional*):
            Sizes of the model. Attention heads have 32 dimensions.
        seed (`int`, *optional*, defaults to `42`):
            Seed for the weights.
    """
    if hidden_size % 32:
        raise ValueError(
            f"`hidden_size` is {hidden_size}. It must be a multiple of 32 (the size of an attention head)."
        )
    tokenizer = make_tokenizer(texts, vocab_size)
    config = Qwen2Config(
        initializer_range=hidden_size**-0.5,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=num_labels,
        dtype="float32",
    )
    set_seed(seed)
    model = (Qwen2ForCausalLM if kind == "causal" else Qwen2ForTokenClassification)(config).to(torch.float32)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def texts_of(value: Any) -> Iterator[str]:
    """Yield all strings in a nested value, such as a row with prompts and completions."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_of(item)


def read_texts(data: str, config: str | None = None) -> Iterator[str]:
    """Yield all strings of a JSON Lines file, or of all splits of a dataset (and its `config`) as loaded by `load_dataset`."""
    if Path(data).is_file():
        with open(data, encoding="utf-8") as file:
            for line in file:
                yield from texts_of(json.loads(line))
        return
    from datasets import load_dataset

    for split in load_dataset(data, config).values():
        for row in split:
            yield from texts_of(row)
