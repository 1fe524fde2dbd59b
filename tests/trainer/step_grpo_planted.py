"""A tiny policy with given completions, whose steps and tokens are known by construction."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from trl import RLOOTrainer

from trl_hrm import StepFormat, StepGRPOConfig, StepGRPOTrainer, StepReward, StepScorer, step_credit

from ..helpers import WORDS, tiny_model, tiny_tokenizer


TOKENIZER = tiny_tokenizer()
SCORER = StepScorer(tiny_model(), tiny_tokenizer(), StepFormat())
GROUP = 4
WEIGHT = 0.7
MAX_LENGTH = 48


@dataclass(frozen=True)
class Completion:
    """A completion of `steps`. The tokens of the blank line after a step belong to this step."""

    prompt: str
    steps: tuple[str, ...]
    ended: bool = True

    @property
    def pieces(self) -> list[list[int]]:
        """Token ids of each step with the text after it."""
        texts = [step + "\n\n" for step in self.steps[:-1]] + [self.steps[-1]]
        pieces = TOKENIZER(texts)["input_ids"]
        return [*pieces[:-1], pieces[-1] + [TOKENIZER.eos_token_id]] if self.ended else pieces

    @property
    def ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]

    @property
    def step_of_token(self) -> list[int]:
        return [j for j, piece in enumerate(self.pieces) for _ in piece]

    @property
    def reward(self) -> float:
        """An outcome reward that differs within a group."""
        return len("".join(self.steps)) % 5 / 4


def planted(num_prompts: int = 8, seed: int = 0) -> dict[str, list[Completion]]:
    """Return groups of completions with 2 to 5 steps each. In each group, the second one is cut off."""
    rng = random.Random(seed)
    groups = {}
    for i in range(num_prompts):
        prompt = f"{i} + 2 ?\n"
        groups[prompt] = [
            Completion(
                prompt,
                tuple(f"{' '.join(rng.choices(WORDS, k=rng.randint(1, 4)))} {j}" for j in range(rng.randint(2, 5))),
                ended=index != 1,
            )
            for index in range(GROUP)
        ]
    return groups


GROUPS = planted()
BY_IDS = {tuple(completion.ids): completion for group in GROUPS.values() for completion in group}


def outcome(prompts: list[str], completion_ids: list[list[int]], **_) -> list[float]:
    """The outcome reward of each planted completion."""
    return [BY_IDS[tuple(ids)].reward for ids in completion_ids]


def planted_ids(prompt_ids: list[list[int]]) -> list[list[int]]:
    """Return the planted completions of each prompt, in order."""
    seen: dict[str, int] = {}
    ids = []
    for prompt in TOKENIZER.batch_decode(prompt_ids):
        seen[prompt] = seen.get(prompt, -1) + 1
        ids.append(GROUPS[prompt][seen[prompt] % GROUP].ids)
    return ids


class Recorder(TrainerCallback):
    """Records the micro-batches of each optimizer step, and the weights and gradients of the policy before the update."""

    def __init__(self):
        self.batches: list[list[list[Completion]]] = [[]]
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def watch(self, trainer) -> None:
        compute_loss = trainer.compute_loss

        def recording(model, inputs, *args, **kwargs):
            # a truncated completion may have an empty mask, so the padding is found by its id
            rows = [
                tuple(token for token in row if token != TOKENIZER.pad_token_id)
                for row in inputs["completion_ids"].tolist()
            ]
            self.batches[-1].append([BY_IDS[row] for row in rows])
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = recording
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        self.gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        self.batches.append([])


def policy() -> PreTrainedModel:
    """A policy in float64."""
    return tiny_model(StepFormat(head="lm"), initializer_range=0.1).double()


def make_trainer(
    output_dir: Path, trainer_class: type = StepGRPOTrainer, config_class: type = StepGRPOConfig, **args
) -> tuple[Any, Recorder]:
    """Return a trainer of the policy with planted completions, plain SGD and no clipping of gradients."""
    policy().save_pretrained(output_dir / "policy")  # with a `beta`, TRL loads the reference model from there
    defaults = {
        "output_dir": str(output_dir / "run"),
        "model_init_kwargs": {"dtype": "auto"},
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": MAX_LENGTH,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    step_reward = StepReward(SCORER)
    if config_class is StepGRPOConfig:
        defaults["step_reward_weight"] = WEIGHT
        rewards = {"reward_funcs": [outcome], "step_reward": step_reward}
    else:
        rewards = {"reward_funcs": [outcome, step_reward]}
    trainer = trainer_class(
        model=str(output_dir / "policy"),
        args=config_class(**(defaults | args)),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in GROUPS]),
        processing_class=tiny_tokenizer(),
        **rewards,
    )
    with_log_probs = trainer_class is not RLOOTrainer
    trainer._generate_single_turn = lambda prompt_ids, *_: (
        (planted_ids(prompt_ids), None) if with_log_probs else planted_ids(prompt_ids)
    )
    recorder = Recorder()
    recorder.watch(trainer)
    return trainer, recorder


def token_advantages(credit: str, scale_rewards: bool = True) -> dict[Completion, list[float]]:
    """Return the advantage of every token of the planted completions, from plain loops over groups and steps."""
    found = {}
    for prompt, group in GROUPS.items():
        [scores] = SCORER.score([prompt], [[list(completion.steps) for completion in group]])
        of_steps = getattr(step_credit, credit)(scores)
        mean = sum(completion.reward for completion in group) / GROUP
        std = (sum((completion.reward - mean) ** 2 for completion in group) / (GROUP - 1)) ** 0.5
        for completion, steps in zip(group, of_steps, strict=True):
            whole = (completion.reward - mean) / (std + 1e-4 if scale_rewards else 1)
            found[completion] = [whole + WEIGHT * steps[j] for j in completion.step_of_token]
    return found
