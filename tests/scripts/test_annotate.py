"""The command `annotate`, from problems to nodes, with a real engine on a tiny policy, and its errors."""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trl_hrm import AnnotateConfig
from trl_hrm.cli import main
from trl_hrm.data.problems import exclusion_key, problem_key
from trl_hrm.search.nodes import read_trees
from trl_hrm.search.outcomes import describe_outcomes
from trl_hrm.search.run_folder import node_files, read_summary

from ..search.policies import KNOWN


SETTINGS = (
    "--engine transformers --prompt question --prompt_style plain --segmentation step_header --final_stops "
    "--num_children 3 --max_depth 4 --max_step_tokens 40 --max_in_flight 24"
).split()
SETTINGS.insert(SETTINGS.index("--final_stops") + 1, "# END!")


@pytest.fixture
def problems(tmp_path) -> str:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in KNOWN))
    return str(path)


def annotate(policy, problems, folder, *more) -> int:
    return main(
        ["annotate", "--problems", problems, "--policy", policy, "--output_dir", str(folder), *SETTINGS, *more]
    )


def trees_of(folder) -> dict:
    return {tree.problem.problem_id: tree for file in node_files(folder) for tree in read_trees(file)}


def test_from_problems_to_nodes_and_more_problems(tmp_path, policy, problems, capsys):
    """A run that starts with few problems and continues with all must have the same rows as one with all from the start."""
    assert annotate(policy, problems, tmp_path / "a", "--limit", "2") == 0
    assert annotate(policy, problems, tmp_path / "a") == 0
    printed = capsys.readouterr().out
    assert "problems: 4 done" in printed
    assert describe_outcomes(read_summary(tmp_path / "a")["solutions"]) in printed  # once per start
    assert annotate(policy, problems, tmp_path / "b") == 0
    assert read_summary(tmp_path / "a")["solutions"] == read_summary(tmp_path / "b")["solutions"]
    assert trees_of(tmp_path / "a") == trees_of(tmp_path / "b")
    leaves = Counter(
        node.correct for tree in trees_of(tmp_path / "a").values() for node in tree.nodes if node.is_final
    )
    assert leaves[True] >= 10 and leaves[False] >= 10, leaves  # the policy solves the problems half of the time
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["engine"]["model"] == policy and manifest["search"]["num_children"] == 3
    assert manifest["seed"] == 42 and manifest["versions"]["trl_hrm"]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ("--max_depth 1", "are cut off at the maximum depth. Raise --max_depth (now 1) in a new --output_dir."),
        ("--max_step_tokens 2", "at the maximum number of tokens. Raise --max_step_tokens (now 2) in a new --output_dir."),
        ("--search rollouts --max_solution_tokens 3", "Raise --max_solution_tokens (now 3) in a new --output_dir."),
        ("--search puct --max_solution_tokens 3", "Raise --max_solution_tokens (now 3) in a new --output_dir."),
        ("--extractors boxed", "asks for an answer, that --extractors (now 'boxed') match the answers"),
    ],
)  # fmt: skip
def test_a_warning_about_useless_samples_names_the_option(tmp_path, policy, problems, capsys, options, advice):
    words = [word for word in SETTINGS if word not in "--num_children --max_depth --max_step_tokens 3 4 40".split()]
    if "--search" not in options:
        words += "--num_children 3 --max_depth 4 --max_step_tokens 40".split()
    base = ["annotate", "--problems", problems, "--policy", policy, "--output_dir", str(tmp_path / "run"), *words]
    assert main([*base, *options.split()]) == 0
    printed = capsys.readouterr().out
    assert advice in printed.partition("warning: ")[2], printed


def test_unreadable_references_are_named(tmp_path, policy, capsys):
    rows = [*KNOWN, {"id": "odd", "problem": "What is half?", "answer": r"\frac{"}]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert annotate(policy, str(tmp_path / "problems.jsonl"), tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert (
        "1 ungradable" in printed and "1 problem has an unreadable reference answer and was skipped: odd (" in printed
    )


def test_shards_of_the_command(tmp_path, policy, problems):
    for shard in range(3):
        assert annotate(policy, problems, tmp_path / "three", "--shard", f"{shard}/3") == 0
    assert annotate(policy, problems, tmp_path / "one") == 0
    assert trees_of(tmp_path / "three") == trees_of(tmp_path / "one")
    assert read_summary(tmp_path / "three")["problems"] == {"done": 4}
    (tmp_path / "three" / "summary-00001-of-00003.json").unlink()
    assert read_summary(tmp_path / "three")["shards_missing"] == 1


def test_other_settings_are_refused(tmp_path, policy, problems, capsys):
    """A rejected restart must leave no files: an empty log would count as a shard."""
    assert annotate(policy, problems, tmp_path / "run") == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert annotate(policy, problems, tmp_path / "run", "--temperature", "0.5") == 1
    assert "engine.temperature was 1.0 and is 0.5" in capsys.readouterr().err
    assert annotate(policy, problems, tmp_path / "run", "--shard", "0/2") == 1
    assert "num_shards was 1 and is 2" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_options_of_the_chat_template(tmp_path, policy, problems, capsys):
    """The options change the prompt, so they are saved, and a restart with different options is rejected."""
    chat = tmp_path / "chat"
    shutil.copytree(policy, chat)
    (chat / "chat_template.jinja").write_text(
        "{{ strftime_now('%Y') }}{% if think %}Think.{% endif %}{{ messages[0]['content'] }}"
    )
    rows = [*KNOWN[:1], {"problem": "What is<|endoftext|> 1 - 1 + 7?", "answer": "7"}]
    Path(problems).write_text("".join(json.dumps(row) + "\n" for row in rows))
    think = ["--prompt_style", "chat", "--chat_template_kwargs", '{"think": true}']
    assert annotate(str(chat), problems, tmp_path / "run", *think) == 0
    assert "such as '<|endoftext|>': 1." in capsys.readouterr().out
    prompt = json.loads((tmp_path / "run" / "manifest.json").read_text())["prompt"]
    assert prompt["chat_template_kwargs"] == {"think": True} and prompt["chat_template_date"] == "2024-07-26"
    log = (tmp_path / "run" / "log-00000-of-00001.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in log]
    ids = [event["prompt_ids"] for event in events if event.get("event") == "problem"]
    tokenizer = AutoTokenizer.from_pretrained(chat)
    assert sorted(map(tokenizer.decode, ids)) == sorted(f"2024Think.{row['problem'].strip()}" for row in rows)
    assert not {tokenizer.eos_token_id} & {token for row in ids for token in row}
    for more, message in (
        (think[:2], "prompt.chat_template_kwargs.think was true and is null"),
        ([*think, "--chat_template_date", "2025-01-01"], 'was "2024-07-26" and is "2025-01-01"'),
        ([*think[:3], '{"thinking": true}'], "sets thinking"),
        ([*think[:3], '["think"]'], "must be a JSON object"),
    ):
        assert annotate(str(chat), problems, tmp_path / "run", *more) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--num_solutions", "3"],
            "`num_solutions`",
        ),
        (
            ["--search", "puct", "--num_children", "3"],
            "`num_children`",
        ),
        (["--policy_urls", "http://x"], "`policy_urls` only applies to engine openai"),
        (["--step_pattern", "x"], "`step_pattern` is 'x'"),
        (["--prompt", "poem"], "`prompt` is 'poem'"),
        (["--prompt_style", "chat"], "Use --prompt_style plain"),
        (["--max_sequences", "5"], "`max_sequences` is 5. It must be at least 12"),
        (["--max_in_flight", "1"], "`max_in_flight` is 1. It must be at least 3"),
        (["--max_open_problems", "0"], "`max_open_problems` is 0"),
        (["--grader_workers", "0"], "`grader_workers` is 0"),
        (["--engine_args", "5"], "`engine_args` is 5"),
    ],
)
def test_options_that_cannot_work(tmp_path, policy, problems, capsys, more, message):
    words = list(SETTINGS)
    if "puct" in more:
        words = words[: words.index("--num_children")] + words[words.index("--max_in_flight") :]
    arguments = ["annotate", "--problems", problems, "--policy", policy, "--output_dir", str(tmp_path / "run")]
    assert main([*arguments, *words, *more]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("nodes-*"))
    if "--max_in_flight" not in more:  # found only when the search starts, unlike the settings in the manifest
        assert not (tmp_path / "run").exists(), "the next start would be compared with these settings"


@pytest.mark.parametrize(
    "options",
    [{}, {"num_children": 2}, {"num_children": 1, "root_filter": 2}, {"search": "puct"}]
    + [{"search": "rollouts"} | found for found in ({}, {"num_solutions": 1}, {"num_completions": 0})],
)
def test_greedy_samples(options):
    """They are all the same, so the labels said 0 or 1 whatever the number of samples."""
    needed = {"problems": "p.jsonl", "policy": "p", "engine": "transformers", "output_dir": "out"}
    with pytest.raises(
        ValueError, match="`temperature` is 0, so all samples .* would be the same.*`num_completions=0`"
    ):
        AnnotateConfig(temperature=0, **needed, **options)
    for once in ({"num_children": 1}, {"search": "rollouts", "num_solutions": 1, "num_completions": 0}):
        assert AnnotateConfig(temperature=0, **needed, **once).temperature == 0


def test_a_filter_of_one_sample():
    """It was refused after the policy had been loaded, without the name of the option."""
    with pytest.raises(ValueError, match="`root_filter` is 1. It must be at least 2."):
        AnnotateConfig(problems="p.jsonl", policy="p", engine="transformers", output_dir="out", root_filter=1)


def test_bad_problems(tmp_path, policy, capsys):
    """Bad problems are skipped and named, and the others are searched. With --strict nothing starts."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "1+2?", "answer": ""}\n')
    assert annotate(policy, str(path), tmp_path / "run", "--strict") == 1
    assert f"{path}:2" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert annotate(policy, str(path), tmp_path / "lenient") == 0
    printed = capsys.readouterr().out
    assert "2 records: 1 problems, 0 repeated, 0 excluded, 1 dropped." in printed
    assert f"warning: 1 row dropped (no answer): {path}:2" in printed and len(trees_of(tmp_path / "lenient")) == 1
    path.write_text('{"id": "a", "problem": "1+1?", "answer": "2"}\n{"id": "a", "problem": "1+2?", "answer": "3"}\n')
    assert annotate(policy, str(path), tmp_path / "run", "--strict") == 1
    message = capsys.readouterr().err
    assert f"{path}:2" in message and f"{path}:1" in message
    assert not (tmp_path / "run").exists()


def test_problems_of_public_datasets_with_other_columns(tmp_path, policy):
    """A compressed JSON array with nested answers must give the same trees as plain rows."""
    rows = [{"Frage": row["problem"], "gold": {"value": row["answer"]}} for row in KNOWN[:2]]
    path = tmp_path / "problems.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows, indent=1).encode()))
    assert annotate(policy, str(path), tmp_path / "a", "--columns", "problem=Frage", "answer=gold.value") == 0
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({k: row[k] for k in ("problem", "answer")}) + "\n" for row in KNOWN[:2]))
    assert annotate(policy, str(plain), tmp_path / "b") == 0
    assert trees_of(tmp_path / "a") == trees_of(tmp_path / "b") and len(trees_of(tmp_path / "a")) == 2


def test_a_run_of_an_earlier_version_is_not_resumed_under_other_ids(tmp_path, policy, capsys):
    """Resuming would search all problems again, and an export would have two trees of each."""
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"problem": "What is 1+1?", "answer": "2"}) + "\n")
    assert annotate(policy, str(path), tmp_path / "run") == 0
    log = tmp_path / "run" / "log-00000-of-00001.jsonl"
    key, earlier = problem_key("What is 1+1?").hex(), exclusion_key("What is 1+1?").hex()
    log.write_text(log.read_text().replace(key, earlier))
    before = log.read_bytes()
    capsys.readouterr()
    assert annotate(policy, str(path), tmp_path / "run") == 1
    assert (
        "started by an older version of trl_hrm, in which problem ids ignored letter case" in capsys.readouterr().err
    )
    assert log.read_bytes() == before


@pytest.mark.slow  # test_signals.py stops annotate, and test_scheduler.py resumes it
def test_stopped_by_hand_and_started_again(tmp_path, policy):
    """Ctrl-C prints one line without a traceback, and the next start does the rest."""
    many = [{"problem": f"What is {i} + 1, for the {i}th time?", "answer": str(i + 1)} for i in range(15)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in many))
    command = [sys.executable, "-m", "trl_hrm.cli", "annotate", "--problems", str(path), "--policy", policy]
    command += ["--output_dir", str(tmp_path / "run"), *SETTINGS, "--engine_args", '{"batch_size": 3}']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log-00000-of-00001.jsonl"
    while process.poll() is None and (not log.exists() or log.stat().st_size < 5000):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Run the same command again to resume" in errors
    assert "Traceback" not in errors
    done = len(trees_of(tmp_path / "run"))
    assert done < 15
    assert main(command[3:]) == 0
    assert len(trees_of(tmp_path / "run")) == 15


def test_processes_share_the_problems(tmp_path, monkeypatch, policy, problems):
    """The environment of `accelerate launch` gives each of two processes half of the problems. The slow test below launches them."""
    for rank in ("1", "0"):  # neither waits for the other
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")  # the command removes both
        assert annotate(policy, problems, tmp_path / "two") == 0
    monkeypatch.undo()
    assert len(list((tmp_path / "two").glob("log-*-of-00002.jsonl"))) == 2
    assert annotate(policy, problems, tmp_path / "one") == 0
    assert trees_of(tmp_path / "two") == trees_of(tmp_path / "one")


@pytest.mark.slow  # a launcher and two processes
def test_launched_processes_share_the_problems(tmp_path, policy, problems):
    """Two processes of `accelerate launch` each take half of the problems, and neither waits for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = Path(__file__).resolve().parents[2] / "accelerate_configs" / "cpu_2proc.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [
        "--main_process_port",
        str(port),
        "-m",
        "trl_hrm.cli",
        "annotate",
        "--problems",
        problems,
        "--policy",
        policy,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "two"), *SETTINGS], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "two").glob("log-*-of-00002.jsonl"))) == 2
    assert annotate(policy, problems, tmp_path / "one") == 0
    assert trees_of(tmp_path / "two") == trees_of(tmp_path / "one")


def test_a_dry_run_counts_samples_without_sampling(tmp_path, policy, problems, capsys):
    assert annotate(policy, problems, tmp_path / "run", "--dry_run", "--limit", "3") == 0
    printed = capsys.readouterr().out
    assert KNOWN[0]["problem"] in printed and "Shard 0/1: 3 problems." in printed
    samples = 3 + 9 + 27 + 81  # three children down to depth 4
    assert (
        f"At most {samples:,} samples and {samples * 40:,} sampled tokens per problem, {3 * samples:,} and" in printed
    )
    assert not (tmp_path / "run").exists()
    more = "--search rollouts --num_solutions 5 --num_completions 0 --root_filter 4 --dry_run".split()
    words = [word for word in SETTINGS if word not in "--num_children --max_depth --max_step_tokens 3 4 40".split()]
    command = ["annotate", "--problems", problems, "--policy", policy, "--output_dir", str(tmp_path / "run")]
    assert main([*command, *words, *more]) == 0
    assert f"At most 9 samples and {9 * 2048:,} sampled tokens per problem" in capsys.readouterr().out
