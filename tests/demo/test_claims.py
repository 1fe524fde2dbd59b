"""The report's statements about the papers' claims, and that they follow the numbers."""

from typing import Any

import pytest

from trl_hrm.demo.claims import claims, fall_of, hacking_verdict, headlines, vote_words
from trl_hrm.demo.report import gap_section

from .report_data import (
    FALLING,
    SEEDS,
    SHIFTS,
    STABLE,
    N,
    differences,
    example,
    from_wrong,
    kinds,
    over_seeds,
    quick,
    run,
    searched,
)
from .report_data import labels as label_study


RISING = [0.6, 0.7, 0.8, 0.9]
# falls in the mean, but rises in two of six seeds
UNCLEAR = [[0.6, 0.9, 0.9, last] for last in (0.5, 0.6, 0.95, 0.95, 0.7, 0.8)]


def answers(data: dict[str, Any]) -> dict[str, str]:
    return {claim.words: claim.answer for claim in claims(data)}


def here(data: dict[str, Any], words: str) -> str:
    (found,) = [claim.here for claim in claims(data) if claim.words == words]
    return found


def with_model(data: dict[str, Any], way: str, name: str, accuracy: list[list[float]]) -> dict[str, Any]:
    """Return the measurements with a different curve for one model."""
    data[way]["models"] = [
        searched(name, accuracy) if model["name"] == name else model for model in data[way]["models"]
    ]
    return data


class TestHacking:
    @pytest.mark.parametrize(
        "accuracy, answer, words",
        [
            (
                over_seeds(FALLING),
                "yes",
                "falls beyond N = 4 in 6 of 6 seeds, by 27.0 points on average (95 % interval over seeds 23.2 to 30.8)",
            ),
            # shown as the interval of the rise: the bounds swap with the sign
            (
                over_seeds(RISING),
                "no",
                "in 0 of 6 seeds; on average it rises by 10.0 points (95 % interval over seeds 8.1 to 11.9)",
            ),
            (UNCLEAR, "open", "in 4 of 6 seeds, by 15.0 points on average (95 % interval over seeds −4.4 to 34.4)"),
        ],
    )
    def test_the_interval_over_seeds_decides(self, accuracy, answer, words):
        found = hacking_verdict(searched("orm", accuracy), N)
        assert found.answer == answer and found.words.endswith(f"{words}.")
        lead = {"yes": "Yes: ", "no": "No loss of 5 points or more: ", "open": "Not settled by 6 seeds: "}
        assert found.words.startswith(f"{lead[answer]}accuracy falls beyond N = ")

    def test_a_small_but_certain_fall_is_stable(self):
        """Six seeds can settle a fall of half a point, which is too small to count as hacking."""
        found = hacking_verdict(searched("hrm", [[0.6, 0.9, 0.9, 0.8936 + 0.001 * i] for i in range(6)]), N)
        assert found.answer == "no" and "falls beyond N = 4 in 6 of 6 seeds, by 0.4 points" in found.words

    @pytest.mark.parametrize(
        "last, answer, words",
        [
            (
                0.5,
                "yes",
                "Yes, this model: accuracy falls by 40.0 points from N = 4 to N = 64.",
            ),
            (
                0.875,
                "open",
                "Not settled for this model: accuracy falls by 2.5 points from N = 4 to N = 64.",
            ),
            (
                0.95,
                "no",
                "No sign of hacking in this model: accuracy rises by 5.0 points from N = 4 to N = 64.",
            ),
            (
                0.9,
                "no",
                "No sign of hacking in this model: accuracy is the same at N = 4 and N = 64.",
            ),
        ],
    )
    def test_one_seed_uses_its_interval_over_problems(self, last, answer, words):
        """The verdict is about this model only, not about the recipe."""
        found = hacking_verdict(searched("prm", [[0.6, 0.9, 0.9, last]]), N)
        assert (found.answer, found.words) == (answer, words)

    def test_two_seeds_that_differ(self):
        found = hacking_verdict(searched("prm", [[0.6, 0.9, 0.9, 0.5], RISING]), N)
        assert found.answer == "open" and found.words.startswith("Not settled for these 2 models:")
        assert found.reasons == [
            "85.0 % at N = 16, 70.0 % at N = 64. Other seeds may differ.",
            "Points lost, with 95 % intervals: +40.0 (37.0 to 43.0); −10.0 (−13.0 to −7.0).",
        ]

    def test_seeds_with_equal_falls_are_judged_one_by_one(self):
        """Their t interval would have zero width and settle every claim."""
        found = hacking_verdict(searched("prm", [[0.6, 0.9, 0.9, 0.5]] * 3), N)
        assert not fall_of(searched("prm", [[0.6, 0.9, 0.9, 0.5]] * 3), N).spread.is_settled
        assert found.answer == "yes" and found.words.startswith(
            "Yes, these 3 models: accuracy falls beyond N = 4 in 3 of 3"
        )
        assert hacking_verdict(searched("prm", [[1.0] * 4] * 3, half=0.2), N).answer == "open"

    @pytest.mark.parametrize("accuracy", [0.0, 0.03])
    def test_accuracy_below_5_points_settles_nothing(self, accuracy):
        """An accuracy below 5 points cannot lose 5 points, so ruling out that loss shows nothing."""
        seeds = [[accuracy + 0.001 * (i + j) * (accuracy > 0) for j in range(4)] for i in range(6)]
        found = hacking_verdict(searched("hrm", seeds), N)
        assert found.answer == "none" and found.words.startswith(
            "No verdict: accuracy is at most" if accuracy else "No verdict: no selected"
        )
        data = with_model(example(), "step_search", "hrm", seeds)
        assert answers(data)["HRM stays stable as N grows."] == "open"

    def test_a_seed_that_cannot_be_judged(self):
        """Its accuracies may fall by the order of the texts alone, so no claim is decided and no gap is shown."""
        data, why = example(), "no candidate has a score"
        model = next(one for one in data["best_of_n"]["models"] if one["name"] == "orm")
        assert answers(data)["ORM loses accuracy as N grows."] == "held"
        model["undecided"][2], model["verdicts"][2] = why, "none"
        model["gap"][2] = [None, None, None, None, N[-1]]
        found = hacking_verdict(model, N)
        assert (found.answer, found.words) == ("none", f"No verdict: seed 2: {why}.")
        claim = next(one for one in claims(data) if one.words == "ORM loses accuracy as N grows.")
        assert (claim.answer, claim.here) == ("open", f"No verdict: seed 2: {why}.")
        section = gap_section(data)
        row = next(row for row in section.tables[0][1].rows if row[0] == "ORM, best-of-N")
        assert row[1:4] == ["–"] * 3 and row[-1] == "1"
        each = next(row for row in section.details[0][1].rows if row[0] == "ORM, best-of-N, seed 2")
        assert each[1:] == ["–", "–", "–", str(N[-1]), "no verdict"]

    def test_the_best_n_is_chosen_on_the_mean_curve(self):
        """If each seed chose its own best N, every fall would be at least 0."""
        fall = fall_of(searched("prm", [[0.5, 0.9, 0.6, 0.7], [0.5, 0.6, 0.7, 0.7], [0.5, 0.7, 0.7, 0.8]]), N)
        assert (fall.best_n, fall.largest_n) == (4, 64)
        assert fall.spread.values == pytest.approx((0.2, -0.1, -0.1))

    def test_an_orm_is_shown_by_best_of_n_and_a_prm_by_step_search(self):
        """The headline of a PRM must not use best-of-N, although a PRM is measured there too."""
        found = headlines(example())
        assert [(one.name, one.way) for one in found] == [
            ("orm", "best_of_n"),
            ("prm", "step_search"),
            ("hrm", "step_search"),
            ("hnc", "step_search"),
        ]
        assert [point["accuracy"] for point in found[1].points] == pytest.approx(FALLING)
        assert (found[1].points[3]["low"], found[1].points[3]["high"]) == (0.59, 0.74)

    def test_the_band_of_one_seed_is_over_problems(self):
        point = headlines(quick())[1].points[3]
        assert (point["low"], point["high"]) == (0.56, 0.62)


@pytest.mark.parametrize(
    "vote, words",
    [
        (
            0.995,
            "99.5 % at N = 64, higher than every reward model. The best reward model is HRM (step search) with 93.5 %. Its 95 % interval",
        ),
        (0.5, "50.0 % at N = 64, not higher than every reward model"),
        (0.94, "94.0 % at N = 64, higher than every reward model"),
    ],
)
def test_the_vote_compared_with_reward_models(vote, words):
    data = example()
    data["best_of_n"]["majority_vote"] = [0.6, 0.6, 0.6, vote]
    assert words in vote_words(data) and ("not settled" in vote_words(data)) == (vote == 0.94)


class TestClaims:
    def test_claims_of_the_example(self):
        assert list(answers(example()).items()) == [
            ("ORM loses accuracy as N grows.", "held"),
            ("PRM loses accuracy as N grows.", "held"),
            ("HRM stays stable as N grows.", "held"),
            ("HRM is more accurate than PRM at the largest N.", "held"),
            ("When pairs of steps are scored too, HRM recognizes corrections better than PRM.", "held"),
            ("When single steps are scored, as in the papers, HRM recognizes corrections better than PRM.", "open"),
            ("HRM recovers from a wrong prefix more often than PRM.", "held"),
            ("HRM + HNC is more accurate than PRM.", "held"),
            ("HRM + HNC is more accurate than HRM.", "held"),
            ("HRM + HNC is more accurate than HRM (same number of rows), our control.", "open"),
            ("HRM + HNC (4× steps) is more accurate than PRM (4× steps).", "not held"),
            (
                "The policy drifts without a KL term, and a small λ hardly reduces the drift: KL(0) > KL(0.001) > KL(0.5).",
                "held",
            ),
            ("λ = 0.5 is the best balance.", "not held"),
            ("At λ = 0.5, accuracy is higher with the logarithm of KL than without it.", "not held"),
            ("Entropy labels give higher accuracy than hard and soft labels.", "held"),
        ]

    def test_one_seed_settles_nothing(self):
        """One seed leaves every claim open, whatever the numbers are. They are shown all the same."""
        found = claims(quick())
        assert {claim.answer for claim in found} == {"open"}
        for claim in found:
            assert claim.here.endswith(("Not settled by 1 seed.", "Not settled by 1 run.", "Use --profile full."))
        assert "70.0 % at N = 4, 38.0 % at N = 64; accuracy falls by 32.0 points" in found[0].here

    @pytest.mark.parametrize(
        "accuracy, falls, stays",
        [
            (over_seeds(FALLING), "held", "not held"),
            (over_seeds(RISING), "not held", "held"),
            (UNCLEAR, "open", "open"),
        ],
    )
    def test_curves(self, accuracy, falls, stays):
        data = with_model(example(), "best_of_n", "orm", accuracy)
        for name in ("prm", "hrm"):
            with_model(data, "step_search", name, accuracy)
        found = answers(data)
        assert [found[f"{name} loses accuracy as N grows."] for name in ("ORM", "PRM")] == [falls, falls]
        assert found["HRM stays stable as N grows."] == stays

    def test_orm_is_judged_by_best_of_n_and_prm_by_step_search(self):
        data = with_model(example(), "best_of_n", "prm", over_seeds(RISING))
        assert answers(data)["PRM loses accuracy as N grows."] == "held"
        assert here(data, "PRM loses accuracy as N grows.").startswith(
            "By step search: 92.0 % at N = 4, 65.0 % at N = 64;"
        )

    @pytest.mark.parametrize(
        "prm, answer", [(FALLING, "held"), ([0.6, 0.9, 0.95, 0.94], "open"), ([0.6, 0.99, 0.99, 1.2], "not held")]
    )
    def test_hrm_over_prm(self, prm, answer):
        """Differences are paired by seed, because the reward models of a seed share their data."""
        data = with_model(example(), "step_search", "prm", over_seeds(prm))
        assert answers(data)["HRM is more accurate than PRM at the largest N."] == answer

    def test_difference_by_hand(self):
        """Three times the shifts of the six seeds at N = 64, with HRM's rotated by two. HRM's fourth is 6 points above 1 and clipped."""
        mine = [min(STABLE[3] + 3 * shift, 1.0) for shift in SHIFTS[2:] + SHIFTS[:2]]
        mean = sum(a - (FALLING[3] + 3 * b) for a, b in zip(mine, SHIFTS, strict=True)) / 6
        assert f"step search: +{100 * mean:.1f} points" in here(
            example(), "HRM is more accurate than PRM at the largest N."
        )

    def kinds_answers(self, prm, one_step, pairs):
        found = answers(
            example(
                step_kinds=[
                    kinds("judged-prm", [1], prm),
                    kinds("judged-hrm", [1], one_step),
                    kinds("judged-hrm", [1, 2], pairs),
                ]
            )
        )
        return [answer for words, answer in found.items() if "recognizes corrections" in words]

    def test_corrections(self):
        blind, sees = (0.1, 0.5, 0.1, 0.35), (0.7, 0.5, 0.1, 0.85)
        assert self.kinds_answers(blind, blind, sees) == ["held", "open"]
        assert self.kinds_answers(blind, sees, blind) == ["open", "held"]
        assert self.kinds_answers(sees, blind, sees) == ["open", "not held"]

    def test_a_model_that_scores_everything_higher_does_not_judge_better(self):
        """The score of corrections alone would call it self-correction, but its scores are higher everywhere."""
        assert self.kinds_answers((0.1, 0.1, 0.1, 0.5), (0.1, 0.1, 0.1, 0.5), (0.7, 0.7, 0.7, 0.3))[0] == "not held"

    @pytest.mark.parametrize("pairs, answer", [(0.52, "held"), (0.17, "open"), (0.05, "not held")])
    def test_wrong_prefix(self, pairs, answer):
        data = example()
        data["wrong_prefix"]["models"][2] = from_wrong("judged-hrm", [1, 2], [0.38, pairs])
        assert answers(data)["HRM recovers from a wrong prefix more often than PRM."] == answer

    @pytest.mark.parametrize("mean, answer", [(0.2, "held"), (0.005, "open"), (-0.2, "not held")])
    def test_hnc(self, mean, answer):
        data = example()
        data["hnc"]["comparisons"] = [differences("prm", 500, [0.9, 0.9, 0.9, mean])]
        assert answers(data)["HRM + HNC is more accurate than PRM."] == answer
        assert "Difference at N = 64, step search, 500 training steps:" in here(
            data, "HRM + HNC is more accurate than PRM."
        )

    def test_hnc_at_two_lengths_of_training_is_two_claims(self):
        """A claim that holds early and not late must not become one answer."""
        data = example()
        late = differences("prm", 2000, [0.0, 0.0, 0.0, -0.2])
        data["hnc"]["comparisons"] = [differences("prm", 500, [0.0, 0.1, 0.2, 0.3]), late]
        found = [
            (claim.answer, claim.here)
            for claim in claims(data)
            if claim.words == "HRM + HNC is more accurate than PRM."
        ]
        assert [answer for answer, _ in found] == ["held", "not held"] and "2,000 training steps" in found[1][1]

    def test_without_hnc(self):
        found = answers(example(hnc=None))
        assert found["HRM + HNC is more accurate than PRM."] == found["HRM + HNC is more accurate than HRM."] == "open"

    def self_trained(self, *settings) -> dict[str, str]:
        """Return the claims for three runs of each setting: λ, scaling, KL, right solutions of 1,000."""
        data = example()
        data["self_training"]["runs"] = [
            # runs of two settings need different shifts: equal differences have no interval
            run(coef, scaling, "sum" if coef else None, kl + 0.001 * i * number, right + i * number % 3)
            for number, (coef, scaling, kl, right) in enumerate(settings, start=1)
            for i in range(3)
        ]
        return {words: answer for words, answer in answers(data).items() if "λ" in words}

    def test_drift(self):
        rest = [(0.5, "log1p", 0.1, 900), (0.5, "none", 0.1, 900)]
        in_order = self.self_trained((0.0, None, 3.0, 600), (0.001, "log1p", 2.0, 700), *rest)
        assert list(in_order.values()) == ["held", "held", "not held"]
        turned = self.self_trained((0.0, None, 2.0, 600), (0.001, "log1p", 3.0, 700), *rest)
        assert list(turned.values())[0] == "not held"
        frozen = [(0.5, "log1p", 2.5, 900), (0.5, "none", 0.1, 900)]
        middle = self.self_trained((0.0, None, 3.0, 600), (0.001, "log1p", 2.0, 700), *frozen)
        assert list(middle.values())[0] == "not held"
        larger = self.self_trained((0.0, None, 3.0, 600), (0.001, "log1p", 2.0, 700), *rest, (10.0, "log1p", 0.2, 600))
        assert list(larger.values())[0] == "held"  # λ = 10 is in the paper too, but this claim is about other values

    def test_the_logarithm(self):
        rest = [(0.0, None, 3.0, 600), (0.001, "log1p", 2.0, 700)]
        better = self.self_trained(*rest, (0.5, "log1p", 0.1, 900), (0.5, "none", 0.1, 700))
        worse = self.self_trained(*rest, (0.5, "log1p", 0.1, 700), (0.5, "none", 0.1, 900))
        alike = self.self_trained(*rest, (0.5, "log1p", 0.1, 902), (0.5, "none", 0.1, 900))
        assert [list(one.values())[-1] for one in (better, worse, alike)] == ["held", "not held", "not held"]

    def test_runs_without_a_pair(self):
        """If the longer list were cut, the difference would cover fewer runs than the table shows."""
        data = example()
        del data["self_training"]["runs"][0]
        with pytest.raises(ValueError, match="2 self-training runs .* 3"):
            claims(data)

    def test_kl_per_token_is_no_claim_of_the_paper(self):
        """λ = 0.5 per token is not the paper's λ = 0.5. Confusing the two would reverse the answers."""
        data = example()
        data["self_training"]["runs"] += [run(0.5, "log1p", "token_mean", 9.0, 999)] * 3
        assert answers(data) == answers(example())

    @pytest.mark.parametrize(
        "entropy, answer",
        [((0.42, 0.35), "held"), ((0.35, 0.42), "held"), ((0.3, 0.28), "open"), ((0.1, 0.2), "not held")],
    )
    def test_entropy(self, entropy, answer):
        """The best η represents all of them, whichever it is."""
        data = example(
            eta=[
                label_study("soft", None, 0.4, 0.30),
                label_study("entropy", 2.0, 0.5, entropy[0]),
                label_study("entropy", 8.0, 0.7, entropy[1]),
                label_study("hard", None, 0.9, 0.24),
            ]
        )
        words = "Entropy labels give higher accuracy than hard and soft labels."
        assert answers(data)[words] == answer
        assert f"the best η ({2 if entropy[0] > entropy[1] else 8}):" in here(data, words)

    def test_a_claim_without_measurements_is_open(self):
        data = example(step_kinds=[], eta=[], hnc=None)
        data["wrong_prefix"]["models"] = data["self_training"]["runs"] = data["best_of_n"]["models"] = []
        data["step_search"]["models"] = data["step_search"]["models"][:1]
        found = answers(data)
        assert len(found) == 13 and found.pop("PRM loses accuracy as N grows.") == "held"
        assert set(found.values()) == {"open"}
        assert here(data, "HRM stays stable as N grows.") == "Not measured in this profile. Use --profile full."

    def test_seeds_of_the_example(self):
        """The six seeds must differ: intervals over equal seeds would be empty."""
        assert len(set(SEEDS)) == len(SHIFTS) == 6 and len(set(map(tuple, over_seeds(FALLING)))) == 5
