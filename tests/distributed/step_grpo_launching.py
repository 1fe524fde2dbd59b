"""Launch scenarios of `StepGRPOTrainer` in processes of their own."""

import json
import random
from pathlib import Path
from typing import Any

from trl_hrm import StepFormat

from ..helpers import WORDS, save_checkpoint, tiny_model, tiny_tokenizer
from .launching import Run, launch


STEP_GRPO_PROBE = Path(__file__).with_name("step_grpo_probe.py")
GROUP = 4


class StepGRPOProject:
    """
    A folder with a policy, a reward model, and 6 prompts with 4 completions each.

    The completions have 1 to 6 steps. Those with one step are rejected by a guard. `rows` has every problem; in `half`, the rows
    of every second prompt have none, so with whole groups on each rank, one rank has nothing to score.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        policy = {"initializer_range": 0.1, "tie_word_embeddings": False}
        tiny_model(StepFormat(head="lm"), seed=0, **policy).save_pretrained(folder / "policy")
        tiny_tokenizer().save_pretrained(folder / "policy")
        (folder / "reward").mkdir()
        save_checkpoint(folder / "reward")
        rng = random.Random(0)
        self.completions = {f"{i} + 2 ?\n": [self._text(rng, j) for j in range(GROUP)] for i in range(6)}
        self.rows = [{"prompt": prompt, "problem": prompt} for prompt in self.completions]
        self.half = [row | {"problem": (row["problem"], None)[i % 2]} for i, row in enumerate(self.rows)]

    @staticmethod
    def _text(rng: random.Random, index: int) -> str:
        """The first completion of a group has one step only."""
        num_steps = rng.randint(2, 6) if index else 1
        return "\n\n".join(" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) + f" {j}" for j in range(num_steps))

    def scenario(
        self,
        name: str,
        sampled: bool = False,
        rows: str = "rows",
        outcome: bool = True,
        lora: dict | None = None,
        **args,
    ) -> dict[str, Any]:
        """Return the arguments of `step_grpo_probe.train`. All files go to the folder `name`."""
        return {
            "output_dir": str(self.folder / name),
            "model": str(self.folder / "policy"),
            "reward_model": str(self.folder / "reward"),
            "rows": getattr(self, rows),
            "args": {"num_generations": GROUP} | args,
            "reward": {"problem_column": "problem", "guard_reward": 0.1, "min_steps": 1 if sampled else 2},
            "outcome": outcome,
            "completions": None if sampled else self.completions,
            "lora": lora,
        }

    def run(self, *scenarios: dict[str, Any], config: str | None = None, **env) -> list[Run]:
        """Train several scenarios in one launch, one after another."""
        folders = [Path(scenario["output_dir"]) for scenario in scenarios]
        files = [folder.with_suffix(".json") for folder in folders]
        for file, scenario in zip(files, scenarios, strict=True):
            file.write_text(json.dumps(scenario), encoding="utf-8")
        log = folders[0].with_suffix(".log")
        launch(STEP_GRPO_PROBE, [str(file) for file in files], log, config, TRL_EXPERIMENTAL_SILENCE="1", **env)
        return [Run(folder) for folder in folders]
