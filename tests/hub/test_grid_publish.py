"""Publish datasets of grid puzzles: all splits and the types of the cells arrive, next to datasets of labelled steps."""

import datasets

from trl_hrm.scripts.build_grid import BuildGridConfig, build_grid

from .publishing import build, card_of, features_of, local, published, push_folders, rows_of


def test_round_trip(hub, repo, tmp_path):
    """Cells as int64, or a missing split of boards with few blanks, would still train."""
    folders = {family: tmp_path / family for family in ("sudoku", "maze")}
    for family, folder in folders.items():
        few = {"num_few_blanks": 4} if family == "sudoku" else {}
        build_grid(
            BuildGridConfig(
                family=family,
                size=9,
                output_dir=str(folder),
                num_train=12,
                num_validation=3,
                num_test=5,
                num_proc=1,
                **few,
            )
        )
    push_folders([*folders.values(), build(tmp_path / "prm", "prm")], repo)
    assert datasets.get_dataset_config_names(repo) == ["maze", "prm", "sudoku"]
    for family, folder in folders.items():
        found, expected = published(repo, family, tmp_path), local(folder)
        assert set(found) == {"train", "validation", "test", *["few_blanks"] * (family == "sudoku")}
        assert rows_of(found) == rows_of(expected)
        assert features_of(found) == features_of(expected)
        assert found["train"].features["puzzle"] == datasets.List(datasets.Value("uint8"))
    card = card_of(repo)
    assert f'dataset = load_dataset("{repo}", "maze")' in card
    assert f"trl-hrm build-grid sudoku --output_dir {folders['sudoku']} --size 9" in card
