"""Launch scenarios of `KLSelfTrainer` in processes of their own."""

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

from trl_hrm import StepFormat

from ..helpers import WORDS, tiny_model, tiny_tokenizer
from .launching import Run, launch


KL_PROBE = Path(__file__).with_name("kl_probe.py")
LORA = {"r": 4, "target_modules": "all-linear"}
LOGGED = ("loss", "grad_norm", "lm_loss", "kl", "kl_per_token", "log_kl", "kl_max")


class KLProject:
    """
    A folder with the models `lm`, `lm-tied` and `lm-other` (other weights), and three files of rows:

    - `uneven`: 16 rows of 1 to 30 words.
    - `long`: 6 rows, alternately with over 512 and under 16 trained tokens, so with one row per rank, one rank has all long rows.
    - `untrained`: 12 rows; 7 are prompts of at least 40 tokens, which leave nothing to train on at `max_length=40`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for name, tied, seed in (("lm", False, 0), ("lm-tied", True, 0), ("lm-other", False, 1)):
            sizes = {"initializer_range": 0.05, "tie_word_embeddings": tied, "max_position_embeddings": 2048}
            tiny_model(StepFormat(head="lm"), seed=seed, **sizes).save_pretrained(folder / name)
            tiny_tokenizer().save_pretrained(folder / name)
        rng = random.Random(0)
        files = {
            "uneven": [(2, rng.randint(1, 30)) for _ in range(16)],
            "long": [(2, (400, 3)[i % 2]) for i in range(6)],
            "untrained": [(40, 5)] * 7 + [(2, 20)] * 5,
        }
        for name, lengths in files.items():
            rows = [
                {"prompt": f"{i} {self._text(rng, prompt)}\n", "completion": self._text(rng, completion)}
                for i, (prompt, completion) in enumerate(lengths)
            ]
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    @staticmethod
    def _text(rng: random.Random, num_words: int) -> str:
        return " ".join(rng.choices(WORDS, k=num_words))

    def scenario(
        self,
        name: str,
        model: str = "lm",
        rows: str = "uneven",
        lora: dict | None = None,
        resume: str = "",
        evaluate_first: bool = False,
        **args,
    ) -> dict[str, Any]:
        """Return the arguments of `kl_probe.train`. All files go to the folder `name`; `resume` is a checkpoint in it."""
        return {
            "output_dir": str(self.folder / name),
            "model": str(self.folder / model),
            "rows": str(self.folder / f"{rows}.jsonl"),
            "args": args,
            "lora": lora,
            "resume_from_checkpoint": str(self.folder / name / resume) if resume else None,
            "evaluate_first": evaluate_first,
        }

    def run_here(self, *scenarios: dict[str, Any]) -> list[Run]:
        """Train several scenarios in this process, which has no new imports to wait for."""
        sys.path.insert(0, str(KL_PROBE.parent))
        try:
            probe = importlib.import_module("kl_probe")
        finally:
            sys.path.pop(0)
        for scenario in scenarios:
            probe.train(**scenario)
        return [Run(Path(scenario["output_dir"])) for scenario in scenarios]

    def run(self, *scenarios: dict[str, Any], config: str | None = None, exit_code: int = 0, **env) -> list[Run]:
        """Train several scenarios in one launch, one after another."""
        folders = [Path(scenario["output_dir"]) for scenario in scenarios]
        files = [folder.with_suffix(".json") for folder in folders]
        for file, scenario in zip(files, scenarios, strict=True):
            file.write_text(json.dumps(scenario), encoding="utf-8")
        log = folders[0].with_suffix(".log")
        launch(KL_PROBE, [str(file) for file in files], log, config, exit_code, **env)
        return [Run(folder) for folder in folders]
