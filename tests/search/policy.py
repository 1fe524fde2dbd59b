"""A tiny policy that has learned a few problems by heart: half of its solutions are right, and all have the layout."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_hrm.demo.tiny_model import make_tiny_model


PROBLEMS = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]


def solutions(i: int) -> list[str]:
    """Two of three steps, and two of two; one of each is right."""
    right, wrong = f"# Answer\n\n{i + 1}\n# END!", f"# Answer\n\n{i + 2}\n# END!"
    return [
        f"# Step 1\nTake {i}.\n\n# Step 2\nAdd 1.\n\n{right}",
        f"# Step 1\nTake {i}.\n\n# Step 2\nAdd 2.\n\n{wrong}",
        f"# Step 1\nTake {i}.\n\n# Step 2\nCount on.\n\n# Step 3\nIt is so.\n\n{right}",
        f"# Step 1\nGuess.\n\n# Step 2\nTake it.\n\n{wrong}",
    ]


def make_policy(folder: Path, steps: int = 120) -> str:
    """Train it, in a few seconds, and save it."""
    pairs = [(f"{row['problem']}\n\n", text) for i, row in enumerate(PROBLEMS) for text in solutions(i)]
    make_tiny_model((a + b for a, b in pairs * 3), folder, kind="causal", num_layers=2, vocab_size=320)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.padding_side = "right"
    batch = tokenizer([a + b + tokenizer.eos_token for a, b in pairs], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3, loss.item()
    model.save_pretrained(folder)
    return str(folder)
