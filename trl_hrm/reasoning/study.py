"""
Trains several systems on the same puzzles, and compares them on the same test puzzles: the jobs, the results and the claims of
`trl-hrm reason`.

A comparison of the Hierarchical Reasoning Model (HRM, arXiv 2506.21734) says little without controls. A network that makes one pass
shows what recurrence adds. The same blocks in the same outer loop, without two modules, show what the hierarchy adds. All systems are
compared after equal seconds and after equal steps of the same trainings: the learning rate is constant after the warm-up, so that the
checkpoint at step s is what a training of s steps would end with.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from ..io import read_json, replacing, shown, write_json
from ..processes import Workers, run_logged
from ..terminal import say
from .evaluate import (
    GridPredictions,
    by_group,
    cell_accuracy,
    choose_by_q,
    estimate,
    exact,
    first_halt,
    fixed,
    predict,
)


if TYPE_CHECKING:
    from datasets import Dataset

    from .configuration_hrm_grid import HrmGridConfig


SPLITS = ("train", "validation", "test", "few_blanks")
RUN = "run.json"
REMEDY = "Delete the folder of this training and run the same command again."
BUDGETS = {"seconds": "equal seconds", "steps": "equal steps"}
MORE_SEGMENTS = 4  # the test puzzles are also solved with this many times the segments of the training
MARGIN = 0.05  # loss that "suffices" and "loses nothing" allow
NUM_BOARDS = 6  # on the page
PILOT_STEPS = 60
PILOT_QUANTILE = 0.2  # other programs on the machine only make steps longer
PILOT_WARM_UP = 10

# Preset and settings of each system. The names of the paper's switches are in the docs
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "one_pass": ("one_pass", {}),
    "one_pass_deep": ("one_pass_deep", {}),
    "loop": ("loop", {}),
    "hrm": ("hrm", {"continue_head": False}),
    "hrm_continue": ("hrm", {"continue_head": True}),
    "trm": ("trm", {}),
}
SWITCHES: dict[str, dict[str, Any]] = {
    "one_step": {"grad_scope": "last_step"},
    "last_cycle": {"grad_scope": "last_cycle"},
    "full_gradient": {"grad_scope": "all"},
    "tied": {"tie_modules": True},
    "ema": {},
}
TITLES = {
    "one_pass": "one pass",
    "one_pass_deep": "one pass, deep",
    "loop": "loop control",
    "hrm": "HRM",
    "hrm_continue": "HRM, continue head",
    "trm": "TRM",
    "one_step": "one-step gradient",
    "last_cycle": "gradient of the last cycle",
    "full_gradient": "gradient of all cycles",
    "tied": "one module",
    "ema": "EMA",
}


@dataclass(frozen=True)
class System:
    """
    A system to train, by its name: a name in `SYSTEMS`, and switches in `SWITCHES` that change it, such as `trm+one_step+ema`.

    Args:
        name (`str`):
            Name.

    Raises:
        `ValueError`: If the system or a switch is unknown.
    """

    name: str

    def __post_init__(self):
        base, *switches = self.name.split("+")
        if base not in SYSTEMS:
            raise ValueError(
                f"`systems` has {shown(self.name)}. A system is one of {', '.join(SYSTEMS)}, and may be followed by switches, such as "
                "hrm+ema."
            )
        unknown = [switch for switch in switches if switch not in SWITCHES]
        if unknown or len(set(switches)) < len(switches):
            raise ValueError(
                f"`systems` has {shown(self.name)}. After the +, it may have each of these switches once: {', '.join(SWITCHES)}."
            )

    @property
    def title(self) -> str:
        base, *switches = self.name.split("+")
        return ", ".join(TITLES[part] for part in (base, *switches))

    @property
    def has_ema(self) -> bool:
        return "ema" in self.name.split("+")

    @property
    def is_recurrent(self) -> bool:
        return not self.name.startswith("one_pass")

    def config(self, shared: Mapping[str, Any], cycles: Sequence[int], trm_cycles: Sequence[int]) -> "HrmGridConfig":
        """
        Return the configuration of the model.

        Args:
            shared (`Mapping[str, Any]`):
                Fields of [`HrmGridConfig`] that all systems share: vocabulary, size of the board, and size of the network.
            cycles, trm_cycles (`Sequence[int]`):
                `H_cycles` and `L_cycles`, of TRM and of all other systems.
        """
        from .configuration_hrm_grid import HrmGridConfig

        base, *switches = self.name.split("+")
        preset, settings = SYSTEMS[base]
        H_cycles, L_cycles = trm_cycles if preset == "trm" else cycles
        merged = {**shared, "H_cycles": H_cycles, "L_cycles": L_cycles, **settings}
        for switch in switches:
            merged |= SWITCHES[switch]
        if not self.is_recurrent:
            merged.pop("halt_max_steps", None)
        return HrmGridConfig.preset(preset, **merged)


# Jobs, each in its own process


def read_split(folder: str | Path, split: str) -> "Dataset | None":
    """
    Return a split of a dataset that `trl-hrm build-grid` wrote. Only the split `few_blanks` may be missing (`None`): mazes have none.

    Raises:
        `FileNotFoundError`: If the folder has no such split.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    files = sorted(Path(folder).glob(f"data/{split}-*.parquet"))
    if not files and split == "few_blanks":
        return None
    if not files:
        raise FileNotFoundError(
            f"{folder}: found no split `{split}`, expected data/{split}-*.parquet. Build the dataset with `trl-hrm build-grid`, with "
            f"these splits: {', '.join(SPLITS)}."
        )
    return Dataset(pa.concat_tables([pq.read_table(file) for file in files]))


def run_jobs(
    pool: Workers, stage: str, jobs: Mapping[str, partial], folder: Path, did: Callable[[], str] | None = None
) -> None:
    """
    Run independent jobs in parallel processes of one thread each, with a progress bar, and print a line with their time and result.

    Args:
        pool ([`~processes.Workers`]):
            Processes.
        stage (`str`):
            Name of the stage, for the bar and the folder of the logs.
        jobs (`Mapping[str, partial]`):
            Unfinished jobs by name: calls of functions that another process can import.
        folder (`Path`):
            Folder of the study. `logs/` has what the jobs print.
        did (`Callable[[], str]`, *optional*):
            Returns a description of the result.

    Raises:
        `ValueError`: If a job failed. The other jobs are finished first.
    """
    began = time.perf_counter()
    failed = run_logged(pool, stage, jobs, folder)
    if failed:
        name, error = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(jobs)} jobs of the stage {stage} failed, first {name} ({type(error).__name__}: {error}) The logs are in "
            f"{folder / 'logs' / stage}. Run the same command again to repeat the failed jobs."
        )
    words = did() if did else f"{len(jobs)} jobs"
    say(f"{stage:<16}{time.perf_counter() - began:>6.0f} s  {words}")


def measure_speed(data: str, model: Mapping[str, Any], training: Mapping[str, Any], output: str) -> None:
    """
    Job that measures the seconds per training step of a system, as a low quantile over some steps. On a CPU, these are seconds of
    processor time, which other programs change less than the time of the clock. On a GPU, they are seconds of the clock.

    Args:
        data (`str`):
            Folder of the dataset.
        model (`Mapping[str, Any]`):
            Fields of [`HrmGridConfig`].
        training (`Mapping[str, Any]`):
            Fields of [`HRMReasoningConfig`].
        output (`str`):
            JSON file to write.
    """
    clock = Clock(bool(training.get("use_cpu")))
    folder = Path(output).with_suffix("")
    settings = {**training, "output_dir": str(folder), "max_steps": PILOT_WARM_UP + PILOT_STEPS, "warmup_steps": 1}
    trainer = _trainer(model, settings, read_split(data, "train"), [clock])
    trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    write_json(
        output,
        {
            "seconds_per_step": float(np.quantile(np.diff(clock.times)[PILOT_WARM_UP:], PILOT_QUANTILE)),
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        },
    )


def train_run(
    data: str,
    model: Mapping[str, Any],
    training: Mapping[str, Any],
    evaluations: Mapping[str, tuple[int, str, int]],
    output: str,
    model_name: str | None = None,
) -> None:
    """
    Job that trains a system once and stores its answers. If it was interrupted, it resumes from the last checkpoint.

    Args:
        data (`str`):
            Folder of the dataset.
        model (`Mapping[str, Any]`):
            Fields of [`HrmGridConfig`].
        training (`Mapping[str, Any]`):
            Fields of [`HRMReasoningConfig`], with `max_steps`.
        evaluations (`Mapping[str, tuple[int, str, int]]`):
            For each evaluation, the step, the split, and the number of segments. Its answers are saved as `NAME.npz`.
        output (`str`):
            Folder to write. Its last file is `run.json`.
        model_name (`str`, *optional*):
            Name of the model in its card. The trained model is saved in `model/`. By default, it is not kept.
    """
    from .modeling_hrm_grid import HrmGridForSolving

    folder = Path(output)
    work = folder / "training" / (model_name or "model")  # the name of the folder is the name in the card
    work.mkdir(parents=True, exist_ok=True)
    steps = sorted({step for step, _, _ in evaluations.values()} | {training["max_steps"]})
    clock = Clock(bool(training.get("use_cpu")), steps)
    settings = {**training, "output_dir": str(work)}
    trainer = _trainer(model, settings, read_split(data, "train"), [clock])
    is_resumed = any(work.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True)  # the newest complete one: a process may be killed while it saves
    splits = {split: read_split(data, split) for _, split, _ in evaluations.values()}
    for name, (step, split, segments) in evaluations.items():
        found = HrmGridForSolving.from_pretrained(str(work / f"checkpoint-{step}")).to(trainer.args.device)
        predictions = predict(found, splits[split], segments=segments, batch_size=256)
        with replacing(folder / f"{name}.npz", "wb") as file:
            np.savez_compressed(file, answers=predictions.answers, q_halt=predictions.q_halt)
    if model_name is not None:
        trainer.save_model(str(folder / "model"))
    history = [one for one in trainer.state.log_history if "loss" in one]
    shutil.rmtree(work.parent)
    seconds = clock.times[-1] - clock.times[0] if not is_resumed and len(clock.times) > 1 else None
    write_json(folder / RUN, {"seconds": seconds, "history": history})


class Clock(TrainerCallback):
    """
    Records the time at the end of each step, and saves checkpoints after some steps.

    Args:
        is_on_cpu (`bool`):
            Whether to read the processor time of this process, instead of the time of the clock.
        saves (`Sequence[int]`, *optional*):
            Steps after which to save.
    """

    def __init__(self, is_on_cpu: bool, saves: Sequence[int] = ()):
        self.read = time.process_time if is_on_cpu else time.perf_counter
        self.saves = set(saves)
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(self.read())
        control.should_save = state.global_step in self.saves


def _trainer(
    model: Mapping[str, Any], training: Mapping[str, Any], rows: "Dataset", callbacks: Sequence[Any]
) -> "Any":
    from .configuration_hrm_grid import HrmGridConfig
    from .reasoning_config import HRMReasoningConfig
    from .reasoning_trainer import HRMReasoningTrainer

    args = HRMReasoningConfig(**training)
    return HRMReasoningTrainer(
        HrmGridConfig.from_dict(dict(model)), args, train_dataset=rows, callbacks=list(callbacks)
    )


# Results


@dataclass(frozen=True)
class Answers:
    """
    Predictions of a system for the same puzzles, one for each seed.

    Args:
        predictions (`list[GridPredictions]`):
            Predictions of each seed.
        solutions (`np.ndarray`):
            Solutions, shape `(puzzles, cells)`.
    """

    predictions: list[GridPredictions]
    solutions: np.ndarray

    def exact(self, segments: int | None = None) -> np.ndarray:
        """Return whether each answer after a number of segments is right, shape `(seeds, puzzles)`."""
        return np.stack([exact(fixed(one, segments)[0], self.solutions) for one in self.predictions])

    def exact_by(self, strategy: Callable, segments: int) -> tuple[np.ndarray, float]:
        """Return whether each answer that a strategy chooses is right, and the mean number of segments it needs."""
        chosen = [strategy(one.up_to(segments)) for one in self.predictions]
        right = np.stack([exact(answers, self.solutions) for answers, _ in chosen])
        return right, float(np.mean([needed for _, needed in chosen]))


def read_answers(folder: Path, system: str, seeds: Sequence[int], name: str, solutions: np.ndarray) -> Answers:
    """
    Return the stored predictions of an evaluation.

    Raises:
        `ValueError`: If a file is damaged or belongs to other puzzles.
    """
    predictions = []
    for seed in seeds:
        path = run_folder(folder, system, seed) / f"{name}.npz"
        with np.load(path, allow_pickle=False) as arrays:
            found = GridPredictions(arrays["answers"], arrays["q_halt"])
        if found.answers.shape[1:] != solutions.shape or found.q_halt.shape != found.answers.shape[:2]:
            raise ValueError(f"{path}: found answers of the shape {found.answers.shape}. {REMEDY}")
        predictions.append(found)
    return Answers(predictions, solutions)


def run_folder(folder: Path, system: str, seed: int) -> Path:
    """Return the folder of a training."""
    return folder / "runs" / f"{system}-{seed}"


def collect(folder: Path, plan: Mapping[str, Any], data: str | Path) -> dict[str, Any]:
    """
    Return the results of a study.

    Args:
        folder (`Path`):
            Folder of the study, whose trainings are finished.
        plan (`Mapping[str, Any]`):
            What was trained: `systems`, with `segments`, `steps` and `points` of each, and `seeds`. See [`~scripts.reason.reason`].
        data (`str` or `Path`):
            Folder of the dataset.

    Returns:
        `dict[str, Any]`: Results for each system, and the claims. Estimates are dictionaries with the fields of [`~reasoning.evaluate.Estimate`].
    """
    splits = {name: rows for name in SPLITS[1:] if (rows := read_split(data, name)) is not None}
    solutions = {name: np.array(rows["solution"], dtype=np.uint8) for name, rows in splits.items()}
    test = splits["test"]
    puzzles = np.array(test["puzzle"], dtype=np.uint8)
    blanks = (puzzles != solutions["test"]).sum(1)
    answers: dict[str, dict[str, Answers]] = {}
    systems = {}
    for name, of_system in plan["systems"].items():
        read = partial(read_answers, folder, name, plan["seeds"])
        segments = of_system["segments"]
        found = answers[name] = {budget: read(f"test-{budget}", solutions["test"]) for budget in BUDGETS}
        right = found["seconds"].exact(segments)
        curve = [
            {"step": step, **asdict(estimate(read(f"validation-{step}", solutions["validation"]).exact()))}
            for step in of_system["points"]
        ]
        seconds = [read_json(run_folder(folder, name, seed) / RUN, REMEDY)["seconds"] for seed in plan["seeds"]]
        systems[name] = {
            **of_system,
            "title": System(name).title,
            "run_seconds": seconds,
            "exact": {budget: asdict(estimate(one.exact(segments))) for budget, one in found.items()},
            "cell": {budget: asdict(_cells(one, segments)) for budget, one in found.items()},
            "by_segment": [
                asdict(estimate(found["seconds"].exact(number)))
                for number in range(1, len(found["seconds"].predictions[0].answers) + 1)
            ],
            "strategies": {budget: _strategies(one, segments) for budget, one in found.items()},
            "by_blanks": _groups(by_group(right, _bins(blanks))),
            "by_rating": _groups(by_group(right, _bins(np.array(test["rating"])))),
            "validation": curve,
        }
        if "few_blanks" in splits:
            few_right = read("few_blanks", solutions["few_blanks"]).exact(segments)
            few = (np.array(splits["few_blanks"]["puzzle"], dtype=np.uint8) != solutions["few_blanks"]).sum(1)
            systems[name]["few_blanks"] = _groups(by_group(few_right, few))
    return {
        "systems": systems,
        "claims": claims({name: one["segments"] for name, one in systems.items()}, answers),
        "boards": _boards(plan, answers, test),
    }


def _cells(answers: Answers, segments: int) -> Any:
    return estimate(
        np.stack([cell_accuracy(fixed(one, segments)[0], answers.solutions) for one in answers.predictions])
    )


def _strategies(answers: Answers, segments: int) -> dict[str, Any]:
    """Return the accuracy of the strategies that choose a segment, up to the segments of the training and up to all."""
    found = {}
    for strategy in (first_halt, choose_by_q):
        for limit in sorted({segments, len(answers.predictions[0].answers)}):
            right, needed = answers.exact_by(strategy, limit)
            name = f"{strategy.__name__}, {limit} segments"
            found[name] = {**asdict(estimate(right)), "mean_segments": needed}
    return found


def _bins(numbers: np.ndarray) -> np.ndarray:
    """Return the numbers, or their bin of about equal size, named by its lowest and highest number, if there are more than 8."""
    values = np.unique(numbers)
    if len(values) <= 8:
        return numbers
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, 6)[1:-1], method="inverted_cdf"))
    places = np.searchsorted(edges, numbers)
    width = len(str(values[-1]))
    names = [
        f"{here.min():>{width}} to {here.max():>{width}}" if len(here) else ""
        for here in (numbers[places == place] for place in range(len(edges) + 1))
    ]
    return np.array(names)[places]


def _groups(found: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(group).strip(): asdict(one) for group, one in found.items()}


def _boards(plan: Mapping[str, Any], answers: Mapping[str, Mapping[str, Answers]], rows: "Dataset") -> dict[str, Any]:
    """Return the answers of the first seed for the first test puzzles, after each segment, for the page."""
    num_boards = min(NUM_BOARDS, len(rows))
    return {
        "height": rows[0]["height"],
        "width": rows[0]["width"],
        "puzzles": [list(rows[i]["puzzle"]) for i in range(num_boards)],
        "solutions": [list(rows[i]["solution"]) for i in range(num_boards)],
        "answers": {
            name: found["seconds"].predictions[0].answers[:, :num_boards].tolist()
            for name, found in answers.items()
            if System(name).is_recurrent
        },
        "q_halt": {
            name: np.round(found["seconds"].predictions[0].q_halt[:, :num_boards].astype(float), 2).tolist()
            for name, found in answers.items()
            if System(name).is_recurrent
        },
    }


def claims(segments: Mapping[str, int], answers: Mapping[str, Mapping[str, Answers]]) -> list[dict[str, Any]]:
    """
    Judge the claims about the reasoning model by paired intervals over seeds and puzzles.

    A claim holds if its interval is above 0, and does not hold if its interval is below 0. With a margin ("suffices", "loses nothing"),
    it holds if the interval is above minus `MARGIN`, and does not hold if the interval is below minus `MARGIN`. It is open otherwise,
    with less than three seeds, or if there is nothing to lose, because the system to compare with has an accuracy of at most `MARGIN`. A
    claim with several parts does not hold if one part does not hold, and is open if one part is open. Each claim is judged after equal
    seconds and after equal steps.

    Args:
        segments (`Mapping[str, int]`):
            Number of segments that each system was trained with.
        answers (`Mapping[str, Mapping[str, Answers]]`):
            Answers to the test puzzles of each system, for each budget in `BUDGETS`.

    Returns:
        `list[dict]`: For each claim that the systems allow to judge: `claim`, `systems` that are compared, `margin`, and, for each
        budget, `verdict` and `parts`, the estimates of the differences.
    """
    found = []

    def compare(claim: str, one: str, others: Sequence[str], margin: float = 0.0) -> None:
        if one not in answers or not all(other in answers for other in others):
            return
        judged = {}
        for budget in BUDGETS:
            right, *controls = (answers[name][budget].exact(segments[name]) for name in (one, *others))
            titles = [f"{System(one).title} − {System(other).title}" for other in others]
            judged[budget] = judge(dict(zip(titles, ((right, control) for control in controls), strict=True)), margin)
        found.append({"claim": claim, "margin": margin, **judged})

    passes = [name for name in ("one_pass", "one_pass_deep") if name in answers]
    hrm = next((name for name in ("hrm", "hrm_continue") if name in answers), None)
    if passes and hrm:
        compare("HRM beats one pass", hrm, passes)
    if passes:
        compare("The loop without hierarchy beats one pass", "loop", passes)
    if hrm:
        compare("The hierarchy beats the same blocks in one loop", hrm, ["loop"])
    for whole, short in (("trm", "trm+one_step"), ("hrm+last_cycle", "hrm"), ("hrm+full_gradient", "hrm")):
        compare(f"The one-step gradient suffices ({whole.split('+')[0].upper()})", short, [whole], MARGIN)
    compare("The continue head helps", "hrm_continue", ["hrm"])
    for name in answers:
        compare(f"EMA helps ({System(name).title})", f"{name}+ema", [name])
    if hrm:
        compare("One small module (TRM) beats two (HRM)", "trm", [hrm])
    for name in answers:
        if System(name).is_recurrent:
            add_within(found, name, segments[name], answers[name])
    return found


def add_within(found: list[dict[str, Any]], name: str, segments: int, answers: Mapping[str, Answers]) -> None:
    """Judge the claims that compare a system with itself: more segments at test, and halting by q."""
    title = System(name).title
    whole = answers["seconds"]
    more = len(whole.predictions[0].answers)
    usual = whole.exact(segments)
    halted, needed = whole.exact_by(first_halt, segments)
    for claim, margin, right in (
        (f"More segments at test help ({title}: {more} instead of {segments})", 0.0, whole.exact(more)),
        (f"Halting by q loses nothing ({title}: {needed:.1f} segments on average)", MARGIN, halted),
    ):
        found.append({"claim": claim, "margin": margin, "seconds": judge({title: (right, usual)}, margin)})


def judge(parts: Mapping[str, tuple[np.ndarray, np.ndarray]], margin: float) -> dict[str, Any]:
    """Return the verdict of a claim, from whether each answer of a system and of its control is right. See [`claims`]."""
    estimates = {name: estimate(1.0 * one - other, is_difference=True) for name, (one, other) in parts.items()}
    verdicts = {
        "open" if margin and other.mean() <= margin else estimates[name].above(-margin)
        for name, (_, other) in parts.items()
    }
    verdict = next(answer for answer in ("does not hold", "open", "holds") if answer in verdicts)
    return {"verdict": verdict, "parts": {name: asdict(one) for name, one in estimates.items()}}
