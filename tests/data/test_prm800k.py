"""PRM800K records: every rule on hand-written records, and whole files against a slow plain count."""

import json
from collections import Counter

import pytest
from datasets import load_dataset

from trl_hrm.data.build import Dropped
from trl_hrm.data.build_config import BuildPRM800KConfig
from trl_hrm.data.prm800k import build_prm800k, parse_prm800k


def candidate(text, rating, flagged=False):
    return {"text": text, "rating": rating, "flagged": flagged}


def step(*candidates, chosen=None, human=None):
    if isinstance(human, str):
        human = {"text": human, "rating": None, "source": "human", "flagged": False}
    return {"completions": list(candidates), "chosen_completion": chosen, "human_completion": human}


def record(*steps, finish_reason="solution", problem="1+2+3?", **other):
    question = {"problem": problem, "ground_truth_answer": "6"}
    return {"question": question, "label": {"steps": list(steps), "finish_reason": finish_reason}} | other


def parse(*steps, neutral=0.0, **options):
    """Return the tree as `(text, label, parent)` triples, and the notes."""
    notes = Counter()
    tree = parse_prm800k(record(*steps, **options), "file:1", notes, neutral)
    return list(zip(tree.completions, tree.labels, tree.parents, strict=True)), +notes


def test_chosen_step_continues_and_the_others_are_leaves():
    steps = [
        step(candidate("a", 1), candidate("b", -1), chosen=0),
        step(candidate("c", 0), candidate("d", 1), chosen=1),
        step(candidate("e\n\n# Answer\n\n6", 1), chosen=0),
    ]
    nodes, notes = parse(*steps)
    assert nodes == [
        ("a", 1.0, -1),
        ("b", 0.0, -1),
        ("c", 0.0, 0),
        ("d", 1.0, 0),
        ("e\n\n# Answer\n\n6", 1.0, 3),
    ]
    assert not notes


@pytest.mark.parametrize(
    ("neutral", "label"), [("negative", 0.0), ("positive", 1.0), ("drop", None), ("0.3", 0.3), (0.5, 0.5), (1, 1.0)]
)
def test_neutral_policy(neutral, label):
    config = BuildPRM800KConfig(inputs=["none"], output_dir="out", neutral=neutral)
    nodes, _ = parse(
        step(candidate("a", 0), chosen=0), step(candidate("b", 1), chosen=0), neutral=config.neutral_label
    )
    assert nodes == [("a", label, -1), ("b", 1.0, 0)]


@pytest.mark.parametrize("neutral", ["maybe", "1.5", -0.1, "nan"])
def test_neutral_policy_out_of_range(neutral):
    with pytest.raises(ValueError, match="'negative', 'positive', 'drop'"):
        BuildPRM800KConfig(inputs=["none"], output_dir="out", neutral=neutral)


def test_human_step_continues_and_is_positive():
    """Without it, all later steps would follow a rejected candidate or be lost."""
    nodes, notes = parse(step(candidate("a", -1), human=" h "), step(candidate("b", 1), chosen=0))
    assert nodes == [("a", 0.0, -1), ("h", 1.0, -1), ("b", 1.0, 1)]
    assert notes == {"human_completions": 1}


@pytest.mark.parametrize(("corrected", "label"), [(-1, 0.0), (0, 0.3), (1, 1.0), (None, 1.0)])
def test_corrected_rating_of_a_human_step(corrected, label):
    human = {"text": "h", "rating": None, "source": "human", "flagged": False, "corrected_rating": corrected}
    nodes, _ = parse(step(candidate("a", -1), human=human), step(candidate("b", 1), chosen=0), neutral=0.3)
    assert nodes == [("a", 0.0, -1), ("h", label, -1), ("b", 1.0, 1)]


def test_human_step_without_candidates():
    """In phase 2, the completions of a step may be null."""
    nodes, _ = parse(step(human="h") | {"completions": None}, step(candidate("b", 1), chosen=0))
    assert nodes == [("h", 1.0, -1), ("b", 1.0, 0)]


def test_chosen_wins_over_an_abandoned_human_fragment():
    nodes, notes = parse(step(candidate("a", 1), chosen=0, human="fragm"), step(candidate("b", 1), chosen=0))
    assert nodes == [("a", 1.0, -1), ("b", 1.0, 0)]
    assert notes == {"ignored_human_completions": 1}


def test_unrated_steps_are_context_where_needed_and_pruned_elsewhere():
    """Reading a null as 0 would give a negative label."""
    nodes, notes = parse(
        step(candidate("a", None), candidate("x", None), chosen=0),
        step(candidate("b", -1), chosen=0),
        step(candidate("y", None), chosen=0),
    )
    assert nodes == [("a", None, -1), ("b", 0.0, 0)]
    assert notes == {"pruned_steps": 2}


def test_flagged_candidates_have_no_label():
    nodes, notes = parse(
        step(candidate("a", 1, flagged=True), candidate("x", -1, flagged=True), chosen=0),
        step(candidate("b", 1, flagged=None), chosen=0),
    )
    assert nodes == [("a", None, -1), ("b", 1.0, 0)]
    assert notes == {"flagged_candidates": 2, "pruned_steps": 1}


def test_equal_candidates_are_one_step():
    nodes, notes = parse(
        step(candidate("a", 1), candidate(" a", -1), candidate("b", 1), candidate("b", 1), chosen=1),
        step(candidate("c", 1), chosen=0),
    )
    assert nodes == [("a", 0.5, -1), ("b", 1.0, -1), ("c", 1.0, 0)]
    assert notes == {"duplicate_candidates": 2, "contradicting_labels": 1}


def test_empty_texts():
    """A solution that continued after an empty step has lost its history."""
    nodes, notes = parse(step(candidate(" ", -1), candidate("a", 1), chosen=1), step(candidate("b", 1), chosen=0))
    assert nodes == [("a", 1.0, -1), ("b", 1.0, 0)]
    assert notes == {"empty_candidates": 1}
    nodes, notes = parse(step(candidate("", 1), candidate("a", -1), chosen=0), step(candidate("b", 1), chosen=0))
    assert nodes == [("a", 0.0, -1)]
    assert notes == {"empty_candidates": 1, "steps_after_end": 1}


def test_found_error_ends_with_rejected_candidates():
    nodes, _ = parse(
        step(candidate("a", 1), chosen=0), step(candidate("b", -1), candidate("c", -1)), finish_reason="found_error"
    )
    assert nodes == [("a", 1.0, -1), ("b", 0.0, 0), ("c", 0.0, 0)]


@pytest.mark.parametrize("reason", ["give_up", "bad_problem", "other", None])
def test_other_finish_reasons_are_dropped(reason):
    with pytest.raises(Dropped, match=f"^finish_reason={reason}$"):
        parse_prm800k(record(finish_reason=reason) | {"question": {}}, "file:1", Counter())


def test_screening_records():
    first = record(step(candidate("a", 1), chosen=0), is_initial_screening_question=True)
    assert parse_prm800k(first, "file:1", Counter()).completions == ["a"]
    with pytest.raises(Dropped, match="^screening$"):
        parse_prm800k(first, "file:1", Counter(), drop_screening=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"label": {}}, "file:1: the key `question` is missing, found ['label']"),
        ({"question": {}, "label": {"steps": []}}, "`label`: the key `finish_reason` is missing"),
        ({"question": {}, "label": {"finish_reason": "solution", "steps": []}}, "`question`: the key `problem` is"),
        (record() | {"label": {"finish_reason": "solution"}}, "`label`: the key `steps` is missing"),
        (record("a"), "`label.steps[0]`: found 'a'"),
        (record({}), "`label.steps[0]`: the key `chosen_completion` is missing, found []"),
        (record(step(candidate("a", 1), chosen=1)), "`chosen_completion` is 1"),
        (record(step(candidate("a", 1), chosen="0")), "`chosen_completion` is '0'"),
        (record(step(candidate("a", 1), chosen=True)), "`chosen_completion` is True"),
        (record(step({"text": "a"}, chosen=0)), "`label.steps[0]`: `completions[0]`: the key `rating` is missing"),
        (record(step(candidate(None, 1))), "`completions[0]`: `text` is None"),
        (record(step(candidate("a", 2))), "`completions[0]`: `rating` is 2"),
        (record(step(candidate("a", 1.5))), "`completions[0]`: `rating` is 1.5"),
        (record(step(human={"text": "a", "corrected_rating": 5})), "`human_completion`: `corrected_rating` is 5"),
        (record(step(candidate("a", 1)), problem=" "), "`prompt`"),
    ],
)
def test_faults_are_named(value, message):
    with pytest.raises(ValueError) as error:
        parse_prm800k(value, "file:1", Counter())
    assert str(error.value).startswith("file:1: ")
    assert message in str(error.value)


def test_one_faulty_record_does_not_stop_a_build(tmp_path):
    """The invalid record is counted and named. `strict` raises at it, and so does a file with no valid record."""
    good = record(step(candidate("a", 1), chosen=0))
    lines = [good, record({}), good, record(step(candidate("b", 1)), problem=" ")]
    file = tmp_path / "phase.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = build_prm800k(BuildPRM800KConfig(inputs=[file], output_dir=str(tmp_path / "out"), test_size=0))
    assert (report["records_in"], report["records_kept"]) == (4, 2)
    assert report["dropped"] == {"blank_prompt": 1, "not_the_schema": 1}
    for start in (f"(not the schema): {file}:2: `label.steps[0]`", f"(blank prompt): {file}:4. The first: {file}:4: "):
        assert any(warning.startswith(f"1 row dropped {start}") for warning in report["warnings"])
    with pytest.raises(ValueError, match="phase.jsonl:2: `label.steps"):
        build_prm800k(BuildPRM800KConfig(inputs=[file], output_dir=str(tmp_path / "strict"), test_size=0, strict=True))
    file.write_text('{"prompt": "q"}\n' * 3)
    with pytest.raises(
        ValueError,
        match="0 of 3 records.*phase.jsonl:1: .*`question`",
    ):
        build_prm800k(BuildPRM800KConfig(inputs=[file], output_dir=str(tmp_path / "other"), test_size=0))


def test_views_of_a_file(tmp_path):
    """Check a record's full expansion in every view, read back with `load_dataset`."""
    steps = [
        step(candidate("a", 1), candidate("b", 0), chosen=0),
        step(candidate("c", -1), candidate("d # Answer 6", 1), chosen=1),
    ]
    file = tmp_path / "phase1.jsonl"
    file.write_text(json.dumps(record(*steps)) + "\n")
    tree = {
        "prompt": "1+2+3?",
        "completions": ["a", "b", "c", "d # Answer 6"],
        "labels": [1.0, 0.5, 0.0, 1.0],
        "parents": [-1, -1, 0, 0],
        "answer": "6",
        "finish_reason": "solution",
    }
    pairs = {
        "completions": tree["completions"] + ["a | c", "a | d # Answer 6"],
        "labels": tree["labels"] + [0.0, 1.0],
        "parents": tree["parents"] + [-1, -1],
        "num_merged": [1, 1, 1, 1, 2, 2],
    }
    flat = {key: value for key, value in tree.items() if key != "parents"}
    expected = {
        "tree": [tree],
        "hrm": [tree | pairs],
        "prm": [
            flat | {"completions": ["b"], "labels": [0.5]},
            flat | {"completions": ["a", "c"], "labels": [1.0, 0.0]},
            flat | {"completions": ["a", "d # Answer 6"], "labels": [1.0, 1.0]},
        ],
        "orm": [flat | {"completions": ["a", "d # Answer 6"], "labels": [None, 1.0]}],
    }
    for view, rows in expected.items():
        options = {"view": view, "test_size": 0, "neutral": 0.5}
        options |= {"merge_separator": " | "} if view == "hrm" else {}
        report = build_prm800k(BuildPRM800KConfig(inputs=file, output_dir=str(tmp_path / view), **options))
        dataset = load_dataset(str(tmp_path / view), cache_dir=str(tmp_path / "cache"))
        assert list(dataset) == ["train"]
        found = dataset["train"].to_list()
        ids = {row.pop("problem_id") for row in found}
        assert found == rows
        assert len(ids) == 1
        assert report["notes"] == ({"left_out_paths": 2} if view == "orm" else {})


@pytest.fixture(scope="module")
def phase1(shared_data):
    return shared_data / "prm800k" / "phase1_test.jsonl"


def plain_counts(file, neutral) -> Counter:
    """A slow count of single and merged steps by label. It shares no code with the builder."""
    labels = {1: 1.0, 0: neutral, -1: 0.0, None: None}
    counts = Counter()
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
        data = json.loads(line)["label"]
        if data["finish_reason"] not in ("solution", "found_error"):
            continue
        for depth, one in enumerate(data["steps"]):
            rated = {}
            for given in one["completions"] or []:
                if not given["flagged"]:
                    rated.setdefault(given["text"].strip(), []).append(labels[given["rating"]])
            if one["chosen_completion"] is None and one["human_completion"] is not None:
                human = one["human_completion"]
                rated.setdefault(human["text"], []).append(labels[human.get("corrected_rating") or 1])
            for text, values in rated.items():
                if text and None not in values:
                    counts["single", sum(values) / len(values)] += 1
                    counts["merged", sum(values) / len(values)] += depth > 0
            if (
                one["chosen_completion"] is not None
                and not one["completions"][one["chosen_completion"]]["text"].strip()
            ):
                break
    return counts


@pytest.mark.parametrize(
    ("prm800k", "neutral", "single", "merged"),
    [
        # In the 18 kept records, 3 steps written by people and 39 candidates are positive. 28 candidates and the human step
        # whose corrected rating is -1 are negative, 7 are neutral, and one text is rated both 1 and -1. 15, 4, 3 and 1 of
        # them are first steps, which are never merged with an earlier step.
        ("prm800k", "negative", {"0.00": 29 + 7, "0.50": 1, "1.00": 42, "null": 1}, {"0.00": 25 + 4, "1.00": 27}),
        ("prm800k", "positive", {"0.00": 29, "0.50": 1, "1.00": 42 + 7, "null": 1}, {"0.00": 25, "1.00": 27 + 4}),
        ("prm800k", "0.5", {"0.00": 29, "0.50": 1 + 7, "1.00": 42, "null": 1}, {"0.00": 25, "0.50": 4, "1.00": 27}),
        # Two of the neutral steps were chosen: they are context. The other five are pruned.
        ("prm800k", "drop", {"0.00": 29, "0.50": 1, "1.00": 42, "null": 1 + 2}, {"0.00": 25, "1.00": 27}),
        # The 90 solution records rate 1310 candidates -1, 724 of them 0 and 1861 of them 1; 4 have no rating. 173 of
        # their steps were written by people: 170 positive, and 3 whose corrected rating is -1. So -1 occurs at
        # 1310 + 3 = 1313 steps, 0 at 724 and 1 at 1861 + 170 = 2031.
        # All except first steps have a previous step and give one pair each: 1288 + 3 = 1291 rated -1,
        # 653 rated 0, 1751 + 165 = 1916 rated 1.
        ("phase1_test", "negative", {"0.00": 1313 + 724, "1.00": 2031}, {"0.00": 1291 + 653, "1.00": 1916}),
        ("phase1_test", "positive", {"0.00": 1313, "1.00": 2031 + 724}, {"0.00": 1291, "1.00": 1916 + 653}),
        ("phase1_test", "0.5", {"0.00": 1313, "0.50": 724, "1.00": 2031}, {"0.00": 1291, "0.50": 653, "1.00": 1916}),
        # Every chosen step is rated 1 here, so dropped neutral steps are rejected candidates and never context.
        ("phase1_test", "drop", {"0.00": 1313, "1.00": 2031}, {"0.00": 1291, "1.00": 1916}),
    ],
    indirect=["prm800k"],
)
def test_labels_of_a_file(tmp_path, prm800k, neutral, single, merged):
    options = {"view": "hrm", "test_size": 0, "neutral": neutral}
    report = build_prm800k(BuildPRM800KConfig(inputs=prm800k, output_dir=str(tmp_path / "out"), **options))
    assert report["labels"] == {"train": {"merged": merged, "single": single}}
    assert report["labelled_steps"] == sum(single.values()) + sum(merged.values()) - single.get("null", 0)
    # The rows must agree with the report and with a plain count of the file.
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    found = Counter()
    for row in rows:
        for label, count in zip(row["labels"], row["num_merged"], strict=True):
            if label is not None:
                found["merged" if count == 2 else "single", label] += 1
    assert found == plain_counts(prm800k, {"negative": 0.0, "positive": 1.0, "0.5": 0.5, "drop": None}[neutral])


KEPT = {"prm800k": (21, 18), "phase1_test": (106, 90)}  # records read and kept
DROPPED = {
    "prm800k": {"finish_reason=bad_problem": 1, "finish_reason=give_up": 2},
    "phase1_test": {"finish_reason=give_up": 16},
}
NOTES = {
    "prm800k": {
        "contradicting_labels": 1,
        "duplicate_candidates": 2,
        "empty_candidates": 2,
        "flagged_candidates": 2,
        "human_completions": 4,
        "ignored_human_completions": 1,
        # the flagged candidates, and a chosen one without a rating that ends its solution
        "pruned_steps": 3,
        "steps_after_end": 1,
    },
    # 4 flagged candidates of the solved records are unrated, and pruned. 173 human steps continue. In 3 other steps a
    # candidate was chosen later, and the human text is a fragment.
    "phase1_test": {
        "flagged_candidates": 4,
        "pruned_steps": 4,
        "human_completions": 173,
        "ignored_human_completions": 3,
    },
}


@pytest.mark.parametrize(
    ("prm800k", "view", "rows", "labelled", "left_out"),
    [
        ("prm800k", "tree", 18, 79, 0),
        # One path per leaf: of 80 steps, 33 have a step after them.
        ("prm800k", "prm", 80 - 33, 120, 0),
        # 23 leaves state an answer. Of the 24 others, 3 are the only leaves of their records, which are dropped.
        ("prm800k", "orm", 23, 23, 21),
        # One row per record that was solved.
        ("phase1_test", "tree", 90, 4068, 0),
        # One path per leaf. Of 4068 steps, those with a next step are not leaves: k - 1 in a solution of k steps.
        # The 90 solutions have 1507 steps, so 1417 inner ones, and 4068 - 1417 = 2651 leaves.
        ("phase1_test", "prm", 2651, 37933, 0),
        # 270 leaves state an answer under "# Answer". The others end before it.
        ("phase1_test", "orm", 270, 270, 2381),
    ],
    indirect=["prm800k"],
)
def test_rows_of_a_file(tmp_path, prm800k, view, rows, labelled, left_out):
    report = build_prm800k(
        BuildPRM800KConfig(inputs=[prm800k], output_dir=str(tmp_path / "out"), view=view, test_size=0)
    )
    num_in, num_kept = KEPT[prm800k.stem]
    dropped, notes = Counter(DROPPED[prm800k.stem]), Counter(NOTES[prm800k.stem])
    if view == "orm":
        notes["left_out_paths"] = left_out
        if prm800k.stem == "prm800k":  # one of the three ends early, at an empty step
            num_kept, dropped["no_labelled_final_step"] = num_kept - 3, 3
            notes -= Counter(["empty_candidates", "steps_after_end"])
    assert (report["records_in"], report["records_kept"]) == (num_in, num_kept)
    assert report["dropped"] == dropped
    assert report["rows"] == {"train": rows}
    assert report["labelled_steps"] == labelled
    assert report["notes"] == notes


def test_real_file_paths_by_a_plain_count(phase1):
    """Recompute the numbers of the test above from the lengths of the paths."""
    paths, steps, answers = 0, 0, Counter()
    for line in phase1.read_text(encoding="utf-8").split("\n")[:-1]:
        data = json.loads(line)["label"]
        if data["finish_reason"] != "solution":
            continue
        for depth, one in enumerate(data["steps"], 1):
            last = depth == len(data["steps"])
            for i, given in enumerate(one["completions"]):
                if given["rating"] is not None and (last or i != one["chosen_completion"]):
                    paths, steps = paths + 1, steps + depth
                    answers[given["rating"]] += "# Answer" in given["text"]
    assert (paths, steps) == (2651, 37933)
    assert answers == {1: 169, 0: 11, -1: 90}  # docs/deviations.md


def test_real_exclusion(tmp_path, shared_data, phase1):
    """PRM800K's test problems are MATH500. Excluding it leaves nothing, and the message must say why."""
    exclude = [str(shared_data / "math500" / "test.jsonl")]
    with pytest.raises(ValueError, match=r"0 of 106 records.*excluded: 90, finish_reason=give_up"):
        build_prm800k(BuildPRM800KConfig(inputs=[phase1], output_dir=str(tmp_path / "out"), exclude=exclude))
    assert not list(tmp_path.iterdir())


def test_exclusion_of_every_problem(tmp_path, prm800k):
    """Excluding PRM800K's own problems leaves nothing, and the message must say why."""
    num_in, num_kept = KEPT[prm800k.stem]
    with pytest.raises(ValueError, match=rf"{num_in} records .*dropped: excluded: {num_kept}, finish_reason="):
        build_prm800k(BuildPRM800KConfig(inputs=[prm800k], output_dir=str(tmp_path / "out"), exclude=[str(prm800k)]))
    assert not list(tmp_path.iterdir())


def test_screening_records_of_a_file(tmp_path, prm800k):
    """The hand-written file has one record of quality control and one of initial screening, the real one has none."""
    report = build_prm800k(
        BuildPRM800KConfig(inputs=[prm800k], output_dir=str(tmp_path / "out"), test_size=0, drop_screening=True)
    )
    dropped = DROPPED[prm800k.stem] | ({"screening": 2} if prm800k.stem == "prm800k" else {})
    assert report["dropped"] == dropped
    reasons = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))["finish_reason"]
    expected = {"solution": 13, "found_error": 3} if prm800k.stem == "prm800k" else {"solution": 90}
    assert Counter(reasons) == expected


def test_phase_2_sample(tmp_path, shared_data):
    """Six records of both phases, one per finish reason and special case. See the file."""
    file = shared_data / "samples" / "prm800k.jsonl"
    report = build_prm800k(BuildPRM800KConfig(inputs=[file], output_dir=str(tmp_path / "out"), test_size=0))
    assert (report["records_in"], report["records_kept"]) == (6, 5)
    assert report["dropped"] == {"finish_reason=give_up": 1}
    reasons = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))["finish_reason"]
    assert Counter(reasons) == {"solution": 4, "found_error": 1}
    dropped = build_prm800k(
        BuildPRM800KConfig(inputs=[file], output_dir=str(tmp_path / "less"), test_size=0, drop_screening=True)
    )
    assert dropped["dropped"] == {"finish_reason=give_up": 1, "screening": 1}
