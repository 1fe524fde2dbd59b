"""The demo's report: the page shows every measured number, and works in a real browser."""

import copy
import io
import re
from functools import cache, reduce
from itertools import pairwise
from operator import getitem
from statistics import fmean
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from markupsafe import escape

from trl_hrm.demo import report
from trl_hrm.demo.report import render_report, sections, write_report
from trl_hrm.demo.report_pictures import _caps_picture, band_words, make_pictures, tree_places
from trl_hrm.pages import pictures

from .page_reading import Page
from .report_data import TITLES, VOTE, N, example, quick


HOSTILE = "</style><script>window.hacked=1</script><img src=x onerror=window.hacked=1>'\"&lt; _x $y$"


def blind() -> dict[str, Any]:
    """Return the quick profile with a policy that says "Wait" at random."""
    data = quick(2)
    data["policy"] |= {"correction_rate": 0.26, "spurious_rate": 0.2, "sight": 1.3, "is_sighted": False}
    return data


def two() -> dict[str, Any]:
    """Return measurements of two seeds, which have no interval."""
    return quick(2)


MAKE = {"full": example, "quick": quick, "two": two, "blind": blind}
# drawing the pictures of one set in full size takes seconds, so only one is drawn in the fast tests
DRAWN = ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("quick", "two", "blind"))]


def draw_small(data: dict[str, Any]):
    """Draw small pictures, and only in the light theme. This takes half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "DPI", 20)
        patch.setattr(pictures, "THEMES", {"light": pictures.THEMES["light"]})
        found = make_pictures(data)
    for picture in (one for part in found.values() for one in part):
        picture.images["dark"] = picture.images["light"]
    return found


@cache
def drawn(name: str, is_small: bool = False):
    """Draw the pictures of each set of measurements only once."""
    return (draw_small if is_small else make_pictures)(MAKE[name]())


@cache
def page_text(name: str) -> str:
    return render_report(MAKE[name](), drawn(name))


@cache
def quick_text() -> str:
    """Return the page of the quick profile, with small pictures."""
    return render_report(quick(), drawn("quick", is_small=True))


def bare(data: dict[str, Any]) -> str:
    """Return the page without pictures."""
    return render_report(data, {"first": []})


def share(values) -> str:
    return f"{100 * fmean(values):.1f} % ({100 * min(values):.1f} to {100 * max(values):.1f})"


def signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def leaves(value: Any, path: tuple = ()):
    """Yield the paths of all leaves of the measurements."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*path, key))
    else:
        yield path, value


def changed(data: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(data)
    part = data
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return data


class TestNumbers:
    def test_each_number_of_the_measurements_changes_the_page(self):
        """A table that reads a wrong key or index shows numbers too. Checks the first and last entry of each list."""
        data = example(3)
        before = bare(data)
        places: dict[str, list[tuple]] = {}
        for path, value in leaves(data):
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and path[-1] not in ("parent", "kl_coef")
            ):
                places.setdefault("/".join("#" if isinstance(key, int) else key for key in path), []).append(path)
        silent = set()
        for name, paths in places.items():
            for path in {paths[0], paths[-1]}:
                value = reduce(getitem, path, data)
                other = value + 7 if isinstance(value, int) else value * 1.31 + 0.137
                if bare(changed(data, path, other)) == before:
                    silent.add((name, path == paths[-1]))
        curve = "self_training/runs/#/curve/#"
        assert silent == {
            # pictures show all points of a curve, the page only the last
            *((f"{curve}/{key}", False) for key in ("step", "lm_loss", "kl", "log_kl")),
            *((f"{curve}/{key}", True) for key in ("step", "log_kl")),
            # the table of models lists their seeds; here they say which are compared, and no claim compares the last
            ("wrong_prefix/models/#/seeds/#", True),
        }

    def test_accuracy(self):
        data, page = example(), Page(page_text("full"))
        for number, way in enumerate(("best_of_n", "step_search")):
            table = page.sections["accuracy"].table(number)
            assert list(table)[-2:] == ["majority vote", "pass@N"]
            assert table["majority vote"] == [f"{100 * value:.1f} %" for value in VOTE]
            for model in data[way]["models"]:
                assert table[TITLES[model["name"]]] == [
                    share(values) for values in zip(*model["accuracy"], strict=True)
                ]
        each = page.sections["accuracy"].table(2)
        assert len(each) == 45
        model = data["step_search"]["models"][1]
        assert each["HRM, step search, seed 4"][3] == (
            f"{100 * model['accuracy'][4][3]:.1f} % ({100 * model['interval'][4][3][0]:.1f} to "
            f"{100 * model['interval'][4][3][1]:.1f})"
        )

    def test_gap(self):
        data, section = example(), Page(page_text("full")).sections["gap"]
        model = data["step_search"]["models"][0]
        lost = fmean(accuracy[1] - accuracy[3] for accuracy in model["accuracy"])
        row = section.table()["PRM, step search"]
        assert row == [signed(100 * lost), "+23.2 to +30.8", "4", "6", "0", "0", "0"]
        size, low, high, best, last = model["gap"][3]
        each = section.table(1)["PRM, step search, seed 3"]
        assert each == [signed(100 * size), f"{100 * low:.1f} to {100 * high:.1f}", str(best), str(last), "hacked"]

    def test_wrong_prefix_and_kinds(self):
        data, page = example(), Page(page_text("full"))
        table = page.sections["wrong-prefix"].table()
        accuracy = data["wrong_prefix"]["models"][2]["accuracy"]
        assert table["HRM, first-error labels, steps and pairs"] == [
            share(values) for values in zip(*accuracy, strict=True)
        ]
        one = data["step_kinds"][0]
        assert page.sections["step-kinds"].table()["PRM, first-error labels, single steps"] == [
            f"{fmean(one[key]):.2f} ({min(one[key]):.2f} to {max(one[key]):.2f})"
            for key in ("correction", "locally_right", "new_error", "auroc")
        ]

    def test_depth_cap(self):
        table = Page(page_text("full")).sections["depth-cap"].table()
        assert table["5"] == ["0.700 (1,543)", "0.011 (402)", "0.017 (311)", "0.022 (127)", "36.0 %", "30"]
        assert table["8"][2:] == ["0.784 (311)", "0.022 (127)", "0.1 %", "30"]

    def test_a_kind_of_step_that_does_not_occur(self):
        data = example()
        data["values_by_cap"][0]["correction"] = {"mean": None, "count": 0}
        assert Page(bare(data)).sections["depth-cap"].table()["5"][2] == "– (0)"
        assert (
            "maximum depth 5: correct 0.700, first error 0.011, correction –, "
            in _caps_picture(data["values_by_cap"], data["solution_length"]).text
        )

    def test_calibration(self):
        section = Page(page_text("full")).sections["calibration"]
        assert "ORM, seed 0: expected calibration error 0.263" in section.text
        assert section.tables[0][1:] == [
            ["0 to 0.5", "30", "0.250", "50.0 %"],
            ["0.5 to 0.75", "0", "–", "–"],
            ["0.75 to 1", "10", "0.900", "60.0 %"],
        ]

    def test_self_training(self):
        """Runs of one setting share a row, and the two reductions of the KL never do."""
        data, rows = example(), Page(page_text("full")).sections["lambda"].tables[0]
        assert rows[1] == ["before training", "", "", "–", "–", "61.6 %", "1,000"]
        found = [
            run
            for run in data["self_training"]["runs"]
            if run["kl_coef"] == 0.5 and run["kl_reduction"] == "token_mean"
        ]
        right = [run["accuracy"]["num_right"] / 1000 for run in found]
        last = [run["curve"][-1] for run in found]
        loss, kl = ([point[key] for point in last] for key in ("lm_loss", "kl"))
        assert len(rows) == 9 and rows[8] == [
            "λ = 0.5, log",
            "mean over tokens",
            "3",
            f"{fmean(loss):.4f} ({min(loss):.4f} to {max(loss):.4f})",
            f"{fmean(kl):.3g} ({min(kl):.3g} to {max(kl):.3g})",
            share(right),
            "3,000",
        ]

    def test_eta_in_the_order_of_mean_labels(self):
        data, rows = example(), Page(page_text("full")).sections["eta"].tables[0]
        assert [row[0] for row in rows[1:]] == ["soft", "entropy, η = 2", "entropy, η = 8", "hard"]
        one = data["eta"][2]
        assert rows[3][1:] == ["0.733", "0.825 (0.800 to 0.850)", *map(share, zip(*one["accuracy"], strict=True))]

    def test_hnc(self):
        data, section = example(), Page(page_text("full")).sections["hnc"]
        point = data["hnc"]["comparisons"][1]["difference"][3]
        row = section.table()["HRM + HNC − HRM, 500 steps"]
        assert (
            row[3] == f"{signed(100 * point['mean'])} ({signed(100 * point['low'])} to {signed(100 * point['high'])})"
        )
        each = section.table(1)["HRM + HNC − HRM, 500 steps, seed 3"]
        assert each[3] == signed(100 * point["per_seed"][3])
        assert "HRM (same number of rows) 22,017" in section.text

    def test_without_hnc(self):
        section = Page(quick_text()).sections["hnc"]
        assert "Not measured in this profile" in section.text and section.tables == []

    def test_tree_as_a_table(self):
        rows = Page(page_text("full")).sections["tree"].tables[0]
        assert rows[5] == ["4", "1", "Wait,a:4+3=2", "correction", "0.50", "4", "–"]
        assert rows[9] == ["8", "2", "c:4-3=1 answer 1", "answer", "1.00", "1", "correct"]
        assert len(rows) == 14

    def test_datasets_models_and_cost(self):
        page = Page(page_text("full"))
        assert page.sections["made"].table()["hrm-rows"] == ["the same and merged pairs", "15,321", "15,300", "0.587"]
        models = page.sections["made"].table(1)
        assert models["ORM"][-3:-1] == ["–", "–"]
        assert models["HRM + HNC"] == [
            *("soft", "hnc-rows", "8,423", "0, 1, 2, 3, 4, 5"),
            *("0.917 (0.910 to 0.925)", "0.955 (0.950 to 0.960)", "32.8 (30.2 to 35.2)"),
        ]
        assert page.sections["cost"].table()["annotate"] == ["37.5", "100 trees, 8,211 steps"]
        assert page.sections["cost"].table()["total"] == ["188.8", ""]
        assert page.sections["again"].table()["command"] == ["trl-hrm demo --profile full --seed 42"]
        assert page.sections["again"].table()["trl"] == ["1.16.0"]


class TestPage:
    @pytest.mark.parametrize("name", DRAWN)
    def test_nothing_is_loaded_from_outside(self, name):
        page = Page(page_text(name))
        for tag, attributes in page.elements:
            for key in ("src", "srcset", "href", "data", "action", "poster"):
                assert attributes.get(key, "#").startswith(("data:", "#")), (tag, attributes)
        assert "url(" not in page_text(name) and "@import" not in page_text(name)
        assert {tag for tag, _ in page.elements} & {"script", "iframe", "object", "svg", "form"} == set()

    def test_contents_lead_to_every_section(self):
        page = Page(page_text("full"))
        links = [attributes["href"][1:] for attributes in page.all("a")]
        found = sections(example())
        assert links == [key for key in page.sections if key] == ["claims", *(section.key for section in found)]
        for section in found:
            assert page.sections[section.key].title == section.title

    def test_readable_by_a_screen_reader(self):
        page = Page(page_text("full"))
        images = page.all("img")
        assert len(images) == len({image["alt"] for image in images}) == 18
        assert all(len(image["alt"]) > 60 for image in images)
        assert page.unscoped == 0
        assert page.all("html") == [{"lang": "en"}]
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))

    def test_claims_are_on_the_page(self):
        section = Page(page_text("full")).sections["claims"]
        assert "15 claims: 10 held, 3 not held, 2 open." in section.text
        assert section.table()["λ = 0.5 is the best balance."][:2] == ["HRM", "not held"]

    def test_no_warning_if_the_policy_sees_its_errors(self):
        assert "Warning" not in page_text("full") and "Warning" not in quick_text()

    def test_the_page_opens_with_a_warning_about_a_blind_policy(self):
        """With a blind policy, every table about corrections still has numbers."""
        page = Page(bare(blind()))
        text = " ".join(page.sections[""].text.split())
        assert (
            "it corrects 26.0 % of its errors and 20.0 % of its correct steps. The ratio is 1.3, expected at least 5."
            in text
        )
        assert text.index("Warning") < text.index("is hacked if")

    def test_a_policy_that_is_never_wrong_about_its_errors(self):
        data = example()
        data["policy"] |= {"spurious_rate": 0.0, "sight": None}
        assert "0.0 % of its correct steps." in Page(bare(data)).sections["made"].text

    def test_every_text_is_escaped(self):
        """Names may hold any character. In pictures, a dollar sign starts a formula, and labels that begin with _ are dropped."""
        data = quick()
        for path, _ in leaves(data):
            if path[-1] in (
                "command",
                "date",
                "processor",
                "python",
                "title",
                "what",
                "did",
                "text",
                "problem",
                "torch",
            ):
                data = changed(data, path, HOSTILE)
        text = render_report(data, draw_small(data))
        page = Page(text)
        assert page.all("script") == [] and all(image["src"].startswith("data:") for image in page.all("img"))
        assert escape(HOSTILE) in text


class TestPictures:
    @pytest.mark.parametrize("name, number", [("full", 18), pytest.param("quick", 17, marks=pytest.mark.slow)])
    def test_no_picture_is_empty(self, name, number):
        pictures = [one for part in drawn(name).values() for one in part]
        assert len(pictures) == len({one.name for one in pictures}) == number
        for one in pictures:
            light, dark = (matplotlib.image.imread(io.BytesIO(one.images[theme])) for theme in ("light", "dark"))
            assert light.shape == dark.shape and light.shape[1] >= 800
            assert light[0, 0, :3].mean() > 0.9 and dark[0, 0, :3].mean() < 0.15
            for image in (light, dark):
                drawn_on = np.abs(image[..., :3] - image[0, 0, :3]).max(axis=-1) > 0.1
                assert drawn_on.mean() > 0.01, one.name

    def test_alternative_texts(self):
        (picture,) = drawn("full")["first"]
        assert picture.text.startswith("Accuracy over N. ORM (best-of-N): 63.0 % at N = 1, 35.0 % at N = 64; PRM")
        assert "majority vote: 61.0 % at N = 1, 99.5 % at N = 64" in picture.text

    def test_captions_explain_the_bands(self):
        """The band of one seed and the band of six seeds look alike but mean different things."""
        mixed = example()
        mixed["best_of_n"]["models"][0] = quick()["best_of_n"]["models"][0]
        assert [band_words(data) for data in (quick(), example(), mixed)] == [
            "One seed of each reward model. Bands: 95 % intervals over problems.",
            "Lines: means over reward-model seeds. Bands: from the lowest to the highest seed.",
            "Lines: means over reward-model seeds. Bands: from the lowest to the highest seed, or the 95 % interval over problems if "
            "there is one seed.",
        ]

    def test_without_hnc_there_is_no_picture_of_it(self):
        assert "hnc" not in drawn("quick", is_small=True)

    def test_lambda_has_a_picture_of_kl_and_of_loss_for_each_reduction(self):
        found = drawn("full")["lambda"]
        assert [one.name for one in found] == [
            *("lambda-sum-kl", "lambda-sum-lm-loss", "lambda-token-mean-kl", "lambda-token-mean-lm-loss"),
        ]
        assert "λ = 0.001, no log" in found[0].text and "λ = 0.001, no log" not in found[2].text
        assert all(one.text.count("λ = 0:") == 3 for one in found)

    def test_places_of_a_tree_by_hand(self):
        """Each leaf has its own row, and a parent is centred on its children, even if they come after a later parent's children."""
        assert tree_places([-1, -1, 0, 0, 1, 2]) == [(0, 0.5), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]

    def test_files(self, tmp_path, monkeypatch):
        """The same measurements give the same bytes."""
        monkeypatch.setattr(report, "make_pictures", draw_small)
        files = write_report(quick(), tmp_path / "report.html")
        assert {file.parent for file in files} == {tmp_path / "report_files"}
        assert (tmp_path / "report.html").read_text(encoding="utf-8") == quick_text()
        small = drawn("quick", is_small=True)
        expected = {one.name: one.images["light"] for part in small.values() for one in part}
        assert {file.stem: file.read_bytes() for file in files} == expected


class TestBrowser:
    @pytest.mark.parametrize("name", DRAWN)
    def test_the_first_screen_answers(self, show, name):
        """Without scrolling, a newcomer sees the verdicts, their meaning, and the picture."""
        browser = show(page_text(name), height=800)
        assert browser.texts("h1") == ["Is my reward model being hacked?"]
        last = "no sign of hacking" if name in ("full", "quick") else "not settled"
        assert browser.texts(".first .card .chip") == ["hacked", "hacked", "no sign of hacking", last]
        bottoms = browser.evaluate(
            "[...document.querySelectorAll('.lead, .first .card, .first figure')].map(e => e.getBoundingClientRect().bottom)"
        )
        assert len(bottoms) == 6 and max(bottoms) <= 800
        drawn_images = "[...document.images].filter(image => image.complete && image.naturalWidth >= 800).length"
        assert browser.evaluate(drawn_images) == browser.evaluate("document.images.length")

    def test_the_tree_scrolls_on_a_phone(self, show):
        """Shrunk to the width of a phone, its text would be unreadable."""
        browser = show(page_text("full"), 390, 844)
        widths = "(() => {const box = document.querySelector('.wide picture'); return [box.scrollWidth, box.clientWidth]})()"
        inside, outside = browser.evaluate(widths)
        assert inside >= 860 > 390 > outside


def test_example_is_whole():
    """Code that pairs a curve of the wrong length with another would silently cut it off."""
    data = example()
    for way in ("best_of_n", "step_search"):
        for model in data[way]["models"]:
            assert len(model["seeds"]) == len(model["accuracy"]) == len(model["gap"]) == len(model["verdicts"])
            assert all(len(accuracy) == len(N) for accuracy in model["accuracy"])
