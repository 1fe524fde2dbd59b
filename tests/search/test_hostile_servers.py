"""Hostile servers of the policy: no wrong label, no lost run, no leaked API key, and bounded memory. From the command to the dataset."""

import json
import re
import resource
import socket
import threading
import traceback
import tracemalloc

import pyarrow.parquet as pq
import pytest

from trl_hrm import AnnotateConfig, ExportConfig, annotate, export
from trl_hrm.grading import AnswerGrader
from trl_hrm.search.engines.base import CharTokenizer, EngineFatal
from trl_hrm.search.log import EventLog
from trl_hrm.search.policy_config import PolicyConfig

from .hostile import CARDS, KEY, RESPONSE, TRANSPORT, HostileServer, raw
from .scripted import ExactGrade, read_trees


NUM_PROBLEMS = 3
MODES = TRANSPORT | RESPONSE
# Faults in every third request that end the run at once, because a retry cannot help
FATAL = {
    "redirect",
    "redirect to itself",
    "no content",
    "key in a rejection",
}
# These run with every change, the others with the slow tests
FAST = ["100,000 brackets", "key in an error", "prompt called too long", "id 2**31", "fewer tokens", "key as ids"]


class InstantGrader(AnswerGrader):
    """Compare strings, without processes."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    async def agrade(self, answer, reference):
        return ExactGrade(answer == reference)


@pytest.fixture(autouse=True, scope="module")
def fast_run():
    """Use one token per character, and no processes and pauses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_hrm.grading.AnswerGrader", InstantGrader)
        patch.setattr(PolicyConfig, "load_tokenizer", lambda self: CharTokenizer())
        patch.setattr(PolicyConfig, "model_identity", lambda self: {"tokenizer": "characters"})
        patch.setattr("trl_hrm.search.engines.http.MAX_PAUSE", 0.01)
        patch.setenv("OPENAI_API_KEY", KEY)
        yield


def search(servers, folder, **options):
    """Run or resume `annotate` in a folder with one or several servers."""
    problems = folder.with_name("problems.jsonl")
    rows = [{"problem_id": f"p{i}", "problem": f"What is {i} - {i} + 7?", "answer": "7"} for i in range(NUM_PROBLEMS)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"engine_args": {"timeout": 5.0, "max_retries": 3, "backoff": 0.0}} | options
    return annotate(
        AnnotateConfig(
            problems=str(problems),
            policy="lm",
            policy_urls=[server.url for server in servers],
            output_dir=str(folder),
            prompt="steps",
            prompt_style="plain",
            num_children=3,
            max_depth=4,
            max_step_tokens=60,
            max_in_flight=9,
            **options,
        )
    )


def labels(folder):
    """Export a run, and return the labelled trees of the dataset."""
    output = folder.with_name(f"{folder.name}-dataset")
    export(ExportConfig(inputs=[str(folder)], view="tree", labels="soft", output_dir=str(output)))
    return [row for path in sorted(output.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def honest(tmp_path_factory, fast_run):
    """Return the trees and labels of an honest server. Most labels are fractions, which depend on every sample."""
    folder = tmp_path_factory.mktemp("honest") / "run"
    with HostileServer() as server:
        search([server], folder)
    rows = labels(folder)
    values = [label for row in rows for label in row["labels"] if label is not None]
    assert len(values) > 30 and sum(0 < value < 1 for value in values) > 10
    return read_trees(folder), rows


def shown(error):
    """Return everything that a traceback of an error and of its causes shows."""
    return "".join(traceback.format_exception(error))


def check_run(folder, honest, capsys, error=None):
    """Check that everything in a folder is from honest responses, that the run can be resumed and exported, and that no key leaked."""
    trees, rows = honest
    if folder.exists():
        for name, tree in read_trees(folder).items():
            if tree.status == "done":
                assert tree == trees[name]
    written = "".join(capsys.readouterr()) + ("" if error is None else shown(error))
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert KEY not in written and not any(KEY.encode() in content for content in files)
    assert "\x1b" not in str(error) and not any(re.search(rb"(?<!\\)\\u001b", one) for one in files)
    with HostileServer() as server:
        run = search([server], folder)
    assert run.summary["problems"] == {"done": NUM_PROBLEMS}
    assert read_trees(folder) == trees and labels(folder) == rows


def pick(modes):
    return [pytest.param(name, id=name, marks=[] if name in FAST else [pytest.mark.slow]) for name in modes]


@pytest.mark.parametrize("name", pick(MODES))
def test_fault_in_every_request(name, tmp_path, honest, capsys):
    """The run fails with one line, or its problems are errors. It is resumed with an honest server."""
    options = {"engine_args": {"timeout": 0.3 if name == "slow" else 5.0, "max_retries": 1, "backoff": 0.0}}
    with HostileServer(MODES[name]) as server:
        with pytest.raises((EngineFatal, ValueError)) as error:  # the server, or "no problem could be searched"
            search([server], tmp_path / "run", **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    check_run(tmp_path / "run", honest, capsys, error.value)


@pytest.mark.parametrize("name", pick(MODES))
def test_fault_in_every_third_request(name, tmp_path, honest, capsys):
    """A retry heals it, and the labels are the same as without."""
    options = {"engine_args": {"timeout": 0.3 if name == "slow" else 5.0, "max_retries": 9, "backoff": 0.0}}
    error = None
    with HostileServer(MODES[name], every=3) as server:
        try:
            run = search([server], tmp_path / "run", **options)
        except EngineFatal as found:
            error = found
    assert (error is not None) == (name in FATAL)
    if error is None:
        assert run.summary["problems"] == {"done": NUM_PROBLEMS}
        assert read_trees(tmp_path / "run") == honest[0]
    check_run(tmp_path / "run", honest, capsys, error)


@pytest.mark.parametrize("name", CARDS)
def test_lists_of_models(name, tmp_path, capsys):
    """The server is refused before anything is written."""
    with HostileServer() as server:
        server.cards = lambda: CARDS[name]
        with pytest.raises(EngineFatal) as error:
            search([server], tmp_path / "run", engine_args={"max_retries": 1, "backoff": 0.0})
    assert not (tmp_path / "run").exists()
    assert KEY not in "".join(capsys.readouterr()) + shown(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["endless in chunks", "endless error", "gzip bomb", "many headers"])
def test_memory_is_bounded(name, tmp_path):
    """Without a limit, the client would need 6 GB within half a minute."""
    with HostileServer(MODES[name]) as server:
        tracemalloc.start()
        try:
            search([server], tmp_path / "run", engine_args={"timeout": 20.0, "max_retries": 0, "backoff": 0.0})
        except (EngineFatal, ValueError):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 << 20


def test_server_that_repeats_samples_is_refused(tmp_path, honest, capsys):
    """Each request is answered with its first sample, n times. Most labels would be 0 or 1."""

    def repeat(request, response):
        first = response["choices"][0]
        response["choices"] = [first | {"index": i} for i in range(len(response["choices"]))]

    with HostileServer(repeat, in_test=True) as server:
        with pytest.raises(EngineFatal, match="repeats samples.*only 2 different texts") as error:
            search([server], tmp_path / "run")
    check_run(tmp_path / "run", honest, capsys, error.value)
    # a server that is honest during the test gets a warning with figures
    with HostileServer(repeat) as server:
        run = search([server], tmp_path / "repeated")
    number = run.summary["repeats"]["requests"]
    assert number >= 10 and run.summary["repeats"]["repeated"] == number
    assert f"warning: in {number} of {number} requests for several samples, all samples are the same" in str(run)


def test_manifest_identifies_the_model_of_a_server(tmp_path, capsys):
    """A server that was restarted with another checkpoint under the same name would mix two policies in one run."""
    with HostileServer() as server:
        search([server], tmp_path / "run")
        search([server], tmp_path / "run")
        server.weights -= 0.05  # other hardware
        search([server], tmp_path / "run")
        server.weights -= 0.3
        with pytest.raises(ValueError, match="prompt_logprobs was"):
            search([server], tmp_path / "run")
        server.weights, server.max_length = -1.5, 9_000
        with pytest.raises(ValueError, match="max_model_len was 10000 and is 9000"):
            search([server], tmp_path / "run")


def test_servers_of_different_models(tmp_path):
    with HostileServer() as one, HostileServer() as other:
        other.weights -= 0.3
        with pytest.raises(EngineFatal, match="serves another model than the first server.*prompt_logprobs"):
            search([one, other], tmp_path / "run")


def test_no_file_descriptors(tmp_path, honest, capsys):
    """A limit of this machine must not be logged as a failed request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held, is_over, lock = [], threading.Event(), threading.Lock()
    spare = [socket.socket() for _ in range(16)]  # for the server, which is in this process and must not fail

    def hold_all():
        while not is_over.is_set():
            try:
                with lock:
                    held.append(socket.socket())
            except OSError:
                is_over.wait(0.0005)

    holder = threading.Thread(target=hold_all, daemon=True)

    def accept():
        with lock:
            while True:
                try:
                    return server.server.socket.accept()
                except OSError:
                    spare.pop().close()

    def exhaust(request, response):
        if server.num_asked == 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
            holder.start()
        return raw(json.dumps(response).encode(), {"Connection": "close"})  # every request needs a new connection

    with HostileServer(exhaust) as server:
        server.server.get_request = accept
        try:
            with pytest.raises(EngineFatal, match="cannot open another connection.*ulimit -n") as error:
                search([server], tmp_path / "run")
        finally:
            is_over.set()
            holder.join()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for one in [*held, *spare]:
                one.close()
    with EventLog(tmp_path / "run" / "log-00000-of-00001.jsonl") as log:
        assert not any(problem.num_errors for problem in log.problems.values())
    check_run(tmp_path / "run", honest, capsys, error.value)
