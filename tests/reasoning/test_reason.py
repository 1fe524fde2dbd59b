"""`trl-hrm reason`: systems, jobs that resume, results, and claims."""

import json
import re
import shlex
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from trl_hrm import BuildGridConfig, ReasonConfig, SolveConfig, build_grid, reason, solve
from trl_hrm.processes import Workers
from trl_hrm.reasoning import HrmGridForSolving, study, sudoku_vocab
from trl_hrm.reasoning.evaluate import GridPredictions
from trl_hrm.reasoning.study import Answers, System, claims, collect, read_split, run_folder, run_jobs, train_run
from trl_hrm.scripts.reason import choose_rate, push_model, shared_settings, training_settings


SHARED = {
    "vocab": sudoku_vocab(4),
    "height": 4,
    "width": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "mixer_intermediate_size": 16,
    "mixer": "mlp",
    "position": "learned",
    "H_layers": 1,
    "L_layers": 1,
    "num_prefix_tokens": 1,
    "halt_max_steps": 4,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "grids"
    sizes = {"num_train": 24, "num_validation": 6, "num_test": 10, "num_few_blanks": 10}
    build_grid(BuildGridConfig(family="sudoku", size=4, clues=8, num_proc=1, output_dir=str(folder), **sizes))
    return folder


class TestSystems:
    def test_controls_have_the_same_parameters(self):
        """A loop control with more or fewer parameters than HRM controls nothing."""
        count = {}
        for name in ("one_pass", "loop", "hrm", "hrm_continue", "trm"):
            model = HrmGridForSolving(System(name).config(SHARED, [2, 2], [2, 3]))
            count[name] = sum(parameter.numel() for parameter in model.parameters())
        assert count["one_pass"] == count["loop"] == count["hrm"] == count["hrm_continue"]
        layer = count["hrm"] - count["trm"]  # TRM has one module instead of two
        assert layer == sum(
            p.numel() for p in HrmGridForSolving(System("hrm").config(SHARED, [2, 2], [2, 3])).H_module.parameters()
        )

    def test_the_deep_pass_is_as_deep_as_a_segment(self):
        config = System("one_pass_deep").config(SHARED, [2, 3], [1, 1])
        assert config.H_layers + config.L_layers == 2 * (3 * 1 + 1)
        assert (config.halt_max_steps, config.hierarchy) == (1, False)

    def test_cycles_and_switches(self):
        hrm, trm = (System(name).config(SHARED, [2, 2], [3, 4]) for name in ("hrm", "trm+one_step+ema"))
        assert (hrm.H_cycles, hrm.L_cycles, hrm.grad_scope, hrm.continue_head) == (2, 2, "last_step", False)
        assert (trm.H_cycles, trm.L_cycles, trm.grad_scope, trm.tie_modules) == (3, 4, "last_step", True)
        assert System("trm").config(SHARED, [2, 2], [3, 4]).grad_scope == "last_cycle"
        assert System("hrm_continue").config(SHARED, [2, 2], [3, 4]).continue_head
        assert System("trm+one_step+ema").has_ema and not System("trm").has_ema

    @pytest.mark.parametrize("name", ["hrm2", "hrm+momentum", "hrm+ema+ema", "", "+ema"])
    def test_unknown_names(self, name):
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            System(name)


class TestConfig:
    def test_learning_rates(self):
        config = ReasonConfig(systems=["hrm", "trm"], learning_rates=["1e-3", "hrm=2e-3", "hrm=4e-3"])
        assert config.rates_of("hrm") == [2e-3, 4e-3] and config.rates_of("trm") == [1e-3]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"learning_rates": ["fast"]}, "'fast'"),
            ({"learning_rates": ["hrm=1e-3"]}, "no rate for one_pass"),
            ({"learning_rates": ["1e-3", "urm=1e-3"]}, "'urm' is not in `systems`"),
            ({"seeds": [1, 1]}, "`seeds`"),
            ({"cycles": [2]}, "H_cycles and L_cycles"),
            ({"family": "maze", "size": 7, "clues": 3}, "`clues`"),
            ({"data": "x", "clues": 12}, "`clues`"),
            ({"data": "x", "num_train": 12}, "`num_train` has no effect with `data`"),
            ({"tuning_seconds": 3}, "`tuning_seconds`"),
            ({"halt_max_steps": 0}, "`halt_max_steps`"),
            ({"private": True}, "`private`"),
            ({"num_attention_heads": 8}, "`num_attention_heads` has no effect with `mixer=mlp`"),
            ({"mixer": "attention", "mixer_intermediate_size": 64}, "`mixer_intermediate_size` has no effect"),
            ({"systems": ["hrm", "loop"], "trm_cycles": [3, 6]}, "`trm_cycles` has no effect without TRM"),
            ({"systems": ["trm+one_step", "loop", "one_pass"], "cycles": [3, 3]}, "`cycles` has no effect"),
            ({"systems": ["one_pass"], "halt_max_steps": 4}, "`halt_max_steps` has no effect"),
            ({"ema_decay": 0.9}, r"`ema_decay` has no effect without \+ema"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            ReasonConfig(**options)

    def test_options_of_some_systems(self):
        """An option is accepted if one of the systems uses it, and a default value always is."""
        ReasonConfig(systems=["one_pass_deep"], cycles=[3, 3], trm_cycles=[2, 3], ema_decay=0.99)
        ReasonConfig(systems=["loop", "trm+one_step+ema"], trm_cycles=[3, 6], ema_decay=0.9, halt_max_steps=4)
        ReasonConfig(mixer="attention", num_attention_heads=8, mixer_intermediate_size=128)

    def test_a_study_with_other_settings_is_not_resumed(self, tmp_path, monkeypatch):
        """Results of two settings would be mixed."""
        monkeypatch.setattr("trl_hrm.scripts.reason._reason", lambda config, folder: "done")
        options = {"output_dir": str(tmp_path / "run")}
        assert reason(ReasonConfig(**options)) == "done"
        assert reason(ReasonConfig(**options, num_workers=3)) == "done"  # does not change the results
        with pytest.raises(ValueError, match="halt_max_steps was 8 and is 4"):
            reason(ReasonConfig(**options, halt_max_steps=4))
        (tmp_path / "run" / "results.json").write_text("{}")
        assert reason(ReasonConfig(**options, halt_max_steps=4, overwrite=True)) == "done"
        assert not (tmp_path / "run" / "results.json").exists()

    def test_a_study_of_other_puzzles_is_not_resumed(self, tmp_path, monkeypatch):
        """Answers to the old test puzzles would be compared with the solutions of the new ones."""
        monkeypatch.setattr("trl_hrm.scripts.reason._reason", lambda config, folder: "done")
        config = ReasonConfig(data=str(tmp_path), output_dir=str(tmp_path / "run"))
        (tmp_path / "build_report.json").write_text('{"content": "before"}')
        assert reason(config) == reason(config) == "done"
        (tmp_path / "build_report.json").write_text('{"content": "after"}')
        with pytest.raises(ValueError, match='data_content was "before" and is "after"'):
            reason(config)

    def test_foreign_files_are_kept(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(ValueError, match=r"thesis\.tex"):
            reason(ReasonConfig(output_dir=str(tmp_path), overwrite=True))
        assert (tmp_path / "thesis.tex").exists()


class TestJobs:
    training = {
        **{"per_device_train_batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2, "augment": True, "seed": 3},
        **{
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 2,
            "report_to": "none",
            "max_steps": 6,
            "ema": 0.5,
        },
    }
    evaluations = {"early": (3, "test", 2), "late": (6, "validation", 3)}

    def run(self, data, output):
        model = System("trm").config(SHARED, [1, 1], [2, 1]).to_dict()
        train_run(str(data), model, self.training, self.evaluations, str(output), "trm-sudoku-4x4")

    def test_an_interrupted_training_ends_with_the_same_bytes(self, data, tmp_path, monkeypatch):
        """A killed study would give other results than one that was not killed."""
        self.run(data, tmp_path / "whole")
        end = study.Clock.on_step_end

        def stop(self, args, state, control, **kwargs):
            end(self, args, state, control, **kwargs)
            if state.global_step == 5:
                raise KeyboardInterrupt

        monkeypatch.setattr(study.Clock, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            self.run(data, tmp_path / "parts")
        assert not (tmp_path / "parts" / "run.json").exists()
        monkeypatch.undo()
        self.run(data, tmp_path / "parts")
        for name in ("early.npz", "late.npz"):
            whole, parts = (np.load(tmp_path / part / name) for part in ("whole", "parts"))
            assert whole["answers"].tobytes() == parts["answers"].tobytes()
            assert whole["q_halt"].tobytes() == parts["q_halt"].tobytes()
        assert "model_name: trm-sudoku-4x4" in (tmp_path / "whole" / "model" / "README.md").read_text()
        whole, parts = ((tmp_path / part / "model" / "model.safetensors").read_bytes() for part in ("whole", "parts"))
        assert whole == parts
        assert json.loads((tmp_path / "parts" / "run.json").read_text())["seconds"] is None  # unknown
        assert not (tmp_path / "whole" / "training").exists()

    def test_a_checkpoint_equals_a_shorter_training(self, data, tmp_path):
        """The comparison after equal steps takes checkpoints of longer trainings, which a decaying learning rate would spoil."""
        self.run(data, tmp_path / "long")
        model = System("trm").config(SHARED, [1, 1], [2, 1]).to_dict()
        short = {**self.training, "max_steps": 3}
        train_run(str(data), model, short, {"early": (3, "test", 2)}, str(tmp_path / "short"))
        assert not (tmp_path / "short" / "model").exists()
        long, short = (np.load(tmp_path / part / "early.npz") for part in ("long", "short"))
        assert long["q_halt"].tobytes() == short["q_halt"].tobytes()


def answers_of(right, segments):
    """Return answers to puzzles of one cell whose solution is 2, from the outcome of each segment, seed and puzzle."""
    right = np.asarray(right)  # (segments, seeds, puzzles)
    assert len(right) == segments
    predictions = [
        GridPredictions(np.where(one, 2, 1).astype(np.uint8)[..., None], np.where(one, 1.0, -1.0).astype(np.float32))
        for one in right.transpose(1, 0, 2)
    ]
    return Answers(predictions, np.full((right.shape[2], 1), 2, np.uint8))


class TestClaims:
    def claims_of(self, accuracies, seeds=3, puzzles=200):
        """Claims for systems with an accuracy in the trained segment and one in 4 times as many."""
        answers, segments = {}, {}
        for name, (usual, more) in accuracies.items():
            shares = [usual, more, more, more]
            right = np.arange(puzzles) < puzzles * np.array(shares)[:, None, None] + np.zeros((4, seeds, 1))
            answers[name] = dict.fromkeys(("seconds", "steps"), answers_of(right, 4))
            segments[name] = 1
        return {claim["claim"]: claim for claim in claims(segments, answers)}

    def test_verdicts(self):
        found = self.claims_of(
            {"one_pass": (0.1, 0.1), "loop": (0.9, 0.95), "hrm": (0.6, 0.4), "hrm_continue": (0.58, 0.58)}
        )
        verdicts = {claim: one["seconds"]["verdict"] for claim, one in found.items()}
        assert verdicts["HRM beats one pass"] == "holds"
        assert verdicts["The loop without hierarchy beats one pass"] == "holds"
        assert verdicts["The hierarchy beats the same blocks in one loop"] == "does not hold"
        assert verdicts["The continue head helps"] == "does not hold"
        assert verdicts["More segments at test help (loop control: 4 instead of 1)"] == "holds"
        assert verdicts["More segments at test help (HRM: 4 instead of 1)"] == "does not hold"
        [part] = found["The hierarchy beats the same blocks in one loop"]["steps"]["parts"].values()
        assert part["mean"] == pytest.approx(-0.3)
        assert not any("TRM" in claim for claim in found)  # not trained

    def test_two_seeds_settle_nothing(self):
        found = self.claims_of({"one_pass": (0.0, 0.0), "loop": (1.0, 1.0), "hrm": (0.5, 0.5)}, seeds=2)
        assert {claim["seconds"]["verdict"] for claim in found.values()} == {"open"}

    def test_one_part_that_is_open_leaves_the_claim_open(self):
        accuracies = {"one_pass": (0.0, 0.0), "one_pass_deep": (0.5, 0.5), "hrm": (0.5, 0.5)}
        claim = self.claims_of(accuracies)["HRM beats one pass"]
        assert claim["seconds"]["verdict"] == "open" and len(claim["seconds"]["parts"]) == 2

    def test_suffices_allows_a_small_loss(self):
        """ "The one-step gradient suffices" is settled by an interval above minus 5 points, not above 0."""
        name = "The one-step gradient suffices (TRM)"
        same = self.claims_of({"trm": (0.9, 0.9), "trm+one_step": (0.9, 0.9)})[name]
        worse = self.claims_of({"trm": (0.9, 0.9), "trm+one_step": (0.5, 0.5)})[name]
        assert (same["seconds"]["verdict"], worse["seconds"]["verdict"]) == ("holds", "does not hold")

    def test_nothing_to_lose_leaves_the_claim_open(self):
        """Two systems that solve nothing are equal, which does not show that the gradient suffices or that halting is good."""
        found = self.claims_of({"trm": (0.02, 0.02), "trm+one_step": (0.0, 0.0)})
        verdicts = {claim.partition(" (")[0]: one["seconds"]["verdict"] for claim, one in found.items()}
        assert verdicts["The one-step gradient suffices"] == verdicts["Halting by q loses nothing"] == "open"

    def test_one_part_that_fails_decides(self):
        """A claim about two controls is wrong if it is wrong about one of them."""
        accuracies = {"one_pass": (0.0, 0.0), "one_pass_deep": (0.9, 0.9), "hrm": (0.5, 0.5)}
        assert self.claims_of(accuracies)["HRM beats one pass"]["seconds"]["verdict"] == "does not hold"


class TestCollect:
    @pytest.fixture
    def run(self, data, tmp_path):
        """A study of two systems whose answers are known: the loop solves the first 6 of 10 test puzzles in the second of 2 segments."""
        plan = {"seeds": [0, 1, 2], "equal_steps": 1, "systems": {}}
        for name, segments in (("loop", 2), ("one_pass", 1)):
            plan["systems"][name] = {
                **{"parameters": 10, "seconds_per_step": 0.01, "learning_rate": 1e-3, "tried_learning_rates": {}},
                **{"steps": 2, "segments": segments, "points": [1, 2]},
            }
            for seed in plan["seeds"]:
                folder = run_folder(tmp_path, name, seed)
                folder.mkdir(parents=True)
                (folder / "run.json").write_text('{"seconds": 1.0, "history": []}')
                sizes = {"test-seconds": ("test", 4 * segments), "test-steps": ("test", segments)}
                sizes |= {"few_blanks": ("few_blanks", segments)}
                sizes |= {f"validation-{step}": ("validation", segments) for step in (1, 2)}
                for file, (split, number) in sizes.items():
                    rows = read_split(data, split)
                    solution = np.array(rows["solution"], np.uint8)
                    answers = np.repeat(np.array(rows["puzzle"], np.uint8)[None], number, 0)
                    if name == "loop":
                        answers[1:, :6] = solution[:6]
                    q_halt = np.where((answers == solution).all(-1), 1.0, -1.0).astype(np.float32)
                    np.savez(folder / f"{file}.npz", answers=answers, q_halt=q_halt)
        return tmp_path, plan

    def test_numbers(self, run, data):
        found = collect(*run, data)
        loop, one_pass = found["systems"]["loop"], found["systems"]["one_pass"]
        assert [point["mean"] for point in loop["by_segment"]] == [0, *[pytest.approx(0.6)] * 7]
        assert one_pass["exact"]["seconds"]["mean"] == 0 and len(one_pass["by_segment"]) == 4
        assert loop["exact"]["steps"]["seeds"] == (0.6, 0.6, 0.6)
        assert loop["cell"]["seconds"]["mean"] == pytest.approx(0.6 + 0.4 * 8 / 16)
        halted = loop["strategies"]["seconds"]["first_halt, 2 segments"]
        assert (halted["mean"], halted["mean_segments"]) == (pytest.approx(0.6), 2)
        assert loop["strategies"]["seconds"]["first_halt, 8 segments"]["mean_segments"] == pytest.approx(
            0.6 * 2 + 0.4 * 8
        )
        assert list(loop["few_blanks"]) == ["1", "2", "3", "4", "5"]
        assert list(found["boards"]["answers"]) == ["loop"]

    def test_groups_add_up(self, run, data):
        """A group that is left out, or counted twice, would not show in a table of means."""
        loop = collect(*run, data)["systems"]["loop"]
        rows = read_split(data, "few_blanks")
        blanks = (np.array(rows["puzzle"]) != np.array(rows["solution"])).sum(1)
        mean = sum(one["mean"] * (blanks == int(name)).sum() for name, one in loop["few_blanks"].items()) / len(blanks)
        assert mean == pytest.approx(0.6)

    def test_answers_of_other_puzzles_are_refused(self, run, data):
        folder, plan = run
        path = run_folder(folder, "loop", 1) / "test-seconds.npz"
        np.savez(path, answers=np.zeros((8, 9, 16), np.uint8), q_halt=np.zeros((8, 9), np.float32))
        with pytest.raises(ValueError, match=re.escape(str(path))):
            collect(folder, plan, data)


def test_the_learning_rate_is_chosen_on_the_validation_split(data, tmp_path):
    """With equal exact accuracy, which is often 0 after short trainings, cell accuracy decides."""
    rows = read_split(data, "validation")
    solution, puzzle = (np.array(rows[name], np.uint8) for name in ("solution", "puzzle"))
    wrong = np.where(solution == 2, 3, 2).astype(np.uint8)
    for rate, answers in ((1e-3, wrong), (3e-3, puzzle)):
        (tmp_path / f"{rate:g}").mkdir()
        np.savez(tmp_path / f"{rate:g}" / "validation.npz", answers=answers[None], q_halt=np.zeros((1, 6)))
    paths = {rate: tmp_path / f"{rate:g}" for rate in (1e-3, 3e-3)}
    assert choose_rate(paths, data) == (3e-3, {1e-3: 0.0, 3e-3: 0.0})


def test_shared_settings(data):
    config = ReasonConfig(systems=["hrm", "hrm+ema"], ema_decay=0.9)
    shared = shared_settings(config, data)
    assert (shared["height"], shared["vocab"], shared["H_layers"]) == (4, sudoku_vocab(4), 1)
    assert training_settings(config, System("hrm+ema"))["ema"] == 0.9
    assert training_settings(config, System("hrm"))["ema"] is None


def test_a_job_that_fails_stops_the_study_after_the_others(tmp_path, capsys):
    """The message says which job failed. The next stage would read the results that it has not written."""
    with Workers(1, "fork", "") as pool:
        run_jobs(pool, "first", {"one": partial(int, "1")}, tmp_path, lambda: "1 result")
        assert capsys.readouterr().out.endswith("  1 result\n")
        jobs = {"bad": partial(int, "x"), "good": partial((tmp_path / "made").mkdir)}
        with pytest.raises(
            ValueError, match=r"1 of 2 jobs of the stage second failed, first bad \(ValueError: invalid"
        ):
            run_jobs(pool, "second", jobs, tmp_path)
    assert (tmp_path / "made").exists()


def test_missing_split(data, tmp_path):
    (tmp_path / "data").mkdir()
    for file in data.glob("data/train-*"):
        shutil.copy(file, tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="`validation`"):
        shared_settings(ReasonConfig(), tmp_path)
    assert read_split(tmp_path, "few_blanks") is None  # mazes have none


@pytest.mark.parametrize(("private", "is_private"), [(False, False), (True, True), (True, False)])
def test_push_of_the_model(tmp_path, monkeypatch, private, is_private):
    """The code in the card must load the pushed model, and a private model must not end up in a public repository."""
    (tmp_path / "README.md").write_text('---\nmodel_name: hrm-sudoku-4x4\n---\nfrom_pretrained("hrm-sudoku-4x4")\n')
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def model_info(self, repo_id):
            return SimpleNamespace(private=is_private)

        def upload_folder(self, **options):
            calls.append(("upload", options["repo_id"], options["ignore_patterns"]))
            return SimpleNamespace(repo_url="https://hub/me/hrm")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    if private and not is_private:
        with pytest.raises(ValueError, match="exists and is public"):
            push_model(tmp_path, "hrm", private)
        assert len(calls) == 1
        return
    assert push_model(tmp_path, "hrm", private) == "https://hub/me/hrm"
    assert calls == [
        ("create", "hrm", {"private": private or None, "exist_ok": True}),
        ("upload", "me/hrm", ["training_args.bin"]),
    ]
    assert (tmp_path / "README.md").read_text() == '---\nmodel_name: me/hrm\n---\nfrom_pretrained("me/hrm")\n'


@pytest.mark.slow
def test_a_study_from_end_to_end(tmp_path):
    """Also that it resumes: the second call finds everything but one training, and gives the same results."""
    config = partial(
        ReasonConfig,
        **{
            "output_dir": str(tmp_path / "run"),
            "size": 4,
            "clues": 8,
            "num_train": 40,
            "num_validation": 10,
            "num_test": 20,
        },
        **{
            "systems": ["one_pass", "hrm"],
            "seeds": [0],
            "seconds_per_run": 1.0,
            "hidden_size": 16,
            "halt_max_steps": 2,
        },
        **{"learning_rates": ["1e-3", "hrm=1e-3", "hrm=3e-3"], "num_workers": 2},
    )
    text = reason(config())
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["systems"]) == {"one_pass", "hrm"}
    assert set(results["systems"]["hrm"]["tried_learning_rates"]) == {"0.001", "0.003"}
    assert "Exact accuracy" in text and "After equal steps" in text
    assert (folder / "report.html").exists() and (folder / "model" / "config.json").exists()
    # The last line is a command that works
    command = shlex.split(text.splitlines()[-1].removeprefix("Next: trl-hrm solve "))
    assert len(solve(SolveConfig(model=command[0], file=command[1])).solutions) == 3
    shutil.rmtree(folder / "runs" / "hrm-0")
    reason(config())
    again = json.loads((folder / "results.json").read_text())
    for found in (results, again):
        found["systems"]["hrm"].pop("run_seconds")
    assert again == results
