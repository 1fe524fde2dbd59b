"""
What happens if something changed when a run is resumed: one table for every command that resumes, and runs with real models.

The commands of the table are real. Their engine, reward model and grader are fakes that describe themselves like the real ones.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from trl_hrm import BestOfNConfig, StepFormat, annotate, best_of_n, step_search
from trl_hrm.cli import main
from trl_hrm.evaluation.results import load_results
from trl_hrm.scoring.reward_model_config import RewardModelConfig
from trl_hrm.scripts.annotate import AnnotateConfig
from trl_hrm.scripts.step_search import StepSearchConfig
from trl_hrm.search.engines.base import ScriptedEngine
from trl_hrm.search.policy_config import PolicyConfig

from .fakes import write_rows
from .helpers import save_checkpoint, tiny_tokenizer
from .search.policies import KNOWN
from .search.scripted import ExactGrade


COMMITS = ("1" * 40, "2" * 40)
PROBLEMS = [{"id": f"q{i}", "problem": f"What is {i} + 7 - {i}?", "answer": "7"} for i in range(4)]
CANDIDATES = [
    {"prompt": row["problem"], "answer": "7", "candidates": ["So 7.\n\n# Answer\n\n7", "So 8.\n\n# Answer\n\n8"]}
    for row in PROBLEMS
]


SERVER = {"root": "me/policy", "max_model_len": 4096, "prompt_logprobs": [-3.0, -2.0]}


class Engine(ScriptedEngine):
    """Describes itself as the real engines do."""

    def __init__(self, config: PolicyConfig, server: dict[str, Any]):
        super().__init__(lambda prefix, rng: f"So it is {rng.random()}.\n\n# Answer\n\n{rng.choice((7, 8))}\n# END!")
        self.config = config
        self.server = server

    def describe(self) -> dict[str, Any]:
        names = ("engine", "temperature", "top_p", "top_k")
        described = {name: getattr(self.config, name) for name in names}
        described |= {"model": self.config.policy, "revision": self.config.policy_revision, "torch": "2.7"}
        if self.config.engine == "openai":
            return described | {"tokenizer": self.config.policy_tokenizer, "identity": self.server}
        return described | {"dtype": self.config.policy_dtype, "engine_args": self.config.engine_args}


class Scorer:
    """Scores every step with 0.5. Like Ctrl-C, it can stop before a call."""

    def __init__(self, server: dict[str, Any] | None = None):
        self.tokenizer, self.step_format, self.max_positions = tiny_tokenizer(), StepFormat(), None
        self.server = server
        self.num_calls_left: int | None = None

    def score(self, prompts, candidates, spans=(1,), combine="max", progress=False):
        if self.num_calls_left is not None:
            self.num_calls_left -= 1
            if self.num_calls_left < 0:
                raise KeyboardInterrupt
        return [[[0.5] * len(steps) for steps in group] for group in candidates]

    def score_trees(self, trees, spans=(1,), combine="max"):
        return [[0.5] * len(tree.completions) for tree in trees]

    def describe(self) -> dict[str, Any]:
        return {} if self.server is None else {"identity": self.server}


class Grader:
    """Equal strings are right. Takes the options of the real grader and describes itself as the real one does."""

    rules = 1

    def __init__(self, num_workers: int = 1, timeout: float = 10.0):
        self.timeout = timeout

    def grade(self, answer, reference, is_reference=True):
        return ExactGrade(answer == reference)

    async def agrade(self, answer, reference):
        return self.grade(answer, reference)

    def describe(self):
        return {"rules": self.rules, "timeout": self.timeout, "sympy": "1.13"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@dataclass
class World:
    """Files of a run, and the settings of each command."""

    root: Path
    settings: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=lambda: SERVER.copy())
    scorer: Scorer = field(default_factory=Scorer)

    def __post_init__(self):
        for name in ("policy", "base", "model"):
            for file in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
                self.write(f"{name}/{file}", f'{{"of": "{name}"}}')
        self.write("model/step_format.json", "{}")
        self.write("adapter/adapter_model.safetensors", "lora")
        self.write("adapter/adapter_config.json", json.dumps({"base_model_name_or_path": str(self.root / "base")}))
        self.write("prompt.txt", "Solve: {question}\n\n")
        for name in ("own.json", "copy.json"):
            StepFormat().save(self.root)
            shutil.move(self.root / "step_format.json", self.root / name)
        write_rows(self.root / "problems.jsonl", PROBLEMS)
        write_rows(self.root / "candidates.jsonl", CANDIDATES)

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(exist_ok=True)
        (self.root / name).write_text(text)

    def move(self, name: str, to: str) -> str:
        shutil.move(self.root / name, self.root / to)
        return str(self.root / to)

    def run(self, command: str, **changes: Any) -> Any:
        at = {name: str(self.root / name) for name in ("policy", "model", "problems.jsonl", "candidates.jsonl", "out")}
        given = {"output_dir": at["out"], "extractors": ["marker"]}
        sampling = {"problems": at["problems.jsonl"], "policy": at["policy"], "engine": "transformers"}
        sampling |= {"prompt": str(self.root / "prompt.txt"), "prompt_style": "plain", "final_stops": ["# END!"]}
        scoring = {"reward_model": at["model"], "overwrite": True, "n": [2]}
        function, config, settings = {
            "annotate": (annotate, AnnotateConfig, sampling | {"num_children": 2, "max_depth": 2}),
            "step_search": (step_search, StepSearchConfig, sampling | scoring | {"max_depth": 2}),
            "sampling": (best_of_n, BestOfNConfig, sampling | scoring),
            "scoring": (
                best_of_n,
                BestOfNConfig,
                scoring | {"candidates": at["candidates.jsonl"], "overwrite": False, "aggregate": ["last"]},
            ),
        }[command]
        return function(config(**given | settings | self.settings | changes))

    def start(self, command: str) -> None:
        """Run a command. Scoring is stopped after its first block, because it resumes only until its results exist."""
        if command != "scoring":
            self.run(command)
            return
        self.scorer.num_calls_left = 1
        with pytest.raises(KeyboardInterrupt):
            self.run(command)
        self.scorer.num_calls_left = None

    def state(self) -> dict[str, bytes]:
        """Return the files that a refused restart may not change."""
        names = ("manifest", "log", "partial", "nodes")
        files = (path for path in (self.root / "out").rglob("*") if path.name.startswith(names))
        return {str(path): path.read_bytes() for path in files}

    def manifest(self) -> dict[str, Any]:
        [path] = (self.root / "out").rglob("manifest.json")
        return json.loads(path.read_text())


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr("trl_hrm.evaluation.best_of_n.BLOCK", 2)
    monkeypatch.setattr("trl_hrm.grading.AnswerGrader", Grader)
    monkeypatch.setattr(PolicyConfig, "load_engine", lambda config, shard: Engine(config, world.server))
    monkeypatch.setattr(RewardModelConfig, "load_scorer", lambda config, *_: world.scorer)
    monkeypatch.setattr(BestOfNConfig, "check_reward_model", lambda config: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for commit in COMMITS:
        (tmp_path / "hub" / "models--me--hub" / "snapshots" / commit).mkdir(parents=True)
        world.write(f"hub/models--me--hub/snapshots/{commit}/config.json", "{}")
    (tmp_path / "hub" / "models--me--hub" / "refs").mkdir()
    world.write("hub/models--me--hub/refs/main", COMMITS[0])
    return world


Change = Callable[[World], dict[str, Any] | None]
ALL = ("annotate", "step_search", "sampling", "scoring")
SAMPLE, SCORE = ALL[:3], ("step_search", "scoring")


def write(name: str, text: str = '{"of": "another"}') -> Change:
    return lambda world: world.write(name, text)


def rows(name: str, changed: list[dict]) -> Change:
    return lambda world: write_rows(world.root / name, changed) and None


def settings(**given: Any) -> Change:
    return lambda world: given


def moved(name: str, to: str, option: str) -> Change:
    return lambda world: {option: world.move(name, to)}


def serve(**changes: Any) -> Change:
    def change(world: World) -> None:
        world.server |= changes
        world.server = {name: value for name, value in world.server.items() if value is not None}

    return change


def other(name: str, **changes: Any) -> list[dict]:
    found = PROBLEMS if name == "problems" else CANDIDATES
    return [found[0] | changes, *found[1:]]


# (what changed, the change, the commands, the name in the error, settings of both runs)
REFUSED_UNLESS_ACCEPTED = [
    ("weights of the policy", write("policy/model.safetensors"), SAMPLE, "policy.weights", {}),
    ("a new shard of weights", write("policy/model-2.safetensors"), SAMPLE, "policy.weights", {}),
    ("config of the policy", write("policy/config.json"), SAMPLE, "policy.config", {}),
    ("generation config", write("policy/generation_config.json"), SAMPLE, "policy.config", {}),
    ("code of the policy", write("policy/modeling_own.py"), SAMPLE, "policy.config", {}),
    ("tokenizer of the policy", write("policy/tokenizer.json"), SAMPLE, "policy.tokenizer", {}),
    ("chat template", write("policy/chat_template.jinja"), SAMPLE, "policy.tokenizer", {}),
    ("adapter", write("adapter/adapter_model.safetensors"), SAMPLE, "policy.weights", {"policy": "{root}/adapter"}),
    ("base model", write("base/model.safetensors"), SAMPLE, "policy.base_model.weights", {"policy": "{root}/adapter"}),
    ("another policy", settings(policy="{root}/base"), SAMPLE, "policy.weights", {}),
    ("commit of the policy", write("hub/models--me--hub/refs/main", COMMITS[1]), SAMPLE, "policy.commit", {"policy": "me/hub"}),
    ("weights of the reward model", write("model/model.safetensors"), SCORE, "reward_model.weights", {}),
    ("tokenizer of the reward model", write("model/tokenizer.json"), SCORE, "reward_model.tokenizer", {}),
    ("step format of the reward model", write("model/step_format.json"), SCORE, "reward_model.step_format", {}),
    ("own step format", write("own.json", '{"merge_separator": " "}'), SCORE, "reward_model.step_format", {"step_format": "{root}/own.json"}),
    ("commit of the reward model", write("hub/models--me--hub/refs/main", COMMITS[1]), SCORE, "reward_model.commit", {"reward_model": "me/hub"}),
    ("dtype of the reward model", settings(reward_model_dtype="bfloat16"), SCORE, "reward_model.dtype", {}),
    ("temperature", settings(temperature=0.5), SAMPLE, "engine.temperature", {}),
    ("top_p", settings(top_p=0.5), SAMPLE, "engine.top_p", {}),
    ("top_k", settings(top_k=5), SAMPLE, "engine.top_k", {}),
    ("dtype of the policy", settings(policy_dtype="bfloat16"), SAMPLE, "engine.dtype", {}),
    ("timeout of the grader", settings(grader_timeout=1.0), ALL, "grader.timeout", {}),
]  # fmt: skip
SERVED = {"engine": "openai", "policy": "served", "policy_urls": ["http://a"], "policy_tokenizer": "{root}/policy"}
REFUSED_UNLESS_ACCEPTED += [
    ("model on the server", serve(root="me/other", prompt_logprobs=None), SAMPLE, "policy_server.root", SERVED),
    ("length on the server", serve(max_model_len=8192), SAMPLE, "policy_server.max_model_len", SERVED),
    ("model, by a probe", serve(prompt_logprobs=[-4.0, -2.0]), SAMPLE, "policy_server.prompt_logprobs", SERVED),
    ("name on the server", settings(policy="other"), SAMPLE, "engine.model", SERVED),
    ("tokenizer for the server", write("policy/tokenizer.json"), SAMPLE, "policy.tokenizer", SERVED),
    ("commit of the tokenizer", write("hub/models--me--hub/refs/main", COMMITS[1]), SAMPLE, "policy.tokenizer.commit", SERVED | {"policy_tokenizer": "me/hub"}),
]  # fmt: skip
REFUSED = [
    ("a problem", rows("problems.jsonl", other("problems", problem="What is 7?")), SAMPLE, "prompt", {}),
    ("a reference answer", rows("problems.jsonl", other("problems", answer="8")), SAMPLE, "answer", {}),
    ("a candidate", rows("candidates.jsonl", other("candidates", candidates=["7", "8"])), ("scoring",), "candidates", {}),
    ("an answer of the candidates", rows("candidates.jsonl", other("candidates", answer="8")), ("scoring",), "candidates", {}),
    ("the text of the prompt", write("prompt.txt", "Please solve: {question}\n\n"), SAMPLE, "prompt.template", {}),
    ("final stops", settings(final_stops=["# Answer"]), SAMPLE, "prompt.final_stops", {}),
    ("segmentation", settings(segmentation="sentence"), SAMPLE, "steps.name", {}),
    ("extractors", settings(extractors=["boxed"]), ALL, "extractors", {}),
    ("seed", settings(seed=1), ALL, "seed", {}),
    ("num_children", settings(num_children=3), ("annotate",), "search.num_children", {}),
    ("max_depth", settings(max_depth=3), ("annotate", "step_search"), "search.max_depth", {}),
    ("search", lambda world: {"search": "rollouts", "num_children": None, "max_depth": None}, ("annotate",), "search.search", {}),
    ("number of shards", settings(shard="0/2"), ("annotate",), "num_shards", {}),
    ("max_solution_tokens", settings(max_solution_tokens=9), ("sampling",), "search.max_solution_tokens", {}),
    ("spans", settings(spans=[1, 2]), SCORE, "spans", {}),
    ("aggregate", settings(aggregate="min"), ("step_search",), "aggregate", {}),
]  # fmt: skip
# With the note that is printed
NOTED = [
    ("the folder of the policy", moved("policy", "policy-2", "policy"), SAMPLE, "engine.model was", {}),
    ("the folder of the reward model", moved("model", "model-2", "reward_model"), SCORE, "reward_model.model was", {}),
    ("the file of the prompt", moved("prompt.txt", "prompt-2.txt", "prompt"), SAMPLE, "prompt.name was", {}),
    ("the file of candidates", moved("candidates.jsonl", "c.jsonl", "candidates"), ("scoring",), "source was", {}),
    ("the folder on the server", serve(root="/other", prompt_logprobs=[-3.01, -2.02]), SAMPLE, "policy_server.root was", SERVED),
    ("the tokenizer for the server", moved("policy", "p", "policy_tokenizer"), SAMPLE, "engine.tokenizer was", SERVED),
    ("a revision by its commit", settings(policy_revision=COMMITS[0]), SAMPLE, "engine.revision was", {"policy": "me/hub"}),
    ("a copy of the step format", settings(step_format="{root}/copy.json"), SCORE, "reward_model.step_format was", {"step_format": "{root}/own.json"}),
    ("a problem was removed", rows("problems.jsonl", PROBLEMS[1:]), ("annotate", "step_search"), "1 problems that are not among", {}),
]  # fmt: skip
# Nothing is said
SAME = [
    ("nothing", settings(), ALL, {}),
    ("aggregate, of scores that are kept", settings(aggregate="min"), ("scoring",), {}),
    ("rounding of a probe", serve(prompt_logprobs=[-3.01, -2.02]), SAMPLE, SERVED),
    ("a problem was added", rows("problems.jsonl", [*PROBLEMS, {"id": "q4", "problem": "7?", "answer": "7"}]), SAMPLE, {}),
    ("the file of problems", moved("problems.jsonl", "p.jsonl", "problems"), SAMPLE, {}),
    ("other files of the policy", write("policy/optimizer.pt"), SAMPLE, {}),
    ("a step format of the policy", write("policy/step_format.json"), SAMPLE, {}),
    ("the concurrency", settings(max_in_flight=64, max_open_problems=8, grader_workers=2), SAMPLE, {}),
    ("the batch size of the engine", settings(engine_args={"batch_size": 2}), SAMPLE, {}),
    ("the batch size of the reward model", settings(reward_model_batch_size=2, reward_model_max_length=64), SCORE, {}),
    ("the reward model, for samples", write("model/model.safetensors"), ("sampling",), {}),
]  # fmt: skip


def cases(table: list[tuple]) -> Any:
    """One case for each command of each row, without the commands. One command of each row, in turn, is not slow."""
    return [
        pytest.param(
            *(command, row[1], *row[3:]),
            id=f"{command}: {row[0]}",
            marks=() if place == number % len(row[2]) else pytest.mark.slow,
        )
        for number, row in enumerate(table)
        for place, command in enumerate(row[2])
    ]


def filled(values: dict[str, Any] | None, world: World) -> dict[str, Any]:
    fill = {"root": str(world.root)}
    return {name: value.format(**fill) if isinstance(value, str) else value for name, value in (values or {}).items()}


@pytest.mark.parametrize(("command", "change", "name", "given"), cases(REFUSED_UNLESS_ACCEPTED))
def test_refused_unless_accepted(world, command, change, name, given):
    world.settings = filled(given, world)
    world.start(command)
    before = world.state()
    world.settings |= filled(change(world), world)
    with pytest.raises(ValueError, match=f"{name} was .* and is ") as refused:
        world.run(command)
    assert world.state() == before
    if name.endswith(".commit"):
        option = "--policy_revision" if name.startswith("policy") else "--reward_model_revision"
        assert f"{option} {COMMITS[0]}." in str(refused.value) and COMMITS[1] in str(refused.value)
    if command == "scoring":  # a curve of two reward models would mean nothing
        assert "--overwrite" in str(refused.value) and "--accept_changes" not in str(refused.value)
        world.run(command, overwrite=True)
        return
    names = str(refused.value).partition("--accept_changes ")[2].rstrip(".").split()
    assert name in names
    world.run(command, accept_changes=names)
    accepted = world.manifest()["accepted_changes"]
    assert [one["name"] for one in accepted] == names and all(one["before"] != one["now"] for one in accepted)
    world.run(command)  # accepted for good
    again = world.run(command, accept_changes=names)  # the same command resumes the run, also in other shards
    assert world.manifest()["accepted_changes"] == accepted
    kind = "reward models" if "reward" in name else "graders" if "grader" in name else "policies"
    if command == "annotate":
        assert f"warning: This run mixes different {kind}" in str(again)
    else:
        warning = f"This run mixes different {kind}, which was accepted with --accept_changes: "
        assert any(one.startswith(warning) for one in load_results(world.root / "out").warnings)


@pytest.mark.parametrize(("command", "change", "name", "given"), cases(REFUSED))
def test_refused(world, command, change, name, given):
    world.settings = filled(given, world)
    world.start(command)
    before = world.state()
    world.settings |= filled(change(world), world)
    with pytest.raises(ValueError, match=rf"\b{name} was .* and is ") as refused:
        world.run(command)
    assert "--accept_changes" not in str(refused.value)
    assert world.state() == before
    if command != "scoring":
        with pytest.raises(ValueError, match="accept_changes.* can be accepted"):
            world.run(command, accept_changes=[name])


@pytest.mark.parametrize(("command", "change", "note", "given"), cases(NOTED))
def test_accepted_with_a_note(world, capfd, command, change, note, given):
    world.settings = filled(given, world)
    world.start(command)
    capfd.readouterr()
    world.settings |= filled(change(world), world)
    world.run(command)
    printed = "".join(capfd.readouterr())
    assert note in printed and ("The content is the same." in printed or "problems" in note)
    if command != "scoring":
        assert "accepted_changes" not in world.manifest()


@pytest.mark.parametrize(("command", "change", "given"), cases(SAME))
def test_accepted(world, capfd, command, change, given):
    world.settings = filled(given, world)
    world.start(command)
    capfd.readouterr()
    world.settings |= filled(change(world), world)
    world.run(command)
    printed = "".join(capfd.readouterr())
    assert "content" not in printed and "not among" not in printed
    if command != "scoring":
        assert "accepted_changes" not in world.manifest()


@pytest.mark.parametrize("command", SAMPLE)
def test_a_manifest_of_an_older_version(world, capfd, command):
    """It has no digests. The run is resumed as before, this is said once, and from then on the content is compared."""
    world.start(command)
    [path] = (world.root / "out").rglob("manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["identity"]
    path.write_text(json.dumps(manifest))
    parts = "policy and reward_model" if command == "step_search" else "policy"
    note = f"did not record the content of {parts}. Only the name could be compared."
    capfd.readouterr()
    world.run(command)
    assert note in "".join(capfd.readouterr())
    world.run(command)
    assert note not in "".join(capfd.readouterr())
    if command != "annotate":
        assert not any("mixes" in warning for warning in load_results(world.root / "out").warnings)
    world.write("policy/model.safetensors", "other")
    with pytest.raises(ValueError, match="policy.weights was"):
        world.run(command)


def test_a_part_of_an_older_version(world, capsys):
    world.start("scoring")
    [path] = (world.root / "out").glob("partial-*")
    header, *blocks = path.read_text().splitlines()
    header = json.loads(header)
    del header["identity"], header["grader"]
    header["files of the reward model"] = "0123456789abcdef"
    path.write_text("\n".join([json.dumps(header), *blocks, ""]))
    world.scorer.num_calls_left = 1  # one block of two is left
    world.run("scoring")
    assert "did not record the content of reward_model" in capsys.readouterr().out


def test_a_reward_model_on_a_server(world):
    """The server says which model it runs, also when the run is resumed."""
    world.scorer.server = {"max_model_len": 4096}
    served = {"reward_model_engine": "http://localhost:1"}
    world.settings = served
    for command, folder in (("step_search", "a"), ("scoring", "b")):
        world.settings = served | {"output_dir": str(world.root / folder)}
        world.scorer.server = {"max_model_len": 4096}
        world.start(command)
        world.scorer.server = {"max_model_len": 2048}
        with pytest.raises(ValueError, match="reward_model_server.max_model_len was 4096 and is 2048"):
            world.run(command)


def test_names_that_did_not_change_are_refused(world):
    """A name that is ignored would suggest that the run mixes two policies."""
    with pytest.raises(ValueError, match="policy.weights, which did not change"):
        world.run("annotate", accept_changes=["policy.weights"])
    assert not (world.root / "out").exists()
    world.start("annotate")
    world.write("policy/model.safetensors", "other")
    before = world.state()
    with pytest.raises(ValueError, match="contains policy.tokenizer, which did not change"):
        world.run("annotate", accept_changes=["policy.weights", "policy.tokenizer"])
    assert world.state() == before
    with pytest.raises(ValueError, match="`accept_changes` only applies to sampling"):
        world.run("scoring", accept_changes=["policy.weights"])


def test_a_second_change_is_accepted_too(world):
    world.start("annotate")
    for text in ("second", "third"):
        world.write("policy/model.safetensors", text)
        world.run("annotate", accept_changes=["policy.weights"])
    first, second = world.manifest()["accepted_changes"]
    assert first["now"] == second["before"] and second["now"] == world.manifest()["identity"]["policy"]["weights"]


def test_a_moved_policy_is_noted_once(world, capsys):
    world.start("annotate")
    world.settings["policy"] = world.move("policy", "elsewhere")
    world.run("annotate")
    assert "The content is the same." in capsys.readouterr().out
    assert world.manifest()["engine"]["model"] == world.settings["policy"]
    world.run("annotate")
    assert "The content is the same." not in capsys.readouterr().out


def test_processes_wait_for_parts_of_the_same_content(world, monkeypatch):
    """The first process would wait forever for a part whose header only has another path."""
    for rank in (1, 0):
        if rank == 0:
            world.settings = {"reward_model": world.move("model", "elsewhere")}
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        results = world.run("scoring")
    assert results.num_problems == 4


@pytest.fixture
def two_policies(policy, tmp_path) -> tuple[Path, Path]:
    """The tiny policy, and a copy with other weights."""
    other = tmp_path / "other"
    shutil.copytree(policy, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.save_pretrained(other)
    return Path(policy), other


def replaced(folder: Path, by: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(by, folder)


PROMPT = "--prompt question --prompt_style plain --segmentation step_header --final_stops".split() + ["# END!"]


def test_real_trees(tmp_path, two_policies, capsys):
    """With a real engine: other weights at the same path are refused, and a dataset of an accepted mixture says so."""
    policy, problems = tmp_path / "policy", write_rows(tmp_path / "problems.jsonl", KNOWN)
    trees = ["annotate", "--problems", problems, "--policy", str(policy), "--engine", "transformers", *PROMPT]
    trees += [
        "--num_children",
        "3",
        "--max_depth",
        "3",
        "--max_step_tokens",
        "40",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    replaced(policy, two_policies[0])
    assert main([*trees, "--limit", "2"]) == 0
    replaced(policy, two_policies[1])
    assert main(trees) == 1
    assert "policy.weights was" in capsys.readouterr().err
    assert main([*trees, "--accept_changes", "policy.weights"]) == 0
    assert "warning: This run mixes different policies" in capsys.readouterr().out
    export = ["export", str(tmp_path / "run"), "--test_size", "0", "--output_dir", str(tmp_path / "data")]
    assert main(export) == 0
    assert "This run mixes different policies" in capsys.readouterr().out
    assert "policy.weights" in (tmp_path / "data" / "README.md").read_text()


@pytest.mark.slow
def test_real_step_search(tmp_path, two_policies, capsys):
    """With a real engine and a real reward model, whose weights are exchanged at the same paths."""
    policy, model = tmp_path / "policy", tmp_path / "model"
    save_checkpoint(tmp_path / "model-1", max_position_embeddings=1024)
    replaced(tmp_path / "model-2", tmp_path / "model-1")
    other = AutoModelForTokenClassification.from_pretrained(tmp_path / "model-2")
    with torch.no_grad():
        other.score.weight.mul_(-1)
    other.save_pretrained(tmp_path / "model-2")
    problems = write_rows(tmp_path / "problems.jsonl", KNOWN)
    search = ["step-search", "--problems", problems, "--policy", str(policy), "--engine", "transformers", *PROMPT]
    search += ["--reward_model", str(model), "--n", "2", "--max_step_tokens", "30", "--overwrite"]
    search += ["--output_dir", str(tmp_path / "out")]
    replaced(policy, two_policies[0])
    replaced(model, tmp_path / "model-1")
    assert main([*search, "--limit", "2"]) == 0
    replaced(model, tmp_path / "model-2")
    assert main(search) == 1
    assert "reward_model.weights was" in capsys.readouterr().err
    replaced(model, tmp_path / "model-1")
    replaced(policy, two_policies[1])
    assert main(search) == 1
    assert "policy.weights was" in capsys.readouterr().err
    assert main([*search, "--accept_changes", "policy.weights"]) == 0
    assert any("mixes different policies" in warning for warning in load_results(tmp_path / "out").warnings)
