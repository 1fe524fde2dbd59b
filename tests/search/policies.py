"""A tiny policy that has learned to write steps, so that its greedy text is text and its stop strings are stop strings."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from trl_hrm.demo.tiny_model import make_tiny_model


PROBLEMS = [(a, b) for a in range(12) for b in range(12)]
TEXTS = [
    f"What is {a} + {b}?\n\n# Step 1\nWe add {a} and {b}.\n\n# Step 2\nThe sum is {a + b}.\n\n# Answer\n\n{a + b}"
    for a, b in PROBLEMS
]


def make_policy(folder: str | Path, max_position_embeddings: int, num_steps: int = 60) -> None:
    """Save a Qwen2 model with heads of 32 dimensions, trained for some steps on `TEXTS`, and its tokenizer."""
    make_tiny_model(
        TEXTS,
        folder,
        kind="causal",
        vocab_size=400,
        num_layers=2,
        max_position_embeddings=max_position_embeddings,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    train(model, tokenizer, num_steps)
    model.save_pretrained(folder)


def train(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, num_steps: int) -> None:
    set_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rows = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in TEXTS]
    for step in range(num_steps):
        batch = [rows[(step * 16 + i) * 5 % len(rows)] for i in range(16)]
        width = max(map(len, batch))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in batch])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in batch])
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
