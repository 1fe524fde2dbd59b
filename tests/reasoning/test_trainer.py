"""The trainer: losses by hand, splits of the slots, the puzzle embedding, evaluation, and rows that it refuses."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from trl_hrm.reasoning import MAZE_VOCAB, HrmGridForSolving, HRMReasoningConfig, HRMReasoningTrainer, predict
from trl_hrm.reasoning.halting import continue_target, exploration_minimum, halt
from trl_hrm.reasoning.losses import act_loss
from trl_hrm.reasoning.optim import AdamAtan2
from trl_hrm.training.model_card import metrics_at
from trl_hrm.training.safe_training import DivergedError

from .grids import grid_config, grid_model, grid_trainer, sudoku_rows


def weights(trainer: HRMReasoningTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# Seeds with puzzles that halt at different steps
@pytest.mark.parametrize(("system", "seed"), [("hrm", 4), ("trm", 2), ("loop", 4)])
def test_against_a_plain_loop(tmp_path, system, seed):
    """A step must train one segment of each puzzle from the states of the last step, with the sum of the losses over 4 slots."""
    rows = sudoku_rows(6)
    trainer = grid_trainer(tmp_path, grid_model(system, seed), rows, max_steps=5, per_device_train_batch_size=4)
    model = HrmGridForSolving(trainer.model.config)
    model.load_state_dict(trainer.model.state_dict())
    trainer.train()

    config, logged = model.config, [log for log in trainer.state.log_history if "loss" in log]
    table = model.puzzle_emb.weight
    optimizer = AdamAtan2([p for p in model.parameters() if p is not table], lr=3e-3, weight_decay=0.1)
    orders = [np.random.default_rng([42, 0, epoch]).permutation(6) for epoch in range(4)]
    puzzles, labels = torch.tensor(rows["puzzle"][:]), torch.tensor(rows["solution"][:])
    refills, steps, taken = [0] * 4, torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    z_H, z_L = (z.clone() for z in model.initial_state(4))
    halted = torch.ones(4, dtype=torch.bool)
    for step in range(5):
        for slot in halted.nonzero().flatten().tolist():
            epoch, place = divmod(refills[slot] * 4 + slot, 6)
            taken[slot] = int(orders[epoch][place])
            refills[slot] += 1
            steps[slot] = 0
            z_H[slot], z_L[slot] = (z[0] for z in model.initial_state(1))
        steps = steps + 1
        out = model(puzzles[taken], torch.zeros(4, dtype=torch.long), z_H, z_L)
        z_H, z_L = out.z_H.clone(), out.z_L.clone()
        q_continue, target = (out.q_continue_logits, None) if config.continue_head else (None, None)
        if config.continue_head:
            with torch.no_grad():
                after = model(puzzles[taken], torch.zeros(4, dtype=torch.long), z_H, z_L)
            target = continue_target(steps, after.q_halt_logits, after.q_continue_logits, 3)
        losses = act_loss(out.logits, labels[taken], out.q_halt_logits, q_continue, target)
        loss = losses.loss.sum() / 4
        assert logged[step]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        minimum = exploration_minimum(42, torch.arange(4), step, 0.5, 3)
        halted = halt(steps, out.q_halt_logits, q_continue, 3, minimum)
        optimizer.zero_grad()
        loss.backward()
        gradient, table.grad = table.grad[0].clone(), None
        optimizer.step()
        with torch.no_grad():
            table[0] = table[0] * (1 - 3e-3 * 0.1) - 3e-3 * gradient.sign()
    assert_close(weights(trainer), {name: p.detach() for name, p in model.named_parameters()}, 1e-6)
    assert logged[-1]["num_puzzles"] == sum(refills) > 8 and len({*refills}) > 1


@pytest.mark.parametrize(("system", "cycles"), [("hrm", {}), ("trm", {"H_cycles": 2, "L_cycles": 1})])
def test_splits(tmp_path, system, cycles):
    """8x1, 4x2 and 1x8: losses that are averaged per batch, or slots that move between batches, give other weights."""
    runs = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        model = grid_model(system, num_puzzle_ids=4, **cycles)
        model.puzzle_index = {f"task{i}": i + 1 for i in range(3)}
        trainer = grid_trainer(
            tmp_path / str(batch),
            model,
            sudoku_rows(20, puzzle_ids=3),
            max_steps=10,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="adamw",
        )
        trainer.train()
        runs.append((weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    assert runs[0][0]["puzzle_emb.weight"].shape == (4, 16)
    for found, losses in runs[1:]:
        assert_close(found, runs[0][0], 1e-5)
        assert losses == pytest.approx(runs[0][1], abs=1e-5)


def test_puzzle_embedding(tmp_path):
    """Only the rows of ids in the batch move, by the learning rate. The blank id never does."""
    rows = sudoku_rows(8, puzzle_ids=5)
    trainer = grid_trainer(
        tmp_path,
        rows=rows,
        max_steps=1,
        per_device_train_batch_size=3,
        puzzle_learning_rate=0.25,
        puzzle_weight_decay=0.0,
    )
    assert trainer.model.puzzle_index == {f"task{i}": i + 1 for i in range(5)}
    trainer.train()
    used = trainer.slots.parts[0].puzzle_ids.tolist()
    table = trainer.model.puzzle_emb.weight
    assert 0 < len(set(used)) < 5 and 0 not in used
    assert (table[sorted(set(used))].abs() == 0.25).all()
    assert (table[[i for i in range(6) if i not in used]] == 0).all()


def test_epochs_of_the_papers(tmp_path):
    """20 rows, 8 slots: 5 epochs are ⌊5 · 20 / 8⌋ = 12 steps, as 20,000 epochs of 1,000 rows with 768 slots are 26,041."""
    trainer = grid_trainer(tmp_path, max_steps=-1, num_train_epochs=5)
    trainer.train()
    assert trainer.state.global_step == 12
    assert trainer.state.epoch == pytest.approx(12 * 8 / 20)
    short = grid_trainer(tmp_path / "short", max_steps=-1, num_train_epochs=0.1)
    with pytest.raises(ValueError, match="less than one step of 8 slots"):
        short.train()


def test_it_learns(tmp_path):
    """The toy is solved in 120 steps. Without carried states, or with labels of other rows, it is not."""
    trainer = grid_trainer(
        tmp_path,
        grid_config(mixer="mlp", mixer_intermediate_size=32, hidden_size=32, continue_head=False),
        sudoku_rows(300),
        sudoku_rows(60, seed=1),
        max_steps=120,
        per_device_train_batch_size=32,
    )
    before = trainer.evaluate()["eval_exact_accuracy"]
    trainer.train()
    metrics = trainer.evaluate()
    assert before < 0.1 and metrics["eval_exact_accuracy"] > 0.8 and metrics["eval_cell_accuracy"] > 0.95
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert {
        "lm_loss",
        "q_halt_loss",
        "exact_accuracy",
        "cell_accuracy",
        "mean_segments",
        "segments_per_second",
    } <= last.keys()
    assert "q_continue_loss" not in last and 1 <= last["mean_segments"] <= 3


def test_metrics(tmp_path):
    """The metrics are computed from `predict` over all rows, also if the last batch is not full."""
    rows = sudoku_rows(10, seed=5, blanks=1)
    trainer = grid_trainer(
        tmp_path, eval_rows={"a": rows, "b": rows.select(range(3))}, per_device_eval_batch_size=4, eval_segments=2
    )
    trainer.train()
    metrics = trainer.evaluate()
    answers = predict(trainer.model, rows, segments=2).answers[-1]
    right = answers == np.array(rows["solution"][:])
    assert metrics["eval_a_exact_accuracy"] == pytest.approx(right.all(1).mean())
    assert metrics["eval_a_cell_accuracy"] == pytest.approx(right.mean())
    assert metrics["eval_b_cell_accuracy"] == pytest.approx(right[:3].mean())
    assert trainer.evaluate("b")["eval_cell_accuracy"] == pytest.approx(right[:3].mean())
    with pytest.raises(ValueError, match="'c' is not the name of an evaluation dataset. The names are 'a', 'b'"):
        trainer.evaluate("c")
    output = trainer.predict(rows)
    assert np.array_equal(output.predictions, answers) and np.array_equal(output.label_ids, rows["solution"][:])
    assert output.metrics["test_cell_accuracy"] == pytest.approx(right.mean())


def test_ema(tmp_path):
    """The average must be evaluated and saved, and the training must continue with the trained weights."""
    rows = sudoku_rows(12, seed=1)
    plain = grid_trainer(tmp_path / "plain", eval_rows=rows, max_steps=4)
    average = {name: p.clone() for name, p in weights(plain).items()}
    options = {"eval_rows": rows, "max_steps": 4, "ema": 0.5, "eval_strategy": "steps", "eval_steps": 2}
    averaged = grid_trainer(tmp_path / "average", save_strategy="steps", save_steps=4, **options)
    for step in range(1, 5):
        one = grid_trainer(tmp_path / f"{step}", max_steps=step)
        one.train()
        for name, p in weights(one).items():
            average[name].lerp_(p, 0.5)
    average["puzzle_emb.weight"] = weights(one)["puzzle_emb.weight"]
    averaged.train()
    assert_close(weights(averaged), average, 1e-6)
    saved = HrmGridForSolving.from_pretrained(tmp_path / "average" / "checkpoint-4")
    assert_close({name: p.detach() for name, p in saved.named_parameters()}, average, 1e-6)
    last = [log for log in averaged.state.log_history if "eval_cell_accuracy" in log][-1]
    assert averaged.evaluate()["eval_cell_accuracy"] == last["eval_cell_accuracy"]


def test_another_dataset_is_not_on_the_card(tmp_path):
    rows = sudoku_rows(12, seed=1, blanks=3)
    trainer = grid_trainer(tmp_path, eval_rows=rows.select(range(4)))
    expected = trainer.evaluate()["eval_cell_accuracy"]
    assert trainer.evaluate(rows)["eval_cell_accuracy"] != expected
    assert metrics_at(trainer, 0)[""]["cell_accuracy"] == expected


def test_best_checkpoint(tmp_path):
    """With `ema`, the weights of the best checkpoint are averages, which the last average must not replace."""
    trainer = grid_trainer(
        tmp_path,
        eval_rows=sudoku_rows(30, seed=1, blanks=3),
        max_steps=6,
        ema=0.9,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="cell_accuracy",
    )
    trainer.train()
    metrics = [log["eval_cell_accuracy"] for log in trainer.state.log_history if "eval_cell_accuracy" in log]
    assert trainer.state.best_metric == max(metrics)
    assert trainer.evaluate()["eval_cell_accuracy"] == pytest.approx(max(metrics))
    trainer.save_model()
    saved = HrmGridForSolving.from_pretrained(tmp_path)
    best = HrmGridForSolving.from_pretrained(trainer.state.best_model_checkpoint)
    assert_close(dict(saved.named_parameters()), dict(best.named_parameters()), 0)


def test_easier_share(tmp_path):
    """Filled blanks must be right, at least one must stay, and the other puzzles must not change."""
    rows = sudoku_rows(40)
    trainer = grid_trainer(tmp_path, rows=rows, max_steps=1, per_device_train_batch_size=40, easier_share=0.5)
    trainer.train()
    batch = trainer.slots.parts[0]
    blanks = (batch.puzzle == 1).sum(1)
    assert ((batch.puzzle == 1) | (batch.puzzle == batch.labels)).all()
    assert 10 < (blanks == 8).sum() < 30 and blanks.min() >= 1


def test_a_diverged_training_stops(tmp_path):
    trainer = grid_trainer(tmp_path, learning_rate=1e30, weight_decay=0.0)
    with pytest.raises(DivergedError, match="NaN or infinite"):
        trainer.train()


def changed(rows: Dataset, index: int, **values) -> Dataset:
    found = rows.to_list()
    found[index] |= values
    return Dataset.from_list(found)


def test_rows_that_are_refused(tmp_path):
    """Each would train on wrong boards, or fail later without naming the row."""
    rows = sudoku_rows(4)
    solution = rows[2]["solution"]
    other = [5 if cell == 2 else cell for cell in solution]
    given = next(i for i, cell in enumerate(rows[2]["puzzle"]) if cell > 1)
    wrong = [*solution]
    wrong[given] = 2 if wrong[given] != 2 else 3
    cases = [
        (rows.select([]), "`train_dataset` has no rows"),
        (rows.remove_columns("solution"), "no column 'solution'"),
        (Dataset.from_list([row | {"puzzle_id": 7} for row in rows]), "`puzzle_id` has the type int64. Expected texts"),
        (Dataset.from_list([row | {"puzzle_id": ["a"]} for row in rows]), "`puzzle_id` has the type list<.*string>. Expected texts"),
        (changed(rows, 1, family="maze"), "row 1: found a puzzle of the family 'maze', but the vocabulary of the model is for 'sudoku'"),
        (changed(rows, 3, height=2, width=8), "row 3: found a board of 2 x 8 cells"),
        (changed(rows, 2, puzzle=[1] * 9), "row 2: found 9 cells in `puzzle`, expected 16"),
        (changed(rows, 2, puzzle=[None, *rows[2]["puzzle"][1:]]), "has missing values in the column `puzzle`"),
        (changed(rows, 2, puzzle=[1.5, *rows[2]["puzzle"][1:]]), r"it has the type list<.*double> instead of a list of integers"),
        (Dataset.from_list([row | {"solution": [*map(str, row["solution"])]} for row in rows]), "type list<.*string> instead"),
        (changed(rows, 1, puzzle=[9] * 16), r"row 1: found an id from 9 to 9 in `puzzle`.*0 to 5"),
        (changed(rows, 0, solution=[0] * 16), "row 0: the solution has only padding"),
        (changed(rows, 2, solution=wrong), f"row 2: the solution contradicts the given cell in row {given // 4 + 1}, column {given % 4 + 1}"),
        (changed(rows, 1, puzzle=[1] * 16, solution=[1, *solution[1:]]), "row 1: the solution leaves a blank at the cell in row 1, column 1"),
        (
            changed(changed(rows, 2, puzzle=[1] * 16), 3, puzzle=[1] * 16, solution=other),
            "rows 2 and 3: found the same puzzle with different solutions",
        ),
    ]  # fmt: skip
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            grid_trainer(tmp_path, rows=data)
    with pytest.raises(ValueError, match=r"eval_dataset\['hard'\].*has no rows"):
        grid_trainer(tmp_path, rows=rows, eval_rows={"hard": rows.select([])})
    with pytest.raises(TypeError, match="must be a `datasets.Dataset`"):
        grid_trainer(tmp_path, rows=rows.to_iterable_dataset())


def test_unknown_puzzle_ids_are_refused(tmp_path):
    """The original evaluates unknown ids with the blank vector, with which it solves nothing."""
    rows = sudoku_rows(6, puzzle_ids=2)
    trainer = grid_trainer(tmp_path, rows=rows)
    with pytest.raises(ValueError, match="1 puzzle ids that the model does not know, such as 'new'"):
        trainer.evaluate(changed(rows, 0, puzzle_id="new"))
    trainer.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="such as 'new'"):
        grid_trainer(tmp_path, str(tmp_path / "model"), changed(rows, 0, puzzle_id="new"))
    assert grid_trainer(tmp_path, str(tmp_path / "model"), rows).model.puzzle_index == {"task0": 1, "task1": 2}


def test_rows_without_ids(tmp_path):
    """A missing id is the blank id, in training and in an evaluation. A column of only missing ids has the type null."""
    rows = changed(sudoku_rows(4, puzzle_ids=2), 1, puzzle_id=None)
    trainer = grid_trainer(tmp_path, rows=rows, max_steps=1)
    assert trainer.model.puzzle_index == {"task0": 1, "task1": 2}
    assert trainer.rows.puzzle_ids.tolist() == [1, 0, 1, 2]
    none = Dataset.from_list([row | {"puzzle_id": None} for row in sudoku_rows(3, seed=1)])
    for data in (rows, none):
        assert 0 <= trainer.evaluate(data)["eval_cell_accuracy"] <= 1
    assert grid_trainer(tmp_path, rows=none).model.config.num_puzzle_ids == 1


def test_a_path_of_pathlib(tmp_path):
    grid_model().save_pretrained(tmp_path / "model")
    trainer = grid_trainer(tmp_path, tmp_path / "model")
    assert_close(weights(trainer), dict(grid_model().named_parameters()), 0)


def test_puzzle_ids_keep_the_attention(tmp_path):
    """A config that is written and read again has lost `attn_implementation`. The config of the caller must not change."""
    config = grid_config(attn_implementation="eager")
    trainer = grid_trainer(tmp_path, config, sudoku_rows(4, puzzle_ids=2))
    assert (trainer.model.config._attn_implementation, config.num_puzzle_ids) == ("eager", 1)


def test_arguments_that_are_refused(tmp_path):
    rows = sudoku_rows(4)
    for model, error, message in [
        (7, TypeError, "`model` is a `int`"),
        (HrmGridForSolving(grid_config()).bfloat16(), ValueError, "not in float32"),
    ]:
        with pytest.raises(error, match=message):
            grid_trainer(tmp_path, model)
    for name in ("puzzle_learning_rate", "puzzle_weight_decay"):
        with pytest.raises(ValueError, match=f"`{name}` is 0.1, but the model has no puzzle embedding"):
            grid_trainer(tmp_path, grid_config(puzzle_emb_dim=0), **{name: 0.1})
    maze = [row | {"family": "maze", "puzzle": row["solution"]} for row in rows]
    with pytest.raises(ValueError, match="only Sudoku puzzles can be made easier"):
        grid_trainer(tmp_path, grid_config(vocab=None, vocab_size=6), Dataset.from_list(maze), easier_share=0.1)


def test_solutions_that_move_walls_are_refused(tmp_path):
    """The answer of another maze would be trained on. Paths only replace free cells."""
    puzzle, solution = (MAZE_VOCAB.encode(text) for text in ("S  G\n####\n####\n####", "SooG\n####\n####\n####"))
    row = {"height": 4, "width": 4, "family": "maze", "puzzle_id": ""}
    row |= {"puzzle": sum(puzzle, []), "solution": sum(solution, [])}
    config = grid_config(vocab=MAZE_VOCAB)
    assert grid_trainer(tmp_path, config, Dataset.from_list([row])).rows.family == "maze"
    wrong = [*row["solution"]]
    wrong[6] = 5
    with pytest.raises(ValueError, match="row 0: the solution contradicts the given cell in row 2, column 3"):
        grid_trainer(tmp_path, config, Dataset.from_list([row | {"solution": wrong}]))


def test_an_optimizer_before_the_training(tmp_path):
    """Outside of `train`, the puzzle embedding requires a gradient, and would be in two groups."""
    trainer = grid_trainer(tmp_path)
    optimizer = trainer.create_optimizer()
    assert [len(group["params"]) for group in optimizer.param_groups][1:] == [1]
    trainer.train()
    expected = grid_trainer(tmp_path / "usual")
    expected.train()
    assert_close(weights(trainer), weights(expected), 0)


def test_cell_accuracy_without_labels(tmp_path):
    """A slot without labels has no accuracy, and must not make that of all slots NaN."""
    trainer = grid_trainer(tmp_path, max_steps=3, model=grid_config(halt_max_steps=1))
    trainer.rows.solutions[0] = 0
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(0 <= log["cell_accuracy"] <= 1 for log in logs)


def test_shared_puzzles_are_named(tmp_path, caplog):
    """A split by hand may have puzzles of the training among those that the accuracy is measured on."""
    rows = sudoku_rows(12)
    grid_trainer(tmp_path, rows=rows.select(range(8)), eval_rows={"new": rows.select(range(8, 12))})
    assert "also in `train_dataset`" not in caplog.text
    grid_trainer(tmp_path, rows=rows.select(range(8)), eval_rows={"new": rows.select(range(5, 12))})
    assert "`eval_dataset['new']` has 3 puzzles that are also in `train_dataset`" in caplog.text


def test_warm_up_longer_than_the_training(tmp_path, caplog):
    """The default of the papers is 2,000 steps: a short training would only use a small part of the learning rate."""
    grid_trainer(tmp_path, max_steps=3, warmup_steps=2000).train()
    assert "The warm-up of 2,000 steps is not shorter than the training of 3 steps" in caplog.text
    caplog.clear()
    grid_trainer(tmp_path / "short", max_steps=3, warmup_steps=2).train()
    assert "warm-up" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halt_exploration_prob": 1.5}, "from 0 to 1"),
        ({"easier_share": -0.1}, "from 0 to 1"),
        ({"eval_segments": 0}, "at least 1"),
        ({"data_seed": -1}, "`data_seed` is -1. It must be at least 0"),
        ({"optim": "sgd"}, "must be one of adam_atan2, adamw"),
        ({"atan2_scale": 0.0}, "greater than 0"),
        ({"optim": "adamw", "atan2_scale": 2.0}, "`atan2_scale` has no effect with `optim=adamw`"),
        ({"optim": "adamw", "atan2_bias_correction": "inside"}, "`atan2_bias_correction` has no effect"),
        ({"adam_epsilon": 1e-6}, "`adam_epsilon` has no effect with `optim=adam_atan2`"),
        ({"ema": 1.0}, "less than 1"),
        ({"puzzle_learning_rate": -1.0}, "at least 0"),
        ({"eval_strategy": "epoch"}, "`eval_strategy` is epoch"),
        ({"gradient_checkpointing": True}, "not supported"),
        ({"fp16": True}, "not supported"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is not supported"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` is not supported"),
        ({"optim_args": "eps=1"}, "`optim_args` is not supported"),
        ({"bf16_full_eval": True}, "`bf16_full_eval` is not supported"),
        ({"auto_find_batch_size": True}, "not supported"),
    ],
)
def test_options_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        HRMReasoningConfig(str(tmp_path), report_to="none", use_cpu=True, **options)


def test_the_best_metric_has_a_default(tmp_path):
    """The default of transformers is the loss, which an evaluation does not have."""
    args = HRMReasoningConfig(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", eval_steps=5, save_steps=5, report_to="none"
    )
    assert (args.metric_for_best_model, args.greater_is_better, args.optim) == ("exact_accuracy", True, "adam_atan2")


@pytest.mark.slow
def test_compile_and_bf16(tmp_path):
    """`torch_compile` must train the same weights. bf16 must stay close, with states that are carried on."""
    rows = sudoku_rows(12, puzzle_ids=2)
    runs = {}
    for name, options in {"eager": {}, "compiled": {"torch_compile": True}, "bf16": {"bf16": True}}.items():
        trainer = grid_trainer(tmp_path / name, grid_config(hidden_size=32), rows, **options)
        trainer.train()
        runs[name] = weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert_close(runs["compiled"][0], runs["eager"][0], 1e-4)
    assert runs["compiled"][1] == pytest.approx(runs["eager"][1], abs=1e-4)
    assert runs["bf16"][1] == pytest.approx(runs["eager"][1], rel=2e-2)
