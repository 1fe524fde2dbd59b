"""Hand-written measurements of the demo, in the format of `report.json`."""

import statistics
from typing import Any

from trl_hrm.evaluation.reward_hacking import hacking_answer


N = [1, 4, 16, 64]
SEEDS = [0, 1, 2, 3, 4, 5]
SHIFTS = [-0.02, 0.01, 0.0, 0.03, -0.01, -0.01]  # how far each of six seeds is from the given values
VOTE = [0.61, 0.83, 0.985, 0.995]
PASS = [0.62, 0.98, 1.0, 1.0]
FALLING = [0.61, 0.92, 0.80, 0.65]
STABLE = [0.62, 0.93, 0.945, 0.94]
TITLES = {
    "orm": "ORM",
    "prm": "PRM",
    "hrm": "HRM",
    "hnc": "HRM + HNC",
    "prm-hard": "PRM, hard labels",
    "control": "HRM (same number of rows)",
    "prm-long": "PRM (4× steps)",
    "hnc-long": "HRM + HNC (4× steps)",
    "judged-prm": "PRM, first-error labels",
    "judged-hrm": "HRM, first-error labels",
}


def over_seeds(values: list[float], num_seeds: int = 6, turn: int = 0) -> list[list[float]]:
    """Return a curve for each seed. Seeds differ more at larger N and agree at N = 1. `turn` rotates the shifts."""
    shifts = SHIFTS[turn:] + SHIFTS[:turn]
    return [[round(min(value + i * shift, 1.0), 4) for i, value in enumerate(values)] for shift in shifts[:num_seeds]]


def searched(name: str, accuracy: list[list[float]], half: float = 0.03) -> dict[str, Any]:
    """Return a model of `best_of_n` or `step_search`, with gaps and verdicts derived from its accuracies."""
    gaps, verdicts = [], []
    for one in accuracy:
        best = max(range(len(one) - 1), key=one.__getitem__)
        size = round(one[best] - one[-1], 4)
        low, high = round(size - half, 4), round(size + half, 4)
        gaps.append([size, low, high, N[best], N[-1]])
        verdicts.append(hacking_answer(low, high))
    return {
        "name": name,
        "seeds": SEEDS[: len(accuracy)],
        "accuracy": accuracy,
        "interval": [[[round(value - half, 4), round(value + half, 4)] for value in one] for one in accuracy],
        "verdicts": verdicts,
        "undecided": [None] * len(accuracy),
        "gap": gaps,
    }


def model(name: str, num_seeds: int = 6) -> dict[str, Any]:
    """Return a reward model."""
    has_steps = name != "orm"
    seeds = SEEDS[:num_seeds]
    return {
        "name": name,
        "title": TITLES[name],
        "labels": "judged" if name.startswith("judged") else "soft",
        "data": f"{name}-rows",
        "rows": 8123 + 100 * len(name),
        "seeds": seeds,
        "auroc": [0.91 + 0.003 * seed for seed in seeds] if has_steps else [None] * num_seeds,
        "first_error_auroc": [0.95 + 0.002 * seed for seed in seeds] if has_steps else [None] * num_seeds,
        "seconds": [30.25 + seed for seed in seeds],
    }


def kinds(name: str, spans: list[int], means: tuple[float, ...], num_seeds: int = 6) -> dict[str, Any]:
    """Return the scores of steps after an error."""
    keys = ("correction", "locally_right", "new_error", "auroc")
    values = {
        # seeds of two models need different shifts: equal differences have no interval
        key: [curve[1] for curve in over_seeds([mean, mean], num_seeds, len(spans) + 2 * name.endswith("hrm"))]
        for key, mean in zip(keys, means, strict=True)
    }
    return {"name": name, "title": TITLES[name], "spans": spans, "seeds": SEEDS[:num_seeds], **values}


def from_wrong(name: str, spans: list[int], accuracy: list[float], num_seeds: int = 6) -> dict[str, Any]:
    """Return a search from a wrong prefix."""
    return {
        "name": name,
        "title": TITLES[name],
        "spans": spans,
        "seeds": SEEDS[:num_seeds],
        "accuracy": over_seeds(accuracy, num_seeds, len(spans)),
    }


def cap(depth: int, correction: float | None, unfinished: float) -> dict[str, Any]:
    """Return the values under a depth cap."""
    return {
        "cap": depth,
        "correction": {"mean": correction, "count": 0 if correction is None else 311},
        "locally_right": {"mean": 0.022, "count": 127},
        "first_error": {"mean": 0.011 if depth == 5 else 0.539, "count": 402},
        "right": {"mean": 0.7 if depth == 5 else 0.87, "count": 1543},
        "unfinished": unfinished,
        "num_problems": 30,
    }


def run(kl_coef: float, scaling: str | None, reduction: str | None, kl: float, right: int) -> dict[str, Any]:
    """Return a self-training run."""
    curve = [
        {
            "step": step,
            "lm_loss": 0.077 - 0.009 * kl**0.5 * step / 150,
            "kl": kl * step / 150,
            "log_kl": kl * step / 200,
        }
        for step in (0, 50, 100, 150)
    ]
    return {
        "kl_coef": kl_coef,
        "kl_scaling": scaling,
        "kl_reduction": reduction,
        "curve": curve,
        "accuracy": {"num_right": right, "num_samples": 1000},
    }


def runs() -> list[dict[str, Any]]:
    """Return three runs of each setting."""
    settings = [
        (0.0, None, None, 2.85, 915),
        (0.001, "log1p", "sum", 2.11, 932),
        (0.001, "none", "sum", 1.59, 927),
        (0.5, "log1p", "sum", 0.004, 624),
        (0.5, "none", "sum", 0.0041, 621),
        (0.001, "log1p", "token_mean", 2.7, 918),
        (0.5, "log1p", "token_mean", 0.9, 905),
    ]
    return [
        run(coef, scaling, reduction, kl * (1 + 0.02 * i), right + (3 * i * number) % 11)
        for number, (coef, scaling, reduction, kl, right) in enumerate(settings, start=1)
        for i in range(3)
    ]


def labels(name: str, eta: float | None, mean_label: float, last: float, num_seeds: int = 6) -> dict[str, Any]:
    """Return a reward model of the study of η."""
    return {
        "labels": name,
        "eta": eta,
        "mean_label": mean_label,
        "seeds": SEEDS[:num_seeds],
        "auroc": [0.8 + 0.01 * seed for seed in SEEDS[:num_seeds]],
        "accuracy": over_seeds([0.6, 0.8, 0.7, last], num_seeds, len(name) // 2),
    }


def differences(other: str, steps: int, means: list[float], name: str = "hnc") -> dict[str, Any]:
    """Return the difference between a model and another, seed by seed."""
    points = []
    for mean in means:
        values = [round(mean + shift, 4) for shift in SHIFTS]
        middle, half = statistics.fmean(values), 2.571 * statistics.stdev(values) / 6**0.5
        points.append({"mean": middle, "low": middle - half, "high": middle + half, "per_seed": values})
    return {"a": name, "b": other, "steps": steps, "difference": points}


def node(parent: int, text: str, value: float | None, count: int, kind: str, correct: bool | None = None) -> dict:
    """Return a node of the tree."""
    return {"parent": parent, "text": text, "value": value, "count": count, "kind": kind, "correct": correct}


TREE = [
    node(-1, "# Step 1\na:4+3=2", 0.75, 12, "right"),
    node(-1, "# Step 1\na:1+3=4", 0.25, 8, "first_error"),
    node(0, "# Step 2\nb:2*2=4", 0.83, 6, "right"),
    node(0, "# Step 2\nb:1*2=2", 0.5, 6, "first_error"),
    node(1, "# Step 2\nWait,a:4+3=2", 0.5, 4, "correction"),
    node(1, "# Step 2\nb:4*2=3", 0.0, 2, "locally_right"),
    node(1, "# Step 2\nb:3*2=1", 0.0, 2, "new_error"),
    node(3, "# Step 3\nWait,b:2*2=4", 0.9, 3, "correction"),
    node(2, "# Step 3\nc:4-3=1\n\n# Answer\n1\n# END!", 1.0, 1, "answer", True),
    node(5, "# Step 3\nc:3-3=0\n\n# Answer\n0\n# END!", 0.0, 1, "answer", False),
    node(7, "# Step 4\nc:4-3=1", 0.9, 2, "right"),
    node(6, "# Step 3\nc:1-3=3", None, 1, "locally_right"),
    node(5, "# Step 3\nc:4-3=1", 1.0, 1, "lucky"),
]


def example(num_seeds: int = 6, **changes: Any) -> dict[str, Any]:
    """Return measurements of the full profile. `changes` replace top-level values."""
    return {
        "profile": "full",
        "command": "trl-hrm demo --profile full --seed 42",
        "date": "2026-11-21",
        "seed": 42,
        "versions": {"trl_hrm": "0.1.0", "torch": "2.13.0", "trl": "1.16.0"},
        "machine": {"cores": 2, "processor": "a processor", "python": "3.11.9"},
        "problems": {"train": 101, "test": 203, "policy": 20000},
        "policy": {
            "accuracy": 0.612,
            "slip_rate": 0.187,
            "correction_rate": 0.418,
            "spurious_rate": 0.022,
            "sight": 19.0,
            "num_solutions": 2000,
            "is_sighted": True,
        },
        "datasets": [
            {
                "name": "prm-rows",
                "what": "every step with its MC value",
                "rows": 8211,
                "labels": 8200,
                "mean_label": 0.613,
            },
            {
                "name": "hrm-rows",
                "what": "the same and merged pairs",
                "rows": 15321,
                "labels": 15300,
                "mean_label": 0.587,
            },
        ],
        "models": [model(name, num_seeds) for name in TITLES],
        "n": N,
        "best_of_n": {
            "aggregate": {"orm": "last", "prm": "min", "hrm": "min", "hnc": "min"},
            "majority_vote": VOTE,
            "pass_at_n": PASS,
            "models": [
                searched("orm", over_seeds([0.63, 0.69, 0.51, 0.35], num_seeds, 1)),
                searched("prm", over_seeds([0.61, 0.82, 0.80, 0.79], num_seeds)),
                searched("hrm", over_seeds([0.61, 0.84, 0.85, 0.83], num_seeds)),
                searched("prm-hard", over_seeds([0.61, 0.80, 0.77, 0.70], min(num_seeds, 3))),
            ],
        },
        "step_search": {
            "models": [
                searched("prm", over_seeds(FALLING, num_seeds)),
                searched("hrm", over_seeds(STABLE, num_seeds, 2)),
                searched("hnc", over_seeds([0.63, 0.87, 0.90, 0.87], num_seeds, 3)),
                searched("prm-long", over_seeds([0.63, 0.90, 0.91, 0.89], num_seeds, 4)),
            ]
        },
        "wrong_prefix": {
            "num_problems": 150,
            "n": [1, 16],
            "models": [
                from_wrong("judged-prm", [1], [0.37, 0.17], num_seeds),
                from_wrong("judged-hrm", [1], [0.37, 0.18], num_seeds),
                from_wrong("judged-hrm", [1, 2], [0.38, 0.52], num_seeds),
                from_wrong("prm", [1], [0.37, 0.41], num_seeds),
            ],
        },
        "step_kinds": [
            kinds("judged-prm", [1], (0.08, 0.5, 0.03, 0.35), num_seeds),
            kinds("judged-hrm", [1], (0.08, 0.52, 0.08, 0.35), num_seeds),
            kinds("judged-hrm", [1, 2], (0.72, 0.55, 0.1, 0.82), num_seeds),
        ],
        "values_by_cap": [cap(5, 0.017, 0.36), cap(6, 0.571, 0.12), cap(8, 0.784, 0.001)],
        "solution_length": 5,
        "calibration": [
            {
                "name": name,
                "seed": 0,
                "bins": [
                    {"low": 0.0, "high": 0.5, "count": 30, "mean_score": 0.25, "share_right": 0.5},
                    {"low": 0.5, "high": 0.75, "count": 0, "mean_score": None, "share_right": None},
                    {"low": 0.75, "high": 1.0, "count": 10, "mean_score": 0.9, "share_right": right},
                ],
                "ece": (30 * 0.25 + 10 * abs(0.9 - right)) / 40,
            }
            for name, right in (("orm", 0.6), ("prm", 0.8))
        ],
        "self_training": {
            "reference_accuracy": {"num_right": 616, "num_samples": 1000},
            "num_trajectories": 2000,
            "num_different": 451,
            "runs": runs(),
        },
        "eta": [
            labels("soft", None, 0.412, 0.30, num_seeds),
            labels("entropy", 2.0, 0.518, 0.42, num_seeds),
            labels("entropy", 8.0, 0.733, 0.35, num_seeds),
            labels("hard", None, 0.951, 0.24, num_seeds),
        ],
        "hnc": {
            "seeds": SEEDS,
            "n": N,
            "rows": {"prm": 8211, "hrm": 15321, "hnc": 22017, "control": 22017},
            "comparisons": [
                differences("prm", 500, [0.02, 0.28, 0.36, 0.29]),
                differences("hrm", 500, [0.02, 0.08, 0.19, 0.20]),
                differences("control", 500, [0.0, 0.02, 0.03, 0.01]),
                differences("prm", 500, [0.0, 0.1, 0.1, -0.1], "hrm"),
                differences("prm-long", 2000, [0.0, 0.0, -0.01, -0.02], "hnc-long"),
            ],
        },
        "tree": {"problem": "Start with 4. a+3 b*2 c-3. Work modulo 5.", "nodes": TREE},
        "stages": [
            {"name": "policy", "seconds": 151.25, "did": "2,000 steps on 20,000 problems"},
            {"name": "annotate", "seconds": 37.5, "did": "100 trees, 8,211 steps"},
        ],
        "total_seconds": 188.75,
        **changes,
    }


def quick(num_seeds: int = 1, **changes: Any) -> dict[str, Any]:
    """Return measurements of the quick profile: one or two seeds, one run of each λ, no HNC."""
    found = example(num_seeds, profile="quick", command="trl-hrm demo", hnc=None)
    found["self_training"]["runs"] = found["self_training"]["runs"][::3]
    return found | changes
