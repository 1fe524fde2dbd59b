"""Solutions to score, and checkpoints to score them with."""

import random
from pathlib import Path

import numpy as np
import torch

from trl_hrm import StepFormat
from trl_hrm.published_formats import PUBLISHED_FORMATS
from trl_hrm.scoring.tree_scorer import ChainScorer

from ..helpers import HEADS, WORDS, tiny_model, tiny_tokenizer
from .published import PUBLISHED, Published


PROMPTS = ["1+2+3?", "add x y", "nothing", "x"]
CANDIDATES = [
    [["add 1", "so = 3"], ["add 1", "so = 7", "thus y"], ["x"], ["add 1"]],
    [["sub", "sum"], ["add 1"], []],
    [],
    [["thus = 7", "so", "x y", "sum = 3", "then"]],
]
CLASSIFIERS = [head for head in HEADS if head != "lm"]
# Published models that vLLM runs as they are. Math-psa is an adapter
NATIVE = [
    name
    for name in PUBLISHED
    if name not in ("openreasoner/Math-psa",) and not name.startswith(("Skywork", "ScalableMath"))
]
PROBLEM = r"小明有 3 个苹果。 Solve $\frac{x}{2} \le 3$."
SOLUTIONS = [
    ["1+2 = 3."],
    ["1+2 = 3.", r"So \[x \le 2\sqrt{2}\]", "所以答案是 5。"],
    ["1+2 = 3.", r"So \[x \le 2\sqrt{2}\]", "Step 3: x"],
    ["Is it 5?"] * 6,
]
SERVED = {"backoff": 0.001, "timeout": 10.0}
VLLM = {
    "max_model_len": 256,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
}


def flat(scores) -> np.ndarray:
    return np.array([score for prompt in scores for candidate in prompt for score in candidate])


def save(folder: Path, step_format: StepFormat = HEADS["classification"], architecture: str = "qwen2") -> str:
    tiny_model(step_format, architecture).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    step_format.save(folder)
    return str(folder)


def save_published(folder: Path, name: str) -> tuple[Published, str, StepFormat | None]:
    """Save a tiny copy of a published model. Its format is returned only if this package does not list the model."""
    published = PUBLISHED[name]
    published.save(folder / name)
    is_listed = name in PUBLISHED_FORMATS[published.format_name][0]
    return published, str(folder / name), None if is_listed else StepFormat.published(published.format_name)


def long_candidates() -> tuple[list[str], list[list[list[str]]]]:
    """Return candidates that fill several vLLM cache blocks, share prefixes, and are batched with others."""
    rng = random.Random(0)
    steps = [" ".join(rng.choices(WORDS, k=12)) for _ in range(8)]
    candidates = [steps[:k] + [" ".join(rng.choices(WORDS, k=9)) for _ in range(3)] for k in (0, 3, 3, 5, 5, 5)]
    return [*PROMPTS, "long"], [*CANDIDATES, candidates]


def num_tokens(scorer, length: int) -> int:
    prompt_ids, [step_ids] = scorer.step_format.encode(scorer.tokenizer, "p", ["x" * length])
    return len(prompt_ids) + len(step_ids)


class PlainScorer(ChainScorer):
    """Score each sequence alone with the transformers model, and record what was read."""

    def __init__(self, model, step_format, tokenizer=None):
        super().__init__(tokenizer or tiny_tokenizer(), step_format, model.config.max_position_embeddings)
        self.model = model
        self.batches = []

    def rows(self, ids) -> torch.Tensor:
        logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        return logits if self.label_token_ids is None else logits.log_softmax(-1)[:, self.label_token_ids]

    @torch.inference_mode()
    def _outputs(self, sequences, progress):
        self.batches.append([ids for ids, _ in sequences])
        outputs = []
        for ids, positions in sequences:
            rows = self.rows(ids)
            self.check_outputs(rows, len(ids))
            outputs.append(rows[positions])
        return outputs
