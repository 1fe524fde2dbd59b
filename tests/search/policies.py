"""Tiny policies trained to write steps, with normal greedy text, stop strings and answers."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from trl_hrm.tiny_model import make_tiny_model


PROBLEMS = [(a, b) for a in range(12) for b in range(12)]
TEXTS = [
    f"What is {a} + {b}?\n\n# Step 1\nWe add {a} and {b}.\n\n# Step 2\nThe sum is {a + b}.\n\n# Answer\n\n{a + b}"
    for a, b in PROBLEMS
]

# A few memorised problems with two right and two wrong solutions each. They end with a line break, so that no
# token crosses the border between problem and solution
KNOWN = [{"problem": f"What is {i} + 1?\n", "answer": str(i + 1)} for i in range(4)]
SOLUTIONS = [
    f"{row['problem']}# Step 1\n{first}\n\n# Step 2\n{second}\n\n# Answer\n\n{int(row['answer']) + off}\n# END!"
    for row in KNOWN
    for first, second, off in (
        ("We start.", "Add 1.", 0),
        ("We start.", "Add 2.", 1),
        ("Count.", "Go on.\n\n# Step 3\nIt is so.", 0),
        ("Guess.", "Take it.", 1),
    )
]


def make_policy(
    folder: str | Path, max_position_embeddings: int, num_steps: int = 120, texts: list[str] = TEXTS
) -> None:
    """Save a Qwen2 model (head size 32), trained for some steps on `texts`, and its tokenizer."""
    make_tiny_model(
        texts,
        folder,
        kind="causal",
        vocab_size=400,
        num_layers=2,
        max_position_embeddings=max_position_embeddings,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    train(model, tokenizer, num_steps, texts)
    model.save_pretrained(folder)


def train(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, num_steps: int, texts: list[str]) -> None:
    set_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rows = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
    for step in range(num_steps):
        batch = [rows[(step * 16 + i) * 5 % len(rows)] for i in range(16)]
        width = max(map(len, batch))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in batch])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in batch])
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
