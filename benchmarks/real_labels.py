"""
Train step reward models from SmolLM2-135M-Instruct on a mixture of real labelled steps, and judge them on test sets that they have not seen.

```bash
python tests/tools/fetch_real_model.py smollm2 --folder outputs
python benchmarks/real_labels.py --model outputs/smollm2 --data data --output_dir outputs/real-labels --docs docs/evidence.md \
    --profile short --results benchmarks/results/real_labels
```

`--data` is a folder with these files:

- `prm800k/phase1_test.jsonl`: of openai/prm800k (GitHub)
- `prmbench/subset400.jsonl`: of ssmisya/PRMBench (GitHub), `mr_eval/tasks/prmtest_classified_subset400/data/target_data.jsonl`
- `prmbench/train_p1_*.jsonl`: PRMBench's training classes, one file for each class, with the columns of `subset400.jsonl`
- `processbench/gsm8k.json` and `processbench/olympiadbench.json`: the subsets of Qwen/ProcessBench (Hub)
- `samples/bbm_*.jsonl`: `dyck_languages.jsonl` and the other tasks of WHGTyen/BIG-Bench-Mistake (GitHub)

The training steps are a mixture with equal numbers of labelled steps of PRM800K (three quarters of its problems), PRMBench's training
classes and ProcessBench's olympiadbench. Problems of the test sets are excluded, which is checked and counted. All systems (ORM, PRM, HRM
with merged steps of 2 and of up to 3) train on equal numbers of tokens, with the same learning rate schedule, for each seed. They are
judged on the other problems of PRM800K, and on rows of ProcessBench gsm8k, PRMBench `subset400` and BIG-Bench Mistake.

Each training is a job in its own process, in the order of `make_jobs`. A job that is finished is not repeated and an interrupted one
starts over, so the command can be stopped at any time. The report has the finished jobs and lists the missing ones. `--results` is a
folder for the scores of each finished job, without texts. With it, the study can be continued on another machine: the command checks
that the model, the mixture, the test sets and the versions are the same.
"""

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import save_section, version_words, versions
from real_labels_jobs import (
    LEARNING_RATES,
    PROFILES,
    QUARTER,
    ROW,
    SUITES,
    TESTS,
    TRIPLE,
    Job,
    Profile,
    after_an_error,
    digest_of_mixture,
    every_step,
    flat,
    make_jobs,
    prepare,
    run_baseline,
    run_job,
    source_name,
    use_bf16,
)
from real_model import auroc_draws
from tqdm import tqdm

from trl_hrm.evaluation.benchmarks.prm_bench import PRM_BENCH
from trl_hrm.evaluation.benchmarks.suite import Solution
from trl_hrm.identity import changed_settings, digest_of_checkpoint_weights, digest_of_files
from trl_hrm.intervals import T_QUANTILES, percentile_interval
from trl_hrm.io import read_json, write_json
from trl_hrm.pages.page import Table
from trl_hrm.pages.pictures import MARKERS, THEMES, new_figure, style_axes


HEADING = "### Results of the study"  # below a summary written by hand, which stays
PICTURE = "images/real-labels.png"
SYSTEMS = {"orm": "ORM", "prm": "PRM", "hrm": "HRM", "hrm3": "HRM, up to 3 steps merged"}


# Measures


def first_error_f1(tests: list[dict[str, Any]], scores: list[list[float]], threshold: float, suite) -> float:
    """Return the main metric of a suite: F1 of ProcessBench, PRM-Score of PRMBench. BIG-Bench Mistake is measured like ProcessBench."""
    sums: dict[str, np.ndarray] = {}
    for row, values in zip(tests, scores, strict=True):
        solution = Solution("", row["subset"], "", row["prompt"], row["completions"], row["labels"], row["problem"])
        found = np.array(suite.tally(solution, values, threshold), dtype=float)
        name = row["subset"] if suite is PRM_BENCH else "all"  # a row of PRMBench counts by its class
        sums[name] = sums.get(name, 0) + found
    return float(suite.summarize(sums)["averages"][suite.main][suite.metric])


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t interval of the mean over seeds. Infinite for one seed."""
    half = T_QUANTILES[len(values) - 1] * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(np.mean(values) - half), float(np.mean(values) + half)


# Report


@dataclass(frozen=True)
class Arm:
    """A kind of training and how its model scores steps, over all seeds."""

    title: str
    system: str
    adaptation: str = "full"
    spans: int = 1  # the score of a step is the maximum over merged steps of up to this many steps
    separator: str = "newlines"
    weighting: str = "unique"
    times: float = 1.0  # of the tokens of the other trainings

    @property
    def kind(self) -> tuple[str, str, str, str, float]:
        """See [`Job.kind`]."""
        return self.system, self.adaptation, self.separator, self.weighting, self.times

    def scores(self, finished: dict[Job, dict[str, Any]]) -> dict[int, dict[str, list[list[float]]]]:
        """Return the step scores of each test set, by seed."""
        found = {}
        for job, result in finished.items():
            if job.kind == self.kind:
                found[job.seed] = {
                    test: [[max(values[: self.spans]) for values in row] for row in rows]
                    for test, rows in result["scores"].items()
                }
        return found


MAIN = [
    Arm("ORM", "orm"),
    Arm("PRM", "prm"),
    Arm("HRM, single steps", "hrm"),
    Arm("HRM, spans 1 and 2", "hrm", spans=2),
    Arm("HRM 3, single steps", "hrm3"),
    Arm("HRM 3, spans 1 to 3", "hrm3", spans=3),
]
ARMS = MAIN + [replace(arm, title=f"{arm.title}, LoRA", adaptation="lora") for arm in MAIN]
ARMS += [
    Arm("PRM, a quarter of the tokens", "prm", times=QUARTER),
    Arm("PRM, 3 times the tokens", "prm", times=TRIPLE),
    Arm(r"PRM, separator `\n`", "prm", separator="newline"),
    Arm("PRM, separator ` ки`", "prm", separator="tag"),
    Arm("PRM, weighting `occurrence`", "prm", weighting="occurrence"),
]


def arm_of(job: Job) -> Arm:
    """Return the arm of a training that scores single steps."""
    return next(arm for arm in ARMS if arm.spans == 1 and arm.kind == job.kind)


# pairs of arms: the first minus the second
DIFFERENCES = [
    ("PRM", "ORM"),
    ("HRM, single steps", "PRM"),
    ("HRM, spans 1 and 2", "PRM"),
    ("HRM, spans 1 and 2", "HRM, single steps"),
    ("HRM 3, spans 1 to 3", "HRM, spans 1 and 2"),
    ("PRM", "PRM, LoRA"),
    ("HRM, single steps, LoRA", "PRM, LoRA"),
    ("HRM, spans 1 and 2, LoRA", "PRM, LoRA"),
    ("PRM", "PRM, a quarter of the tokens"),
    ("PRM, 3 times the tokens", "PRM"),
    (r"PRM, separator `\n`", "PRM"),
    ("PRM, separator ` ки`", "PRM"),
    ("PRM, weighting `occurrence`", "PRM"),
]
BASELINES = {"untrained": "before training (pretrained body, new head)", "random": "random weights"}


class Aurocs:
    """AUROC of every arm and seed on the kept steps of a test set, with draws for intervals over problems."""

    def __init__(self, tests, scores: dict[str, dict[int, list[list[float]]]], kept, seed: int):
        pairs, labels, problems = flat(tests, kept)
        columns = {
            (title, number): np.array([rows[i][step] for i, step in pairs])
            for title, by_seed in scores.items()
            for number, rows in by_seed.items()
        }
        self.labels, self.columns = labels, columns
        is_defined = 0 < (labels >= 0.5).sum() < len(labels)  # there are right and wrong steps
        self.values, self.draws = auroc_draws(columns, labels, problems, seed) if is_defined else ({}, {})

    def mean(self, title: str) -> str:
        """Return the mean over seeds, their standard deviation, and the interval over problems."""
        seeds = [key for key in self.values if key[0] == title]
        if not seeds:
            return "–"
        values = [self.values[key] for key in seeds]
        low, high = percentile_interval(np.mean(values), np.mean([self.draws[key] for key in seeds], axis=0))
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{spread} [{low:.2f}, {high:.2f}]"

    def difference(self, first: str, second: str) -> tuple[str, bool] | None:
        """
        Return the difference of two arms over their common seeds, and whether both its intervals, over problems and over seeds, exclude 0
        on the same side. `None` without a common seed.
        """
        seeds = [number for title, number in self.values if title == first and (second, number) in self.values]
        if not seeds:
            return None
        values = [self.values[first, number] - self.values[second, number] for number in seeds]
        draws = np.mean([self.draws[first, number] - self.draws[second, number] for number in seeds], axis=0)
        problems, over_seeds = percentile_interval(np.mean(values), draws), t_interval(values)
        is_settled = min(problems[0], over_seeds[0]) > 0 or max(problems[1], over_seeds[1]) < 0
        text = f"{np.mean(values):+.3f} [{problems[0]:+.2f}, {problems[1]:+.2f}]"
        if len(values) > 1:
            text += f" ({over_seeds[0]:+.2f}, {over_seeds[1]:+.2f})"
        return minus(text) + (" *" if is_settled else ""), is_settled


def minus(text: str) -> str:
    return text.replace("-", "−")


def best_f1(tests, scores: list[list[float]], suite) -> float:
    """Return the best value over all thresholds on the same rows, an upper bound."""
    thresholds = np.unique([score for row in scores for score in row])
    middle = np.concatenate([[0.0], (thresholds[1:] + thresholds[:-1]) / 2, [1.0]])
    return max(first_error_f1(tests, scores, threshold, suite) for threshold in middle[:: max(1, len(middle) // 200)])


def report(args: argparse.Namespace, folder: Path, finished: dict[Job, dict[str, Any]], number: int) -> str:
    """Return the section of `docs/evidence.md`, and draw its picture."""
    results = results_folder(args)
    tests, counts = read_json(folder / "tests.json"), read_json(folder / "counts.json")
    settings = read_json(results / "settings.json")
    scores: dict[str, dict[str, dict[int, list[list[float]]]]] = {test: {} for test in TESTS}
    arms = {arm.title: arm.scores(finished) for arm in ARMS}
    for name, title in BASELINES.items():
        if not (results / f"{name}.json").exists():
            continue
        found = read_json(results / f"{name}.json")["scores"]
        arms[title] = {
            args.seed: {test: [[values[0] for values in row] for row in rows] for test, rows in found.items()}
        }
    arms = {title: by_seed for title, by_seed in arms.items() if by_seed}
    for test in TESTS:
        scores[test] = {
            title: {seed: found[test] for seed, found in by_seed.items()} for title, by_seed in arms.items()
        }
    aurocs = {test: Aurocs(tests[test], scores[test], every_step, args.seed) for test in TESTS}
    parts = [HEADING, *introduction(settings, counts, finished, number)]
    parts += [
        "AUROC of the scores of all labelled steps: mean over seeds ± their standard deviation, and the 95 % interval over problems in "
        "brackets. A model that cannot tell right from wrong steps has 0.5. A head with random weights can be off 0.5 in both directions.",
        Table(
            ["", "seeds", *TESTS.values()],
            [[title, str(len(arms[title])), *(aurocs[test].mean(title) for test in TESTS)] for title in arms],
        ).markdown(),
    ]
    rows, settled, total = [], 0, 0
    for first, second in DIFFERENCES:
        cells = [aurocs[test].difference(first, second) for test in TESTS]
        if any(cells):
            rows.append([f"{first} − {second}", *(cell[0] if cell else "–" for cell in cells)])
            total += sum(cell is not None for cell in cells)
            settled += sum(cell is not None and cell[1] for cell in cells)
    parts += [
        "Differences, paired by seed and problem, with the interval over problems in brackets and the t interval over seeds in parentheses. "
        "A star marks differences that both intervals separate from 0:",
        Table(["", *TESTS.values()], rows).markdown(),
        f"{settled} of {total} differences are settled in this sense. The others are not: more seeds or more rows would be needed.",
        *outcome_tables(tests, scores, arms, args.seed),
    ]
    draw(aurocs, arms, Path(args.docs).parent / PICTURE if args.docs else folder / "real-labels.png")
    parts.append(f"![AUROC of each system on each test set, with intervals over problems]({PICTURE})")
    return "\n\n".join([*parts, READING.strip()]) + "\n"


def outcome_tables(tests, scores, arms, seed: int) -> list[str]:
    """Return the tables of F1 and of corrections."""
    rows = []
    majority = {test: [[1.0] * len(row["labels"]) for row in tests[test]] for test in SUITES}
    for title in arms:
        cells = []
        for test, suite in SUITES.items():
            found = [first_error_f1(tests[test], one, 0.5, suite) for one in scores[test][title].values()]
            best = [best_f1(tests[test], one, suite) for one in scores[test][title].values()]
            cells.append(f"{100 * np.mean(found):.1f} / {100 * np.mean(best):.1f}")
        rows.append([title, *cells])
    cells = [f"{100 * first_error_f1(tests[test], majority[test], 0.5, suite):.1f}" for test, suite in SUITES.items()]
    rows.append(["majority class: every step is right", *cells])
    parts = [
        "F1 of first errors (PRM-Score for PRMBench), in percent, mean over seeds: with the threshold 0.5, and with the best threshold for "
        "the same rows, which is an upper bound:",
        Table(["", *(TESTS[test] for test in SUITES)], rows).markdown(),
    ]
    kinds = {test: Aurocs(tests[test], scores[test], after_an_error, seed) for test in ("prm800k", "prmbench")}
    rows = []
    for title in arms:
        cells = []
        for one in kinds.values():
            cells.append(one.mean(title))
            for is_kind in (one.labels >= 0.5, one.labels < 0.5):
                means = [
                    column[is_kind].mean() for key, column in one.columns.items() if key[0] == title and is_kind.any()
                ]
                cells.append(f"{np.mean(means):.2f}" if means else "–")
        rows.append([title, *cells])
    number = {test: (int((one.labels >= 0.5).sum()), int((one.labels < 0.5).sum())) for test, one in kinds.items()}
    heads = [
        text
        for test, name in (("prm800k", "PRM800K"), ("prmbench", "PRMBench"))
        for text in (f"{name}: AUROC", f"right steps ({number[test][0]})", f"wrong steps ({number[test][1]})")
    ]
    differences = []
    for first, second in DIFFERENCES[1:5]:
        cells = [one.difference(first, second) for one in kinds.values()]
        if any(cells):
            differences.append([f"{first} − {second}", *(cell[0] if cell else "–" for cell in cells)])
    return parts + [
        "**Corrections.** In PRM800K, solutions hardly ever continue after a wrong step: annotators continue from a right step, or write one "
        "in place of the wrong ones. Its trees therefore contain almost no corrections (3 of 3,860 merged pairs), and nearly all merged pairs have "
        "the label of a right step followed by another step. As a test, each step that an annotator wrote is placed after the wrong steps that it replaced, and for comparison "
        "a second wrong step. In PRMBench, right steps do follow wrong ones. AUROC of right against wrong steps after a wrong step, and "
        "mean scores:",
        Table(["", *heads], rows).markdown(),
        "Differences in AUROC, as above:",
        Table(["", "PRM800K", "PRMBench"], differences).markdown(),
    ]


def introduction(settings, counts, finished, number) -> list[str]:
    profile, mixture = settings["profile"], counts["mixture"]
    steps = {"PRM800K": [0, 0], "PRMBench": [0, 0], "ProcessBench olympiadbench": [0, 0]}
    for source, found in mixture["sources"].items():
        name = source_name(source)
        steps[name][0] += found["labelled_steps"]["train"]
        steps[name][1] = counts["different_steps"].get(name, 0)
    by_system = {
        system: np.mean(
            [
                [result["tokens_per_row"], result["labels_per_row"]]
                for job, result in finished.items()
                if job.system == system
            ],
            axis=0,
        )
        for system in SYSTEMS
        if any(job.system == system for job in finished)
    }
    budget = ", ".join(
        f"{SYSTEMS[system]} {profile['rows'] * tokens:,.0f} tokens with {profile['rows'] * labels:,.0f} labels"
        for system, (tokens, labels) in by_system.items()
    )
    test_rows = ", ".join(
        f"{TESTS[test]} {found['problems']} problems with {found['steps']:,} labelled steps, {found['wrong']:,} of them wrong"
        for test, found in counts["tests"].items()
    )
    dates = sorted({result["date"] for result in finished.values()})
    size = next((f" --profile {name}" for name, one in PROFILES.items() if asdict(one) == profile), "")
    jobs = make_jobs(profile["seeds"])
    missing = Counter(arm_of(job).title for job in jobs if job not in finished)
    seeds = Counter(arm_of(job).title for job in jobs)
    return [
        "Step reward models trained from SmolLM2-135M-Instruct (4-bit weights, dequantized to fp32) on human and constructed labels, by `benchmarks/real_labels.py"
        f"{size}`, which has the command and describes the data. {len(finished)} of the {number} trainings of the study are finished."
        + (
            " Missing: "
            + "; ".join(
                f"{title}{f' ({count} of {seeds[title]} seeds)' * (count < seeds[title])}"
                for title, count in missing.items()
            )
            + "."
            if missing
            else ""
        ),
        "Training mixture, built by one call of `build_stepwise` with weights: "
        + ", ".join(
            f"{given:,} labelled steps of {name} ({different:,} different ones)"
            for name, (given, different) in steps.items()
        )
        + ". The classes of PRMBench share solutions, whose equal steps are joined in training. "
        f"{mixture['dropped'].get('excluded', 0):,} rows were excluded because their problem is in a test set. Of {counts['overlap']['trained']:,} "
        f"training and {counts['overlap']['tested']:,} test problems, {counts['overlap']['both']} are in both.",
        f"Each training has {profile['rows']} steps of one row of up to {ROW:,} tokens, which is a part of the mixture ({budget}). LoRA: rank 16, "
        f"learning rate {LEARNING_RATES['lora']}. Full: learning rate {LEARNING_RATES['full']}. Cosine schedule, {'bf16 autocast' if settings['bf16'] else 'float32'}, one thread.",
        f"Test sets: {test_rows}.",
        f"{' to '.join(dict.fromkeys(dates[:1] + dates[-1:]))}, one core for each training, {version_words(settings['versions'])}.",
    ]


def draw(aurocs: dict[str, Aurocs], arms, path: Path) -> None:
    """Draw the AUROC of the main arms on each test set, with intervals over problems."""
    theme = THEMES["light"]
    figure = new_figure()
    figure.set_size_inches(8, 5.5)
    axes = figure.subplots(1, 1)
    style_axes(axes, theme)
    titles = [title for title in [arm.title for arm in MAIN] + list(BASELINES.values()) if title in arms]
    for i, (test, one) in enumerate(aurocs.items()):
        for place, title in enumerate(titles):
            keys = [key for key in one.values if key[0] == title]
            value = np.mean([one.values[key] for key in keys])
            low, high = percentile_interval(value, np.mean([one.draws[key] for key in keys], axis=0))
            y = len(titles) - place + 0.3 - 0.18 * i
            colour = theme.curves[i]
            axes.plot([low, high], [y, y], color=colour, linewidth=1.5)
            axes.plot(value, y, MARKERS[i], color=colour, markersize=6, label=TESTS[test] if place == 0 else None)
    axes.axvline(0.5, color=theme.quiet, linewidth=1)
    axes.set_yticks([len(titles) - place for place in range(len(titles))], titles)
    axes.set_xlabel("AUROC of step scores")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor=theme.page)


READING = """
How to read this: a difference is settled only if it is larger than what the choice of problems and the seed of training explain. What is
not settled is unknown, not zero. An AUROC near 0.5 means that the model cannot tell right from wrong steps. Models before training are off
0.5, too, because their heads are random: compare trained models with each other, and with several seeds. The trainings of this table are as
short as stated above, and do not show how good a reward model of this size can get. [Full fine-tuning](#a-pretrained-model) on 128
rows of up to 2,048 tokens of PRM800K alone reached 0.61 on its held-out problems, and chance on ProcessBench.
"""


# Driver


def main(args: argparse.Namespace) -> None:
    folder, results, profile = Path(args.output_dir), results_folder(args), PROFILES[args.profile]
    jobs = make_jobs(profile.seeds)
    if args.job in BASELINES:
        run_baseline(args, args.job, folder, results)
    elif args.job:
        run_job(args, next(job for job in jobs if job.name == args.job), folder, results, profile)
    if args.job:
        return
    folder.mkdir(parents=True, exist_ok=True)
    prepare(args, folder, profile)
    check_settings(args, folder, results, profile)
    if not args.only_report:
        names = [*BASELINES, *(job.name for job in jobs)]
        names = [name for name in names if not (results / f"{name}.json").exists()]
        with ThreadPoolExecutor(args.processes) as pool, tqdm(total=len(names), desc="jobs", unit="job") as bar:
            for _ in pool.map(lambda name: start(name, folder), names):
                bar.update()
    files = {job: results / f"{job.name}.json" for job in jobs}
    finished = {job: read_json(file) for job, file in files.items() if file.exists()}
    save_section(folder, report(args, folder, finished, len(jobs)), args.docs, HEADING)


def results_folder(args: argparse.Namespace) -> Path:
    return Path(args.results or Path(args.output_dir) / "results")


def check_settings(args: argparse.Namespace, folder: Path, results: Path, profile: Profile) -> None:
    """
    Check that the results are of the same study, or record its settings if there are none.

    Raises:
        `ValueError`: If the results are of another profile, seed, model, data, precision or of other versions.
    """
    settings = {
        "profile": asdict(profile),
        "seed": args.seed,
        "bf16": use_bf16(),
        "model": digest_of_checkpoint_weights(args.model),
        "mixture": digest_of_mixture(folder / "mixture"),
        "tests": digest_of_files([folder / "tests.json"]),
        "versions": versions(),
    }
    results.mkdir(parents=True, exist_ok=True)
    if not (results / "settings.json").exists():
        write_json(results / "settings.json", settings)
    found = read_json(results / "settings.json")
    if args.only_report:
        settings |= {"bf16": found["bf16"], "versions": found["versions"]}  # of the trainings, not of the report
    if changes := changed_settings(found, settings):
        raise ValueError(
            f"{results} has the results of other settings: {'; '.join(changes)}. Use the same settings, or choose another folder with "
            "--results."
        )


def start(name: str, folder: Path) -> None:
    """Run a job in its own process, with its output in a log."""
    (folder / "jobs" / name).mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with open(folder / "jobs" / name / "log.txt", "w") as log:
        command = [sys.executable, __file__, *sys.argv[1:], "--job", name]
        code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise RuntimeError(
            f"The job {name} ended with exit code {code}. Its output is in {log.name}. Run the command again to repeat it."
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", required=True, help="folder of the language model to train from")
    parser.add_argument("--data", required=True, help="folder with the files of labelled steps")
    parser.add_argument("--output_dir", required=True, help="folder of all results")
    parser.add_argument("--profile", choices=PROFILES, default="full", help="size of the study (default: full)")
    parser.add_argument("--processes", type=int, default=2, help="jobs at the same time, one thread each (default: 2)")
    parser.add_argument(
        "--seed", type=int, default=42, help="seed of the split, the test rows and the intervals (default: 42)"
    )
    parser.add_argument("--results", help="folder for the scores of finished jobs (default: results in --output_dir)")
    parser.add_argument("--docs", help="page whose section with these results is replaced (default: none)")
    parser.add_argument("--only_report", action="store_true", help="write the report of the jobs that are finished")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    main(parser.parse_args())
