"""Launch the recipe in separate processes and read its results."""

import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_hrm import StepFormat, StepTree, hrm_view

from ..helpers import random_tree, tiny_model, tiny_tokenizer


ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("probe.py")

# name, head, whether input and output embeddings are tied
MODELS = [("classification", "classification", False), ("lm", "lm", False), ("lm-tied", "lm", True)]


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
# Ways to distribute one training over processes
KINDS = {
    "ddp": {"config": "cpu_2proc.yaml"},
    "zero2": {"config": "zero2.yaml"},
    "zero3": {"config": "zero3.yaml"},
    "fsdp2": {"config": "fsdp2.yaml", "PROBE_FSDP_ON_CPU": "1"},
}
SHARDED = [
    pytest.param("zero2", marks=needs_deepspeed),
    pytest.param("zero3", marks=needs_deepspeed),
    "fsdp2",
]


@dataclass
class Project:
    """A folder with 16 training trees, 5 held-out trees, the same trees without merged steps (`outcomes`), and the `MODELS`."""

    folder: Path
    held_out: list[StepTree]
    single_held_out: list[StepTree]

    @classmethod
    def make(cls, folder: Path) -> "Project":
        rng = random.Random(0)
        single = [random_tree(rng, f"{i}") for i in range(21)]
        trees = [hrm_view(tree) for tree in single]
        for name, rows in (("data", trees), ("outcomes", single)):
            (folder / name).mkdir()
            for split, part in (("train", rows[:16]), ("test", rows[16:])):
                lines = [json.dumps(tree.to_row()) + "\n" for tree in part]
                (folder / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        for name, head, tied in MODELS:
            model = tiny_model(StepFormat(head=head), initializer_range=0.05, tie_word_embeddings=tied)
            model.save_pretrained(folder / name)
            tiny_tokenizer().save_pretrained(folder / name)
        return cls(folder, trees[16:], single[16:])

    def run(
        self,
        name: str,
        *args: str,
        config: str | None = None,
        model: str = "classification",
        exit_code: int | None = 0,
        recipe: str = "hrm_reward",
        **env,
    ) -> "Run":
        """Run a recipe under `accelerate launch` with a configuration, or in one plain process without one."""
        output_dir = self.folder / name
        settings = {
            "config": ROOT / "recipes" / "tiny" / f"{recipe}.yaml",
            "make_tiny_model": "false",
            "dataset_name": self.folder / ("data" if recipe == "hrm_reward" else "outcomes"),
            "model_name_or_path": self.folder / model,
            "head": model.removesuffix("-tied") if recipe == "hrm_reward" else "implicit",
            "output_dir": output_dir,
            "packing": "false",
            "num_train_epochs": 2,
            "warmup_steps": 1,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 10,
            "disable_tqdm": "true",
        }
        settings = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        launch(PROBE, [*settings, *args], self.folder / f"{name}.log", config, exit_code, PROBE_RECIPE=recipe, **env)
        return Run(output_dir)


def launch(
    script: Path, args: list[str], log: Path, config: str | None = None, exit_code: int | None = 0, **env
) -> None:
    """Run a script under `accelerate launch`, or in one plain process without a configuration. Save its output. `exit_code=None` accepts any."""
    launcher = []
    if config is not None:
        # the configurations are for 8 GPUs in bf16
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / config)]
        launcher += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(free_port())]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(log.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),  # DeepSpeed builds one for each venv
    }
    result = subprocess.run(
        [sys.executable, *launcher, str(script), *args],
        env=environment | env,
        capture_output=True,
        text=True,
        timeout=400,
        cwd=log.parent,
    )
    log.write_text(result.stdout + result.stderr, encoding="utf-8")
    assert exit_code is None or result.returncode == exit_code, (
        f"exit code {result.returncode}:\n{log.read_text()[-6000:]}"
    )


@dataclass
class Run:
    output_dir: Path

    def facts(self, rank: int = 0) -> dict:
        return json.loads((self.output_dir / f"probe-{rank}.json").read_text(encoding="utf-8"))

    def logged(self, name: str) -> list[float]:
        return [log[name] for log in self.facts()["log_history"] if name in log]

    def weights(self, folder: str = ".") -> dict[str, torch.Tensor]:
        """Return the saved parameters. Tied embeddings may be saved twice, and then must be equal."""
        weights = load_file(self.output_dir / folder / "model.safetensors")
        if self.output_dir.name.endswith("-tied") and "lm_head.weight" in weights:
            assert torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
        return weights

    def evaluation(self) -> dict[str, float]:
        """Return the metrics of the model in memory after training."""
        return json.loads((self.output_dir / "eval_results.json").read_text(encoding="utf-8"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def assert_ran_as(run: Run, kind: str) -> None:
    for rank in (0, 1):
        facts = run.facts(rank)
        assert facts["num_processes"] == 2
        found = facts["distributed_type"], facts["zero_stage"], facts["wrapper"]
        if kind == "ddp":
            assert found == ("MULTI_CPU", None, "DistributedDataParallel")
        elif kind == "fsdp2":
            assert found[0] == "FSDP" and found[2].startswith("FSDP")
        else:
            assert found == ("DEEPSPEED", int(kind[-1]), "DeepSpeedEngine")
        share = facts["held"] / facts["in_all"]
        assert share == pytest.approx(0.5 if kind in ("zero3", "fsdp2") else 1, abs=0.02)
