"""
A small policy, trained from scratch to solve the demo's problems with slips, and to detect and correct its own slips.

To detect a slip, the policy must compare two tokens that should be equal. This is learned late, because the token "Wait" is a small part of
the loss, and the tokens of slips are unpredictable noise. A policy trained on whole solutions still writes "Wait" at random after a thousand
steps. So training has four stages:

1. Solutions without slips, to learn arithmetic.
2. Solutions in which every slip is corrected. The loss only covers the tokens that depend on detecting the slip: whether a step is a
   correction, and the correction. Slips mostly copy one value. If all wrong values were equally frequent, no single token would be
   informative, and most seeds would not learn to detect slips in this number of steps.
3. The same with all wrong values equally frequent.
4. The final distribution of slips and corrections.
"""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..tiny_model import make_tiny_model
from .world import STEP, Problem, solve


@dataclass(frozen=True)
class Stage:
    """
    A stage of the training.

    Args:
        share (`float`): Share of all optimizer steps.
        learning_rate (`float`): Peak learning rate. It decays to 0.
        slip_rate, correction_rate (`float`): See [`~demo.world.solve`].
        decisions (`bool`): Whether to train only on the first token of each step and on corrections. A quarter of the rows are
            still whole solutions without slips, so that arithmetic is not forgotten.
        skew (`float`): See [`~demo.world.solve`].
    """

    share: float
    learning_rate: float
    slip_rate: float
    correction_rate: float
    decisions: bool = False
    skew: float = 1.0


CURRICULUM = (
    Stage(share=1 / 6, learning_rate=3e-3, slip_rate=0.0, correction_rate=0.0),
    Stage(share=1 / 4, learning_rate=5e-3, slip_rate=0.5, correction_rate=1.0, decisions=True, skew=4.0),
    Stage(share=1 / 3, learning_rate=5e-3, slip_rate=0.5, correction_rate=1.0, decisions=True),
    Stage(share=1 / 4, learning_rate=1e-3, slip_rate=0.2, correction_rate=0.5),
)
BATCH_SIZE = 32


def solution_text(steps: list[str]) -> str:
    """Return the text of a solution in the format of the policy, without the EOS token."""
    return "\n\n".join(steps)


def train_policy(output_dir: str | Path, problems: list[Problem], max_steps: int = 1200, seed: int = 42) -> None:
    """
    Train a policy from scratch, in a minute or two on CPU.

    Args:
        output_dir (`str` or `Path`):
            Output folder of the model and the tokenizer.
        problems (`list[Problem]`):
            Training problems.
        max_steps (`int`, *optional*, defaults to `1200`):
            Total number of optimizer steps, with 32 solutions each.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the solutions, the weights and the training.
    """
    rng = random.Random(seed)
    sample = [(problem.text(), solution_text(solve(problem, rng)[0])) for problem in problems[:1000]]
    make_tiny_model((text for pair in sample for text in pair), output_dir, kind="causal", vocab_size=320, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    collator = DataCollatorForSeq2Seq(tokenizer)
    bar = _Bar(sum(round(max_steps * stage.share) for stage in CURRICULUM))
    for stage in CURRICULUM:
        steps = round(max_steps * stage.share)
        rows = [_row(tokenizer, rng.choice(problems), stage, rng) for _ in range(BATCH_SIZE * steps)]
        settings = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=stage.learning_rate,
            weight_decay=0.0,
            adam_beta2=0.98,
            warmup_steps=min(50, steps // 4),
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        trainer = Trainer(
            model, settings, train_dataset=rows, data_collator=collator, processing_class=tokenizer, callbacks=[bar]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    bar.close()
    model.save_pretrained(output_dir)


class _Bar(TrainerCallback):
    """One progress bar for all stages."""

    def __init__(self, num_steps: int):
        self.bar = tqdm(total=num_steps, desc="policy", unit="step")
        self.close = self.bar.close

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()


def _row(tokenizer, problem: Problem, stage: Stage, rng: random.Random) -> dict[str, list[int]]:
    """Return token ids and labels of a problem and a random solution. Both are tokenized separately, as in sampling."""
    whole = not stage.decisions or rng.random() < 0.25
    slip_rate = 0.0 if stage.decisions and whole else stage.slip_rate
    text = solution_text(solve(problem, rng, slip_rate, stage.correction_rate, stage.skew)[0])
    prompt = tokenizer.encode(problem.text())
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = encoded["input_ids"] + [tokenizer.eos_token_id]
    labels = ids
    if not whole:
        trained = decision_characters(text)
        starts = [start for start, _ in encoded["offset_mapping"]]
        labels = [token if start in trained else -100 for token, start in zip(ids, starts, strict=False)] + [-100]
    return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + labels}


def decision_characters(text: str) -> set[int]:
    """Return the characters of the tokens that depend on detecting slips: the first of each step, and all of a correction."""
    found = set()
    for step in STEP.finditer(text):
        found |= set(range(step.start(), step.end())) if step[1] else {step.start()}
    return found


@dataclass(frozen=True)
class PolicyRates:
    """
    Counts of slips and corrections in sampled solutions.

    Args:
        num_solutions (`int`): Number of solutions.
        num_steps, num_slips (`int`): Number of steps that are not corrections, and how many of them copy a wrong value.
        num_corrected (`int`): Number of slips that the next step corrects.
        num_spurious (`int`): Number of steps without a slip that the next step "corrects" anyway.
    """

    num_solutions: int
    num_steps: int
    num_slips: int
    num_corrected: int
    num_spurious: int

    @property
    def slip_rate(self) -> float:
        return self.num_slips / max(self.num_steps, 1)

    @property
    def correction_rate(self) -> float:
        return self.num_corrected / max(self.num_slips, 1)

    @property
    def spurious_rate(self) -> float:
        return self.num_spurious / max(self.num_steps - self.num_slips, 1)

    @property
    def sight(self) -> float:
        """Rate of corrections after slips divided by the rate after right steps. 1 means no detection, 0 no corrections."""
        if self.num_spurious:
            return self.correction_rate / self.spurious_rate
        return float("inf") if self.num_corrected else 0.0


def policy_rates(solutions: Iterable[tuple[Problem, str]]) -> PolicyRates:
    """Count slips and corrections in the texts of solutions."""
    counts: Counter[str] = Counter()
    for problem, text in solutions:
        counts["num_solutions"] += 1
        value, slipped = problem.start, None
        for correction, _, seen, _, _, result in STEP.findall(text):
            if correction:
                if slipped is not None:
                    counts["num_corrected" if slipped else "num_spurious"] += 1
                slipped = None  # a second correction in a row is neither
            else:
                slipped = int(seen) != value
                counts["num_steps"] += 1
                counts["num_slips"] += slipped
            value = int(result)
    names = PolicyRates.__dataclass_fields__
    return PolicyRates(**{name: counts[name] for name in names})
