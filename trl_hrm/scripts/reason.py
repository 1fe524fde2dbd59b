"""
Train the Hierarchical Reasoning Model (HRM) and its controls on grid puzzles, and compare them: a table, and a page with boards that
change from segment to segment.

```bash
trl-hrm reason --config recipes/reasoning/sudoku_6x6_cpu.yaml
trl-hrm reason --systems loop hrm trm+ema --seeds 1 2 3 --seconds_per_run 120 --output_dir outputs/mine
```

If the command is interrupted, the same command resumes it, and the results are the same.
"""

import shutil
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..config import COUNT, PROCESSES, SEED, Config
from ..io import claimed_folder, read_json, shell_word, shown, write_json
from ..processes import num_cores


if TYPE_CHECKING:
    from ..processes import Workers
    from ..reasoning.study import System


MARK = ".trl-hrm-reason.json"  # settings of the study in this folder
OUTPUTS = {
    "data",
    "logs",
    "model",
    "plan.json",
    "puzzles.txt",
    "report.html",
    "report_files",
    "results.json",
    "runs",
    "speed",
    "tuning",
}
FREE = (
    "output_dir",
    "num_workers",
    "overwrite",
    "push_to_hub",
    "push_dataset",
    "private",
)  # do not change the results


@dataclass(kw_only=True)
class ReasonConfig(Config):
    """
    Configuration of [`reason`].

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/reason"`):
            Output folder. An interrupted study in it is resumed.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to delete a study with other settings in `output_dir` and start over.
        data (`str`, *optional*):
            Folder of `trl-hrm build-grid` with the splits train, validation, test and few_blanks. By default, puzzles are generated.
        family (`str`, *optional*, defaults to `"sudoku"`):
            Kind of puzzles to generate: `"sudoku"` or `"maze"`.
        size (`int`, *optional*, defaults to `6`):
            Rows and columns of a board: 4, 6 or 9 for Sudoku, an odd number for mazes.
        clues (`int`, *optional*):
            Number of givens of each Sudoku. By default, puzzles are minimal: removing any given would allow several solutions.
        num_train, num_validation, num_test (`int`, *optional*, defaults to `1000`, `100` and `500`):
            Number of puzzles per split.
        seed (`int`, *optional*, defaults to `42`):
            Random seed of the puzzles.
        systems (`list[str]`, *optional*, defaults to `["one_pass", "one_pass_deep", "loop", "hrm", "hrm_continue", "trm"]`):
            Systems to train. A switch after a `+` changes a system: `one_step`, `last_cycle` and `full_gradient` (calls that get a
            gradient), `tied` (one module for both parts), and `ema` (average of the weights).
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`):
            Random seeds of the trainings of each system. Claims need at least three.
        seconds_per_run (`float`, *optional*, defaults to `60`):
            Seconds of training of each run, in processor time. The number of steps is computed from the measured speed of each system.
        learning_rates (`list[str]`, *optional*, defaults to `["3e-3"]`):
            Learning rates to try for every system, or for one system: `hrm=1e-3`. If a system has several, the best one on the
            validation split is chosen.
        tuning_seconds (`float`, *optional*):
            Seconds of each training that chooses a learning rate. Defaults to a third of `seconds_per_run`.
        hidden_size, num_attention_heads, intermediate_size, mixer_intermediate_size (`int`, *optional*, defaults to `64`, `4`, `192` and `128`):
            Size of all networks. See [`~reasoning.HrmGridConfig`].
        layers (`int`, *optional*, defaults to `1`):
            Layers of each module. The loop control and the one-pass network have twice as many in their block.
        cycles, trm_cycles (`list[int]`, *optional*, defaults to `[2, 2]` and `[2, 3]`):
            `H_cycles` and `L_cycles` of HRM, and of TRM.
        mixer (`str`, *optional*, defaults to `"mlp"`):
            How cells exchange information: `"mlp"` or `"attention"`.
        position (`str`, *optional*, defaults to `"learned"`):
            Positions: `"learned"`, `"grid"`, `"rope"` or `"none"`.
        num_prefix_tokens (`int`, *optional*, defaults to `1`):
            Number of tokens before the board.
        halt_max_steps (`int`, *optional*, defaults to `8`):
            Number of segments M of a puzzle. The test puzzles are also solved with up to 4 M segments.
        loss_type (`str`, *optional*, defaults to `"softmax"`):
            Loss of the cells: `"softmax"` or `"stablemax"`.
        batch_size (`int`, *optional*, defaults to `64`):
            Number of puzzles per training step.
        weight_decay (`float`, *optional*, defaults to `0.1`):
            Weight decay.
        warmup_steps (`int`, *optional*, defaults to `50`):
            Steps with a linearly rising learning rate, which is constant afterwards.
        ema_decay (`float`, *optional*, defaults to `0.99`):
            Decay of the average of the weights, for systems with `+ema`.
        augment (`bool`, *optional*, defaults to `True`):
            Whether to train on a random symmetric copy of each puzzle.
        easier_share (`float`, *optional*, defaults to `0.0`):
            Share of training puzzles in which some blanks are filled in.
        device (`str`, *optional*, defaults to `"cpu"`):
            Device: `"cpu"`, or `"auto"` for a GPU if there is one.
        bf16 (`bool`, *optional*, defaults to `False`):
            Whether to train in bfloat16 mixed precision.
        num_workers (`int`, *optional*):
            Number of parallel trainings, of one thread each. Defaults to the number of cores, and to 1 on a GPU.
        push_to_hub, push_dataset (`str`, *optional*):
            Repositories on the Hub to push the best HRM and the puzzles to.
        private (`bool`, *optional*, defaults to `False`):
            Whether new repositories are private.

    Raises:
        `ValueError`: If an option is out of range, or has no effect with the other options.
    """

    output_dir: str = field(default="outputs/reason", metadata={"help": "Output folder. A study in it is resumed."})
    overwrite: bool = field(
        default=False, metadata={"help": "Delete a study with other settings in --output_dir and start over."}
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder of `trl-hrm build-grid` with the splits train, validation, test and few_blanks (default: generate puzzles)."
        },
    )
    family: Literal["sudoku", "maze"] = field(default="sudoku", metadata={"help": "Kind of puzzles to generate."})
    size: int = field(
        default=6,
        metadata={
            "help": "Rows and columns of a board: 4, 6 or 9 for Sudoku, an odd number for mazes.",
            "range": "[4, 99]",
        },
    )
    clues: int | None = field(
        default=None,
        metadata={
            "help": "Number of givens of each Sudoku (default: minimal puzzles: removing any given would allow several solutions).",
            "range": COUNT,
        },
    )
    num_train: int = field(default=1000, metadata={"help": "Number of training puzzles.", "range": COUNT})
    num_validation: int = field(default=100, metadata={"help": "Number of validation puzzles.", "range": COUNT})
    num_test: int = field(default=500, metadata={"help": "Number of test puzzles.", "range": COUNT})
    seed: int = field(default=42, metadata={"help": "Random seed of the puzzles.", "range": SEED})
    systems: list[str] = field(
        default_factory=lambda: ["one_pass", "one_pass_deep", "loop", "hrm", "hrm_continue", "trm"],
        metadata={
            "help": "Systems to train. A switch after a + changes a system, such as hrm+ema: one_step, last_cycle and full_gradient "
            "(calls that get a gradient), tied (one module for both parts), ema (average of the weights).",
            "metavar": "SYSTEM",
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={
            "help": "Random seeds of the trainings of each system. Claims need at least three.",
            "range": SEED,
        },
    )
    seconds_per_run: float = field(
        default=60.0,
        metadata={
            "help": "Seconds of training of each run, in processor time. The number of steps is computed from the measured speed of "
            "each system.",
            "range": "(0, inf)",
        },
    )
    learning_rates: list[str] = field(
        default_factory=lambda: ["3e-3"],
        metadata={
            "help": "Learning rates to try for every system, or for one system: hrm=1e-3. If a system has several, the best one on "
            "the validation split is chosen.",
            "metavar": "RATE",
        },
    )
    tuning_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Seconds of each training that chooses a learning rate (default: a third of --seconds_per_run).",
            "range": "(0, inf)",
        },
    )
    hidden_size: int = field(default=64, metadata={"help": "Width of all networks.", "range": COUNT})
    num_attention_heads: int = field(
        default=4, metadata={"help": "Attention heads, for --mixer attention.", "range": COUNT, "advanced": True}
    )
    intermediate_size: int = field(
        default=192, metadata={"help": "Width of the SwiGLU layers.", "range": COUNT, "advanced": True}
    )
    mixer_intermediate_size: int = field(
        default=128,
        metadata={
            "help": "Width of the SwiGLU layers over positions, for --mixer mlp.",
            "range": COUNT,
            "advanced": True,
        },
    )
    layers: int = field(
        default=1,
        metadata={
            "help": "Layers of each module. The loop control and the one-pass network have twice as many in their block.",
            "range": COUNT,
        },
    )
    cycles: list[int] = field(
        default_factory=lambda: [2, 2], metadata={"help": "H_cycles and L_cycles of HRM.", "range": COUNT}
    )
    trm_cycles: list[int] = field(
        default_factory=lambda: [2, 3], metadata={"help": "H_cycles and L_cycles of TRM.", "range": COUNT}
    )
    mixer: Literal["mlp", "attention"] = field(default="mlp", metadata={"help": "How cells exchange information."})
    position: Literal["learned", "grid", "rope", "none"] = field(default="learned", metadata={"help": "Positions."})
    num_prefix_tokens: int = field(
        default=1, metadata={"help": "Number of tokens before the board.", "range": "[0, inf)", "advanced": True}
    )
    halt_max_steps: int = field(
        default=8,
        metadata={
            "help": "Number of segments M of a puzzle. The test puzzles are also solved with up to 4 M segments.",
            "range": COUNT,
        },
    )
    loss_type: Literal["softmax", "stablemax"] = field(default="softmax", metadata={"help": "Loss of the cells."})
    batch_size: int = field(default=64, metadata={"help": "Number of puzzles per training step.", "range": COUNT})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay.", "range": "[0, inf)", "advanced": True})
    warmup_steps: int = field(
        default=50,
        metadata={
            "help": "Steps with a linearly rising learning rate, which is constant afterwards.",
            "range": "[0, inf)",
            "advanced": True,
        },
    )
    ema_decay: float = field(
        default=0.99,
        metadata={
            "help": "Decay of the average of the weights, for systems with +ema.",
            "range": "[0, 1)",
            "advanced": True,
        },
    )
    augment: bool = field(
        default=True, metadata={"help": "Train on a random symmetric copy of each puzzle.", "advanced": True}
    )
    easier_share: float = field(
        default=0.0,
        metadata={"help": "Share of training puzzles in which some blanks are filled in.", "range": "[0, 1]"},
    )
    device: Literal["cpu", "auto"] = field(
        default="cpu", metadata={"help": "Device: cpu, or auto for a GPU if there is one."}
    )
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 mixed precision.", "advanced": True})
    num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Number of parallel trainings, of one thread each (default: the number of cores, and 1 on a GPU).",
            "range": PROCESSES,
        },
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Repository on the Hub to push the best HRM to.", "metavar": "REPO"}
    )
    push_dataset: str | None = field(
        default=None, metadata={"help": "Repository on the Hub to push the puzzles to.", "metavar": "REPO"}
    )
    private: bool = field(default=False, metadata={"help": "Whether new repositories are private.", "advanced": True})

    def __post_init__(self):
        super().__post_init__()
        for name in ("systems", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"`{name}` is {shown(values)}. Each value may occur once.")
        for name in ("cycles", "trm_cycles"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be two numbers: H_cycles and L_cycles.")
        bases = {name.partition("+")[0] for name in self.systems}
        of_puzzles = ("family", "size", "clues", "num_train", "num_validation", "num_test", "seed")
        is_pushed = self.push_to_hub is not None or self.push_dataset is not None
        # Options, whether they are used, and otherwise why not
        uses = (
            (of_puzzles, self.data is None, "with `data`"),
            (("clues",), self.family == "sudoku", "with mazes"),
            (("private",), is_pushed, "without `push_to_hub` or `push_dataset`"),
            (("num_attention_heads",), self.mixer == "attention", "with `mixer=mlp`"),
            (("mixer_intermediate_size",), self.mixer == "mlp", "with `mixer=attention`"),
            # The controls call their block once, and `one_pass_deep` has as many layers as HRM with these cycles
            (("cycles",), bool(bases - {"trm", "loop", "one_pass"}), "without HRM or one_pass_deep in `systems`"),
            (("trm_cycles",), "trm" in bases, "without TRM in `systems`"),
            (("halt_max_steps",), bool(bases - {"one_pass", "one_pass_deep"}), "without recurrent `systems`"),
            (("ema_decay",), any("ema" in name.split("+") for name in self.systems), "without +ema in `systems`"),
        )
        for names, is_used, reason in uses:
            for one in fields(self):
                default = one.default if one.default_factory is MISSING else one.default_factory()
                if one.name in names and not is_used and getattr(self, one.name) != default:
                    raise ValueError(f"`{one.name}` has no effect {reason}. Remove it.")
        if self.push_dataset is not None and self.data is not None:
            raise ValueError(
                "`push_dataset` pushes the generated puzzles, but `data` is set. Push that folder with `trl-hrm push-dataset`."
            )
        rates = [self.rates_of(name) for name in self.systems]
        if self.tuning_seconds is not None and all(len(one) == 1 for one in rates):
            raise ValueError(
                "`tuning_seconds` has no effect, because no system has several learning rates. Remove it."
            )
        for word in self.learning_rates:
            system = word.rpartition("=")[0]
            if system and system not in self.systems:
                raise ValueError(f"`learning_rates` has {shown(word)}, but {shown(system)} is not in `systems`.")

    def rates_of(self, system: str) -> list[float]:
        """
        Return the learning rates to try for a system: its own rates, or otherwise the rates for all systems.

        Raises:
            `ValueError`: If there are none, or one is not a number greater than 0.
        """
        rates: dict[str, list[float]] = {}
        for word in self.learning_rates:
            name, _, text = word.rpartition("=")
            try:
                rate = float(text)
            except ValueError:
                rate = 0.0
            if not 0 < rate < 1:
                raise ValueError(
                    f"`learning_rates` has {shown(word)}. Expected a number between 0 and 1, such as 1e-3, or hrm=1e-3 for one system."
                )
            rates.setdefault(name, []).append(rate)
        found = rates.get(system) or rates.get("")
        if not found:
            raise ValueError(f"`learning_rates` has no rate for {system}. Add one, such as {system}=1e-3.")
        return list(dict.fromkeys(found))


def reason(config: ReasonConfig) -> str:
    """
    Train the systems, compare them, and write `results.json`, `report.html` and the best HRM, or resume an interrupted study.

    Args:
        config ([`ReasonConfig`]):
            Puzzles, systems and output folder.

    Returns:
        `str`: Table of the results, claims, and the paths that were written.

    Raises:
        `ValueError`: If the folder has other files or a study with other settings, if the puzzles cannot be used, or if a training
            failed.
        `OSError`: If the folder cannot be written. This is checked first.
    """
    settings = {name: value for name, value in config.settings().items() if name not in FREE}
    folder = Path(config.output_dir)
    lock = f"{MARK}.lock"
    with claimed_folder(folder, "output_dir", (MARK, "plan.json", "results.json", "report.html"), lock):
        if config.data is not None:
            report = Path(config.data, "build_report.json")
            if not report.exists():
                raise FileNotFoundError(
                    f"{config.data} has no build_report.json. Expected a folder of `trl-hrm build-grid` as `data`."
                )
            # The path says nothing about the content. Stored answers would be compared with the solutions of other puzzles
            settings["data_content"] = read_json(report, "Build the dataset again.")["content"]
        _begin(folder, settings, config.overwrite, lock)
        return _reason(config, folder)


def _begin(folder: Path, settings: dict[str, Any], overwrite: bool, lock: str) -> None:
    """Check that the folder is empty or has a study with these settings, and write the settings."""
    from ..identity import changed_settings

    mark = folder / MARK
    others = [path for path in folder.iterdir() if path.name not in (MARK, lock)]
    foreign = [path.name for path in others if path.name not in OUTPUTS]
    if others and not mark.exists() or foreign and overwrite:
        raise ValueError(
            f"{folder} has files that do not belong to a study: {shown(', '.join(sorted(foreign)) or others[0].name)}. Move them, or "
            "set another `output_dir`."
        )
    found = read_json(mark, "Set another `output_dir`, or delete the folder.") if mark.exists() else settings
    if changes := changed_settings(found, settings):
        if not overwrite:
            raise ValueError(
                f"The study in {folder} was started with other settings: {'; '.join(changes)}. Set another `output_dir`, or use "
                "--overwrite to replace it."
            )
        for path in others:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(mark, settings)


def _reason(config: ReasonConfig, folder: Path) -> str:
    import torch

    from ..processes import Workers
    from ..reasoning.study import System, collect, read_split
    from ..reasoning.study_report import format_results, versions_of, write_report

    systems = [System(name) for name in config.systems]  # refuses unknown names before any work
    if config.push_to_hub is not None and not any(one.is_recurrent for one in systems):
        raise ValueError(
            "`push_to_hub` pushes the best recurrent model, but `systems` has none. Add hrm, or remove `push_to_hub`."
        )
    data = build_puzzles(config, folder)
    shared = shared_settings(config, data)
    models = {one.name: one.config(shared, config.cycles, config.trm_cycles).to_dict() for one in systems}
    training = {one.name: training_settings(config, one) for one in systems}
    is_on_gpu = config.device == "auto" and torch.cuda.is_available()
    num_workers = config.num_workers or (1 if is_on_gpu else num_cores())
    with Workers(num_workers, "spawn", "Lower --num_workers. Run the same command again to resume.") as pool:
        plan = train_all(config, folder, data, models, training, pool)
    results = {
        "settings": {name: value for name, value in config.settings().items() if name not in FREE},
        "versions": versions_of(),
        "data": describe_data(data),
        **plan,
        **collect(folder, plan, data),
    }
    write_json(folder / "results.json", results)
    write_report(results, folder / "report.html")
    written = [f"Page: {folder / 'report.html'}"]
    if best := best_run(results, folder):
        shutil.rmtree(folder / "model", ignore_errors=True)
        shutil.copytree(best / "model", folder / "model")
        written.append(f"Model: {folder / 'model'}, a copy of {best.name}, the best HRM on the validation split")
    if config.push_to_hub is not None:
        written.append(f"Model on the Hub: {push_model(folder / 'model', config.push_to_hub, config.private)}")
    if config.push_dataset is not None:
        from ..data.publish import push_dataset
        from ..data.publish_config import PushDatasetConfig

        private = config.private or None  # the Hub decides
        push = PushDatasetConfig(inputs=[str(data)], repo_id=config.push_dataset, private=private)
        written.append(str(push_dataset(push)))
    if best:
        # Something to solve at once, in the format of the command
        boards = [text.partition("\n\n")[0] for text in read_split(data, "test")["text"][:3]]
        (folder / "puzzles.txt").write_text("\n\n".join(boards) + "\n", encoding="utf-8")
        written.append(f"Next: trl-hrm solve {shell_word(str(folder))} {shell_word(str(folder / 'puzzles.txt'))}")
    return "\n".join(["", format_results(results), "", *written])


def push_model(folder: Path, repo_id: str, private: bool) -> str:
    """
    Push a model to the Hub in one commit, and return its address.

    Raises:
        [`~hub.PushError`]: If the push failed.
        `ValueError`: If the repository must be private, but exists and is public. Nothing is uploaded then.
    """
    import re

    from huggingface_hub import HfApi

    from ..hub import pushing

    api = HfApi()
    with pushing(repo_id):
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public, but `private` is set. Choose another `push_to_hub`, or remove `private`."
            )
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8")
        [name] = re.findall(r"^model_name: (.+)$", text, re.MULTILINE)
        card.write_text(
            text.replace(name, repo_id), encoding="utf-8"
        )  # the code in the card loads the model from there
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, ignore_patterns=["training_args.bin"], commit_message="Add the model"
        )
    return str(commit.repo_url)


def train_all(
    config: ReasonConfig,
    folder: Path,
    data: Path,
    models: dict[str, dict[str, Any]],
    training: dict[str, dict[str, Any]],
    pool: "Workers",
) -> dict[str, Any]:
    """
    Run the unfinished jobs: measure the speed of each system, choose its learning rate, and train it with every seed.

    Args:
        config ([`ReasonConfig`]):
            Budgets, seeds and learning rates.
        folder (`Path`), data (`Path`):
            Folder of the study, and of the puzzles.
        models (`dict[str, dict]`), training (`dict[str, dict]`):
            Fields of [`~reasoning.HrmGridConfig`] and of [`~reasoning.HRMReasoningConfig`] for each system.
        pool ([`~processes.Workers`]):
            Processes.

    Returns:
        `dict[str, Any]`: What was trained, as written to `plan.json`.
    """
    from ..reasoning.study import MORE_SEGMENTS, RUN, measure_speed, read_split, run_folder, run_jobs, train_run

    speed = {name: folder / "speed" / f"{name}.json" for name in models}
    (folder / "speed").mkdir(exist_ok=True)
    jobs = {
        name: partial(measure_speed, str(data), models[name], training[name], str(path))
        for name, path in speed.items()
        if not path.exists()
    }
    run_jobs(pool, "speed", jobs, folder)
    speeds = {name: read_json(path, "Delete the file and run the same command again.") for name, path in speed.items()}

    def steps_in(name: str, seconds: float) -> int:
        return max(int(seconds / speeds[name]["seconds_per_step"]), 1)

    # The learning rate with the highest exact accuracy on the validation split, from shorter trainings with the first seed
    rates = {name: config.rates_of(name) for name in models}
    tuned = {
        name: {rate: folder / "tuning" / f"{name}-{rate:g}" for rate in found}
        for name, found in rates.items()
        if len(found) > 1
    }
    jobs = {}
    for name, paths in tuned.items():
        steps = steps_in(name, config.tuning_seconds or config.seconds_per_run / 3)
        evaluations = {"validation": (steps, "validation", models[name]["halt_max_steps"])}
        for rate, path in paths.items():
            given = {**training[name], "learning_rate": rate, "seed": config.seeds[0], "max_steps": steps}
            if not (path / RUN).exists():
                jobs[path.name] = partial(train_run, str(data), models[name], given, evaluations, str(path))
    if tuned:
        run_jobs(pool, "learning-rates", jobs, folder)
    chosen = {name: choose_rate(paths, data) for name, paths in tuned.items()}

    # Every system with every seed, evaluated after equal seconds, after equal steps, and along the way
    steps = {name: steps_in(name, config.seconds_per_run) for name in models}
    equal = min(steps.values())
    plan: dict[str, Any] = {"seeds": config.seeds, "equal_steps": equal, "systems": {}}
    jobs = {}
    for name, model in models.items():
        segments = model["halt_max_steps"]
        model_name = f"{name.replace('+', '-')}-{model['vocab']['name']}-{model['height']}x{model['width']}"
        points = sorted({max(round(steps[name] * share / 5), 1) for share in range(1, 6)} | {equal})
        rate, tried = chosen.get(name, (rates[name][0], {}))
        plan["systems"][name] = {
            **speeds[name],
            "learning_rate": rate,
            "tried_learning_rates": {f"{one:g}": value for one, value in tried.items()},
            "steps": steps[name],
            "segments": segments,
            "points": points,
        }
        evaluations = {
            "test-seconds": (steps[name], "test", MORE_SEGMENTS * segments),
            "test-steps": (equal, "test", segments),
            **{f"validation-{step}": (step, "validation", segments) for step in points},
        }
        if read_split(data, "few_blanks") is not None:
            evaluations["few_blanks"] = (steps[name], "few_blanks", segments)
        for seed in config.seeds:
            path = run_folder(folder, name, seed)
            given = {**training[name], "learning_rate": rate, "seed": seed, "max_steps": steps[name]}
            if not (path / RUN).exists():
                jobs[path.name] = partial(train_run, str(data), model, given, evaluations, str(path), model_name)
    write_json(folder / "plan.json", plan)
    run_jobs(pool, "training", jobs, folder, lambda: f"{len(models)} systems, {len(config.seeds)} seeds each")
    return plan


def build_puzzles(config: ReasonConfig, folder: Path) -> Path:
    """Return the folder of the dataset, which is generated if `data` is not set."""
    if config.data is not None:
        return Path(config.data)
    from .build_grid import BuildGridConfig, build_grid

    data = folder / "data"
    if not (data / "build_report.json").exists():
        options = {
            "family": config.family,
            "size": config.size,
            "num_train": config.num_train,
            "num_validation": config.num_validation,
            "num_test": config.num_test,
            "seed": config.seed,
            "num_proc": config.num_workers or num_cores(),
        }
        if config.clues is not None:
            options["clues"] = config.clues
        build_grid(BuildGridConfig(output_dir=str(data), overwrite=True, **options))
    return data


def shared_settings(config: ReasonConfig, data: Path) -> dict[str, Any]:
    """
    Return the fields of [`~reasoning.HrmGridConfig`] that all systems share.

    Raises:
        `ValueError`: If the boards differ in size or kind, or have puzzle ids.
    """
    from ..reasoning.study import SPLITS, read_split
    from ..reasoning.vocab import MAZE_VOCAB, sudoku_vocab

    kinds = set()
    for split in SPLITS:
        rows = read_split(data, split)
        if rows is None:
            continue
        if not len(rows):
            raise ValueError(f"{data}: the split {split} has no rows. Build the dataset with more puzzles.")
        kinds |= set(zip(rows["family"], rows["height"], rows["width"], strict=True))
        if any(rows["puzzle_id"]):
            raise ValueError(
                f"{data}: the split {split} has puzzle ids. This command compares systems on puzzles without ids, such as Sudoku. "
                "Train on ARC with `trl-hrm train-grid`."
            )
    if len(kinds) > 1 or not {family for family, _, _ in kinds} <= {"sudoku", "maze"}:
        raise ValueError(f"{data}: found the boards {sorted(kinds)}, expected Sudoku boards or mazes of one size.")
    [(family, height, width)] = kinds
    shared = {
        "vocab": sudoku_vocab(height) if family == "sudoku" else MAZE_VOCAB,
        "height": height,
        "width": width,
        **{
            name: getattr(config, name)
            for name in ("hidden_size", "num_attention_heads", "intermediate_size", "mixer", "position")
        },
        "H_layers": config.layers,
        "L_layers": config.layers,
        "num_prefix_tokens": config.num_prefix_tokens,
        "halt_max_steps": config.halt_max_steps,
        "loss_type": config.loss_type,
    }
    if config.mixer == "mlp":
        shared["mixer_intermediate_size"] = config.mixer_intermediate_size
    return shared


def training_settings(config: ReasonConfig, system: "System") -> dict[str, Any]:
    """Return the fields of [`~reasoning.HRMReasoningConfig`] for a system."""
    return {
        "per_device_train_batch_size": config.batch_size,
        "weight_decay": config.weight_decay,
        "warmup_steps": config.warmup_steps,
        "ema": config.ema_decay if system.has_ema else None,
        "augment": config.augment,
        "easier_share": config.easier_share,
        "bf16": config.bf16,
        "use_cpu": config.device == "cpu",
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        "learning_rate": 1e-3,
    }


def choose_rate(paths: dict[float, Path], data: Path) -> tuple[float, dict[float, float]]:
    """
    Return the learning rate with the highest exact accuracy on the validation split, by cell accuracy if several are equal, and the
    exact accuracy of each rate.
    """
    import numpy as np

    from ..reasoning.evaluate import cell_accuracy, exact
    from ..reasoning.study import read_split

    solutions = np.array(read_split(data, "validation")["solution"], dtype=np.uint8)
    scores = {}
    for rate, path in paths.items():
        with np.load(path / "validation.npz", allow_pickle=False) as arrays:
            answers = arrays["answers"][-1]
        scores[rate] = float(exact(answers, solutions).mean()), float(cell_accuracy(answers, solutions).mean())
    best = max(scores, key=lambda rate: scores[rate])
    return best, {rate: score[0] for rate, score in scores.items()}


def describe_data(data: Path) -> dict[str, Any]:
    """Return the sizes of the splits, the kind of the boards and, if known, how the puzzles were built."""
    from ..reasoning.study import SPLITS, read_split

    rows = {split: read_split(data, split) for split in SPLITS}
    first = rows["test"][0]
    report = data / "build_report.json"
    return {
        "family": first["family"],
        "height": first["height"],
        "width": first["width"],
        "splits": {split: len(found) for split, found in rows.items() if found is not None},
        "build": read_json(report) if report.exists() else None,
    }


def best_run(results: dict[str, Any], folder: Path) -> Path | None:
    """Return the training of an HRM, or else of another recurrent system, with the highest exact accuracy on the validation split."""
    from ..reasoning.study import System, run_folder

    systems = results["systems"]
    names = [name for name in systems if name.startswith("hrm")] or [
        name for name in systems if System(name).is_recurrent
    ]
    scores = {
        (name, seed): systems[name]["validation"][-1]["seeds"][place]
        for name in names
        for place, seed in enumerate(results["seeds"])
    }
    return run_folder(folder, *max(scores, key=lambda run: scores[run])) if scores else None
