"""The training command: its settings files, the models that it creates, and a training from a folder."""

import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from trl_hrm.reasoning import HrmGridForSolving
from trl_hrm.scripts.train_grid import ScriptArguments, main, make_parser
from trl_hrm.scripts.training import short_help

from .grids import sudoku_rows


ROOT = Path(__file__).resolve().parents[2]
RECIPES = [
    ROOT / "recipes" / "reasoning" / f"{name}.yaml"
    for name in ("sudoku_extreme", "sudoku_full", "maze_hard", "arc1", "arc2")
]
SMALL = [
    "--hidden_size",
    "16",
    "--num_attention_heads",
    "2",
    "--H_layers",
    "1",
    "--L_layers",
    "1",
    "--halt_max_steps",
    "3",
]
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with 20 training puzzles and 6 validation puzzles."""
    for split, num, seed in (("train", 20, 0), ("validation", 6, 1)):
        sudoku_rows(num, seed).to_json(tmp_path / "data" / f"{split}.jsonl")
    return tmp_path / "data"


def parse(*args: str):
    return make_parser().parse_args_and_config(list(args))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_strictly(path):
    """A key that is not an argument is an error, because it would have no effect. The reader must know where a value is from."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    holders = parse("--config", str(path), *ON_CPU)
    for key in values.keys() - {"bf16"}:
        found = getattr(next(one for one in holders if hasattr(one, key)), key)
        assert getattr(found, "value", found) == values[key], key
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.search(r"  # (paper|code|ours)\b", line)] == []


def test_lengths_of_the_papers():
    """The number of steps in the comments: 20,000 epochs of 1,000 puzzles with 768 slots are 26,041 steps."""
    values = yaml.safe_load(RECIPES[0].read_text(encoding="utf-8"))
    assert values["num_train_epochs"] * 1000 // (values["per_device_train_batch_size"] * 8) == 26_041


@pytest.mark.parametrize(
    ("path", "weights"), [(RECIPES[0], 27_275_266), (RECIPES[1], 27_275_266 + 82 * 512)], ids=["1k", "full"]
)
def test_models_of_the_recipes(path, weights):
    """The published size. The file for all puzzles adds learned positions."""
    import torch

    rows = Dataset.from_list([{"family": "sudoku", "height": 9, "width": 9}])
    with torch.device("meta"):
        model = HrmGridForSolving(parse("--config", str(path), *ON_CPU)[0].make_config(rows))
    assert sum(p.numel() for name, p in model.named_parameters() if not name.startswith("puzzle_emb")) == weights


def test_boards_come_from_the_dataset():
    rows = Dataset.from_list([{"family": "maze", "height": 7, "width": 9}])
    config = ScriptArguments("data", system="trm", hidden_size=32, L_cycles=4).make_config(rows)
    assert (config.height, config.width, config.vocab["name"], config.vocab_size) == (7, 9, "maze", 6)
    assert (config.tie_modules, config.H_cycles, config.L_cycles, config.hidden_size) == (True, 3, 4, 32)
    for data, message in [
        (Dataset.from_list([{"prompt": "1+1"}]), "columns prompt. Expected puzzles"),
        (Dataset.from_list([{"family": "chess", "height": 8, "width": 8}]), "family of the puzzles is 'chess'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ScriptArguments("data").make_config(data)
    for system, options, name in [
        ("loop", {"H_cycles": 3}, "H_cycles"),
        ("loop", {"L_cycles": 8}, "L_cycles"),
        ("one_pass", {"halt_max_steps": 8}, "halt_max_steps"),
        ("one_pass_deep", {"H_cycles": 2, "halt_max_steps": 8}, "halt_max_steps"),
    ]:
        # ignored cycles, or one pass that would be the loop under another name
        with pytest.raises(ValueError, match=f"`{name}` is ., but the system {system} is a control with `{name}=1`"):
            ScriptArguments("data", system=system, **options).make_config(rows)
    assert (
        ScriptArguments("data", system="one_pass_deep", H_cycles=3, halt_max_steps=1).make_config(rows).H_layers
        == 3 * 12
    )
    with pytest.raises(ValueError, match="`num_attention_heads` has no effect with `mixer=mlp`"):
        ScriptArguments("data", system="trm_mlp", num_attention_heads=4).make_config(rows)
    with pytest.raises(ValueError, match="`hidden_size` would have no effect"):
        ScriptArguments("data", model_name_or_path="model", hidden_size=64).make_config(rows)


def test_plan(folder, capsys):
    """It must print the steps without training, and without writing a model."""
    output = folder.parent / "out"
    args = ["--dataset_name", str(folder), "--output_dir", str(output), *ON_CPU, *SMALL, "--report_to", "none"]
    main(*parse(*args, "--num_train_epochs", "6", "--per_device_train_batch_size", "4", "--plan", "true"))
    printed = capsys.readouterr().out
    assert (
        "rows:    20" in printed and "steps:   30, one segment" in printed and "slots:   4 (batch 4 × 1 × 1" in printed
    )
    assert not list(output.glob("*.safetensors"))


def test_trains_and_trains_further(folder, capsys):
    """From a folder of `build-grid` to a model that is evaluated, saved and trained further."""
    output = folder.parent / "out"
    args = ["--dataset_name", str(folder), *ON_CPU, "--max_steps", "4", "--per_device_train_batch_size", "4"]
    args += [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--save_strategy",
        "no",
        "--report_to",
        "none",
        "--warmup_steps",
        "0",
    ]
    main(*parse(*args, "--output_dir", str(output), *SMALL, "--system", "trm"))
    config = HrmGridForSolving.from_pretrained(output).config
    assert config.tie_modules and config.num_prefix_tokens == 16 and config.halt_max_steps == 3
    results = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))
    assert {"eval_exact_accuracy", "eval_cell_accuracy", "eval_exact_accuracy_choose_by_q"} <= results.keys()
    card = (output / "README.md").read_text(encoding="utf-8")
    assert (
        "solves sudoku puzzles of 4 x 4 cells" in card
        and "exact accuracy" in card
        and "trust_remote_code=True" in card
    )
    assert "Known failures" in card and "| `tie_modules` | True |" in card and "adam_atan2" in card
    main(*parse(*args, "--output_dir", str(folder.parent / "more"), "--model_name_or_path", str(output)))
    assert HrmGridForSolving.from_pretrained(folder.parent / "more").config.tie_modules
    with pytest.raises(FileExistsError, match="would be replaced"):
        main(*parse(*args, "--output_dir", str(output), "--model_name_or_path", str(output)))


def test_short_help():
    """`trl-hrm train-grid --help` must describe the options without importing torch."""
    import trl_hrm.scripts.train_grid as module

    text = short_help(module, "trl-hrm train-grid")
    assert "--halt_exploration_prob" in text and "--dataset_name" in text and "--system" in text
