"""Profiles of the demo: sizes, seeds and reward models."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class RewardModel:
    """
    A reward model of the demo.

    Args:
        name (`str`):
            Name in file names.
        title (`str`):
            Name in the report.
        labels (`str`):
            Kind of labels: `"soft"`, `"hard"`, `"entropy"` or `"judged"` (first-error labels).
        data (`str`):
            Name of the training dataset.
        seeds (`tuple[int, ...]`):
            Seeds. One model is trained per seed.
        steps (`int`):
            Number of optimizer steps.
        eta (`float`, *optional*):
            Strength η of the entropy regularization, for `labels="entropy"`.
        is_merged (`bool`, *optional*, defaults to `False`):
            Whether the training data has merged steps, so that the model can score pairs.
        aggregate (`str`, *optional*, defaults to `"min"`):
            How step scores are combined into the score of a solution.
        ranks, searches, corrects (`bool`, *optional*, default to `False`):
            Whether the model is used for best-of-N, for step search, and for tests of corrections.
    """

    name: str
    title: str
    labels: str
    data: str
    seeds: tuple[int, ...]
    steps: int
    eta: float | None = None
    is_merged: bool = False
    aggregate: str = "min"
    ranks: bool = False
    searches: bool = False
    corrects: bool = False

    def runs(self) -> list[tuple[str, int]]:
        """Return the name and the seed of each training run."""
        return [(f"{self.name}-{seed}", seed) for seed in self.seeds]


@dataclass(frozen=True)
class Profile:
    """
    Sizes of a demo.

    Args:
        policy_steps (`int`):
            Number of optimizer steps of the policy.
        num_train, num_test, num_starts (`int`):
            Number of problems to search for labels, to test reward models on, and to solve from a wrong prefix.
        num_judged (`int`):
            Number of problems with first-error labels.
        max_depth (`int`):
            Maximum number of steps in the search for labels.
        caps (`tuple[int, ...]`), num_capped (`int`):
            Other maximum numbers of steps, to compare MC scores, and the number of problems to search with them.
        n, prefix_n (`tuple[int, ...]`):
            Numbers of candidates, from the problem and from a wrong prefix.
        models (`tuple[RewardModel, ...]`):
            Reward models to train.
        etas (`tuple[float, ...]`):
            Values of η for entropy labels.
        again (`bool`):
            Whether to compress nodes by the rule of HRM's code, too, and to search the training problems a second time, for a
            control with as many rows as with node compression.
        self_training (`tuple[dict[str, Any], ...]`), self_training_steps (`int`), self_training_samples (`int`):
            Settings of each self-training run, number of optimizer steps, and number of solutions per test problem after training.
    """

    policy_steps: int
    num_train: int
    num_test: int
    num_starts: int
    num_judged: int
    max_depth: int
    caps: tuple[int, ...]
    num_capped: int
    n: tuple[int, ...]
    prefix_n: tuple[int, ...]
    models: tuple[RewardModel, ...]
    etas: tuple[float, ...]
    again: bool
    self_training: tuple[dict[str, Any], ...]
    self_training_steps: int
    self_training_samples: int


def _models(
    seeds: tuple[int, ...], steps: int, judged: tuple[int, ...], etas: tuple[float, ...], eta_seeds: tuple[int, ...]
) -> tuple[RewardModel, ...]:
    """Return the reward models of every profile."""
    return (
        RewardModel("orm", "ORM", "soft", "orm", seeds, steps, aggregate="last", ranks=True),
        RewardModel("prm", "PRM", "soft", "prm", seeds, steps, ranks=True, searches=True, corrects=True),
        RewardModel(
            "hrm", "HRM", "soft", "hrm", seeds, steps, is_merged=True, ranks=True, searches=True, corrects=True
        ),
        RewardModel("hnc", "HRM + HNC", "soft", "hnc", seeds, steps, is_merged=True, ranks=True, searches=True),
        RewardModel("prm-hard", "PRM, hard labels", "hard", "prm-hard", eta_seeds, steps, ranks=True),
        *(
            RewardModel(
                f"prm-eta{eta:g}",
                f"PRM, entropy labels, η = {eta:g}",
                "entropy",
                f"prm-eta{eta:g}",
                eta_seeds,
                steps,
                eta=eta,
                ranks=True,
            )
            for eta in etas
        ),
        RewardModel("judged-prm", "PRM, first-error labels", "judged", "judged-prm", judged, steps, corrects=True),
        RewardModel(
            "judged-hrm",
            "HRM, first-error labels",
            "judged",
            "judged-hrm",
            judged,
            steps,
            is_merged=True,
            corrects=True,
        ),
    )


def _lambdas(seeds: tuple[int, ...], *studies: tuple[tuple[float, ...], dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return the settings of the self-training runs: every λ of each study with every seed."""
    return tuple(
        {"kl_coef": value, **other, "seed": seed} for values, other in studies for value in values for seed in seeds
    )


QUICK = Profile(
    policy_steps=700,
    num_train=80,
    num_test=40,
    num_starts=40,
    num_judged=300,
    max_depth=6,
    caps=(5,),
    num_capped=40,
    n=(1, 4, 16, 64),
    prefix_n=(1, 16),
    models=_models((0, 1), 100, (0,), (2.0,), (0,)),
    etas=(2.0,),
    again=False,
    self_training=_lambdas((0,), ((0.0, 0.001, 0.5), {})),
    self_training_steps=80,
    self_training_samples=8,
)
_SIX = (0, 1, 2, 3, 4, 5)
_STEPS = 150
_CONVERGED = 600
FULL = Profile(
    policy_steps=900,
    num_train=150,
    num_test=100,
    num_starts=100,
    num_judged=400,
    max_depth=7,
    caps=(5, 6, 8),
    num_capped=40,
    n=(1, 2, 4, 16, 64),
    prefix_n=(1, 4, 16),
    models=(
        *_models(_SIX, _STEPS, _SIX[:3], (-2.0, 2.0, 8.0), _SIX[:3]),
        RewardModel(
            "hnc-per-child",
            "HRM + HNC (per child)",
            "soft",
            "hnc-per-child",
            _SIX,
            _STEPS,
            is_merged=True,
            searches=True,
        ),
        RewardModel("control", "HRM (two searches)", "soft", "control", _SIX, _STEPS, is_merged=True, searches=True),
        *(
            RewardModel(
                f"{name}-long",
                f"{title} ({_CONVERGED // _STEPS}× steps)",
                "soft",
                name,
                _SIX,
                _CONVERGED,
                is_merged=name == "hnc",
                searches=True,
            )
            for name, title in (("prm", "PRM"), ("hnc", "HRM + HNC"))
        ),
    ),
    etas=(-2.0, 2.0, 8.0),
    again=True,
    self_training=_lambdas(
        (0, 1, 2),
        ((0.0, 0.001, 0.01, 0.1, 0.5, 10.0), {}),
        ((0.001, 0.5), {"kl_scaling": "none"}),
        ((0.1, 0.5, 10.0), {"kl_reduction": "token_mean"}),
    ),
    self_training_steps=120,
    self_training_samples=8,
)
SMOKE = replace(
    QUICK,
    policy_steps=600,
    num_train=8,
    num_test=6,
    num_starts=6,
    num_judged=8,
    num_capped=4,
    n=(1, 4),
    prefix_n=(1,),
    models=_models((0,), 4, (0,), (2.0,), (0,)),
    self_training_steps=4,
    self_training_samples=2,
)
PROFILES = {"smoke": SMOKE, "quick": QUICK, "full": FULL}
