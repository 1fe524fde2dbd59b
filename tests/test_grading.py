r"""Answers: how they are found in solutions, how they are read, and that no failure of the grader becomes a label."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from trl_hrm.grading import AnswerGrader, Grade, GraderError, extract_answer, judge, thinking_spans, visible_text


@pytest.fixture(scope="module", autouse=True)
def shared_graders():
    """Each grader of this file starts its own workers, which the tests kill, block and count."""


HANGS = "9^{9^{9^9}}"
RIGHT, WRONG = Grade(True, "graded"), Grade(False, "graded")
UNCLEAR = Grade(None, "unparseable")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("# Step 1\n\n3+3=6\n\n# Answer\n\n6\n# END!", "6"),
        ("# Answer\n\n6", "6"),
        ("# Answer\r\n\r\n6\r\n# END!\r\n", "6"),
        ("## Answer:\n6", "6"),
        ("# Answer\n\n5\n\nNo, wait.\n\n# Answer\n\n6\n# END!\n\nAnd so on: 7", "6"),
        ("# Answer\n\nx = 1\nor x = 2\n# END!", "x = 1\nor x = 2"),
        ("# Answer\n\nx = 3\ny = 4", "x = 3\ny = 4"),
        # Labels belong to the answer if it begins with one
        ("# Answer\n\nWidth: 3\nHeight: 4", "Width: 3\nHeight: 4"),
        ("# Answer\n\n3\nHeight: 4", "3"),
        # The policy stopped after the marker
        ("3+3=6\n\n# Answer\n\n", None),
        ("# Answer\n\n# END!", None),
        ("# Answer\n\n5\n\n# Answer\n", None),
        # Not a marker: inside a sentence, or a different heading
        ("the # Answer is 6", None),
        ("# Answers\n\n6", None),
        # An empty marker falls back to the box
        ("It is $\\boxed{6}$.\n\n# Answer\n", "6"),
        # The marker has priority
        ("\\boxed{5}\n\n# Answer\n\n6", "6"),
    ],
)
def test_marker(text, answer):
    """The stop strings in the papers' prompts determine which part of a solution is its answer."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{72}.", "72"),
        (r"\boxed{1} and then \boxed{ 2 }", "2"),
        (r"\fbox{3}", "3"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),  # an escaped brace does not count
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\fbox{1}, 2}", r"\fbox{1}, 2"),
        (r"\boxed{\boxed{1}+\boxed{2}}", r"\boxed{1}+\boxed{2}"),
        ("\\boxed{x\n= 6}", "x\n= 6"),
        (r"\boxed{}", None),
        (r"\boxed{\frac{1}{2}", None),  # cut off
        (r"\boxed{1}, no, \boxed{\frac{2", None),  # the truncated box is the answer, not an earlier box
        (r"\boxed 5", "5"),
        ("no box", None),
    ],
)
def test_boxed(text, answer):
    r"""A pattern up to the first `}` would read `\frac{1` from the most common kind of answer in MATH."""
    assert extract_answer(text, ["boxed"]) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = 24\n#### 72", "72"),
        ("#### 72\nNo.\n#### $1,234.\n", "$1,234."),
        ("####-3", "-3"),
        ("#### ", None),
        ("##### 5", None),
        ("is #### 5", None),
    ],
)
def test_hash(text, answer):
    assert extract_answer(text, ["hash"]) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("from 3 to 72.", "72"),
        ("it costs $1,234.50 now", "1,234.50"),
        ("10-3", "3"),
        ("(x)-3", "3"),
        ("it is -3", "-3"),
        ("it is −3", "-3"),
        ("he lost -$5", "-5"),
        ("that is 3/4 of it", "3/4"),
        ("odds .5", ".5"),
        ("1,2,3", "3"),
        ("1,234,56", "56"),
        ("in v1.2.3", None),
        ("x2 and CO2", None),
        ("none", None),
    ],
)
def test_last_number(text, answer):
    assert extract_answer(text, ["last_number"]) == answer


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("no tags", "no tags"),
        ("<think>a</think>b", "b"),
        ("a<think>b</think>c<think>d</think>e", "ace"),
        ("a</think>b", "b"),  # the template opened the tag in the prompt
        ("a</think>b</think>c", "c"),
        ("<think>a</think>b</think>c", "c"),
        ("a<think>b", "a"),  # cut off while thinking
        ("<think>a", ""),
        ("<think>a</think>b<think>c", "b"),
        ("<think>a <think> b</think>c", "c"),  # the inner tag is part of the thinking
        ("<THINKING>\na\n</THINKING>\nb", "\nb"),
        ("[THINK]a[/THINK]b", "b"),
        ("◁think▷a◁/think▷b", "b"),
        ("2 < think > 1", "2 < think > 1"),
    ],
)
def test_thinking_is_removed(text, visible):
    assert visible_text(text) == visible
    hidden = {i for start, end in thinking_spans(text) for i in range(start, end)}
    assert "".join(character for i, character in enumerate(text) if i not in hidden) == visible


def test_extractors_are_tried_in_the_given_order():
    text = "\\boxed{1}\n#### 2\nthen 3"
    assert [extract_answer(text, [name]) for name in ("marker", "boxed", "hash", "last_number")] == [
        None,
        "1",
        "2",
        "3",
    ]
    assert extract_answer(text) == "1"
    assert extract_answer(text, ("hash", "boxed")) == "2"
    assert extract_answer("only 3") is None  # the last number counts only on request
    with pytest.raises(
        ValueError,
        match="'box'.* marker, tag, boxed, hash, answer_is, last_number",
    ):
        extract_answer(text, ("boxed", "box"))


@pytest.mark.parametrize(
    ("answer", "reference", "grade"),
    [
        # What policies write around an answer
        *[
            (answer, "72", RIGHT)
            for answer in (
                *("72", " 72.\n", "$72$", r"\(72\)", r"\[ 72 \]", "$$72$$", r"\boxed{72}", r"$\boxed{72}$.", "**72**"),
                *("72 clips", "$72", r"\$72.00", "72 cm", r"72\text{ cm}^2", "x = 72", "144/2", "72°", "€72"),
                *(
                    "**Answer:** 72",
                    "The answer is **$72$**.",
                    "It is $ 72 $",
                    r"So \(x\) is \boxed{72}.",
                    r"x = \boxed{72}",
                ),
                *("The answer is 72.", "Final answer: **72**", "He has $72 left.", r"The answer is $\frac{144}{2}$."),
            )
        ],
        ("$1,234.", "1234", RIGHT),
        ("1234", r"1,\!234", RIGHT),
        # Values, not texts
        (r"\dfrac12", r"\frac{1}{2}", RIGHT),
        ("0.5", r"\frac{1}{2}", RIGHT),
        ("1 4/5", "9/5", RIGHT),
        ("50%", "0.5", RIGHT),
        ("50 percent", r"50\%", RIGHT),
        ("−5", "-5", RIGHT),
        ("2sqrt(2)", r"\sqrt{8}", RIGHT),
        ("2pi", r"2\pi", RIGHT),
        ("-q+p", "p - q", RIGHT),
        ("-2,1", "1,-2", RIGHT),
        ("[-2,7]", r"x \in [-2,7]", RIGHT),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", RIGHT),
        ("73", "72", WRONG),
        ("-72", "72", WRONG),
        ("-5 apples", "5", WRONG),
        ("q - p", "p - q", WRONG),
        ("(2,1)", "(1,2)", WRONG),
        ("(3,4]", "(3,4)", WRONG),
        ("2", "2xyz", WRONG),
        ("3 or 4", "4", WRONG),
        (r"\boxed{3} or \boxed{4}", "4", WRONG),
        ("$x=3$ or $x=4$", "4", WRONG),
        ("$x=3$ and $y=4$", "x=3, y=4", RIGHT),
        (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", WRONG),
        # Only the reference determines whether an equation or its right side is expected
        ("2x+z=1", "1", RIGHT),
        ("1", "2x+z=1", WRONG),
        # Words
        ("Evelyn", r"\text{Evelyn}", RIGHT),
        (r"\textbf{evelyn}.", "Evelyn", RIGHT),
        (r"It is $\text{Evelyn}$.", r"\text{Evelyn}", RIGHT),
        ("Carla", r"\text{Evelyn}", WRONG),
        ("72", r"\text{Evelyn}", WRONG),
        ("C", r"\text{(C)}", RIGHT),
        ("(B)", r"\text{(C)}", WRONG),
        ("yes", "no", WRONG),
        ("no", "yes", WRONG),
        # Neither right nor wrong
        ("not Evelyn", r"\text{Evelyn}", UNCLEAR),
        ("May 5", "June 5", UNCLEAR),
        ("He got $48 and she $24.", "24", UNCLEAR),
        ("5 million", "5", UNCLEAR),
        ("between 3 and 7", "7", UNCLEAR),
        ("I do not know", "3", UNCLEAR),
        (r"\frac{1}{", "3", UNCLEAR),
        ("", "3", UNCLEAR),
        # An unreadable reference gives no grade, even for the same text
        ("3", "???", Grade(None, "ungradable")),
        (r"\frac{1}{", r"\frac{1}{", Grade(None, "ungradable")),
    ],
)
def test_judge(answer, reference, grade):
    """A wrong grade is a false label for every step above the answer."""
    assert judge(answer, reference) == grade


@pytest.fixture(scope="module")
def grader():
    with AnswerGrader() as grader:
        yield grader


def math500(shared_data):
    lines = (shared_data / "math500" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"] for line in lines]


def test_real_references_are_right(grader, shared_data):
    """All 500 answers of MATH-500 in a policy's wording, so that texts differ and math-verify decides."""
    answers = math500(shared_data)
    assert len(answers) == 500
    pairs = [
        (written, answer) for answer in answers for written in (f"${answer}$", f"So it is $\\boxed{{{answer}}}$.")
    ]
    assert [pair for pair in pairs if grader.grade(*pair) != RIGHT] == []


def test_real_references_of_other_problems_are_wrong(grader, shared_data):
    """Each reference against the next one. Equal only where two differ in their unit."""
    answers = sorted(set(math500(shared_data)))
    assert len(answers) == 301
    grades = {pair: grader.grade(*pair) for pair in zip(answers, answers[1:], strict=False)}
    assert [pair for pair, grade in grades.items() if grade.correct] == [
        ("120", r"120^\circ"),
        ("15", r"15\mbox{ cm}^2"),
        ("30", r"30^\circ"),
        ("36", r"36^\circ"),
    ]
    assert [pair for pair, grade in grades.items() if grade == UNCLEAR] == [(r"\text{even}", r"\{1\pm\sqrt{5},-2\}")]


def test_numbers(grader, gsm8k):
    """GSM8K's answers against themselves with a unit, and against the next number."""
    lines = gsm8k.read_text(encoding="utf-8").splitlines()
    numbers = sorted({extract_answer(json.loads(line)["answer"], ["hash"]) for line in lines})
    assert len(numbers) == (12 if gsm8k.stem == "gsm8k" else 353)
    assert any("," in number for number in numbers) and any(number.startswith("-") for number in numbers)
    assert {grader.grade(f"{number} dollars", number) for number in numbers} == {RIGHT}
    assert {grader.grade(str(float(number.replace(",", "")) + 1), number) for number in numbers} == {WRONG}


def test_a_hanging_answer_is_killed_and_the_next_one_graded():
    """SymPy computes this power without handling signals, so only killing the process stops it."""
    with AnswerGrader(timeout=2) as grader:
        process = grader._workers[0].process
        assert grader.grade(HANGS, "7") == Grade(None, "timeout")
        assert process.exitcode is None or process.exitcode == -signal.SIGKILL
        assert grader.grade("14/2", "7") == RIGHT
        assert grader._workers[0].process is not process
        replaced = grader._workers[0].process
        assert grader.grade(HANGS, "7") == Grade(None, "timeout")  # already known: no second timeout, no new worker
        assert grader._workers[0].process is replaced
        counts = grader.counts()
    assert counts == {
        "num_graded": 1,
        "num_unparseable": 0,
        "num_ungradable": 0,
        "num_timeouts": 1,
        "num_died": 0,
        "num_cached": 1,
    }


def test_a_worker_that_was_killed_while_idle_is_replaced():
    """The kernel may kill any process when memory is short. Some process pools cannot recover from that."""
    with AnswerGrader() as grader:
        for number in range(3):
            os.kill(grader._workers[0].process.pid, signal.SIGKILL)
            assert grader.grade(f"{number}+0", f"{number}") == RIGHT
        assert grader.counts()["num_died"] == 0


FAKE = """
import os, sys, time
LOG = {log!r}
def note(text):
    with open(LOG, "a") as file:
        file.write(text + "\\n")
class LatexExtractionConfig: pass
def parse(text, *args, **kwargs):
    return [text.removeprefix("\\\\boxed{{").removesuffix("}}")]
def verify(gold, found, **kwargs):
    note(found[0])
    if found == ["9z"]:
        os._exit(3)
    time.sleep(0.2 * (found == ["8z"]))
    return {verdict}
note("torch" if "torch" in sys.modules else "light")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a fake math-verify before the real one, also in workers. Return a function that reads its log."""

    def write(verdict="found[0] in ('y+x', '8z')", code=FAKE):
        log = tmp_path / "log"
        (tmp_path / "math_verify.py").write_text(textwrap.dedent(code).format(log=str(log), verdict=verdict))
        monkeypatch.syspath_prepend(str(tmp_path))
        return lambda: log.read_text().split()

    return write


@pytest.mark.parametrize("verdict", ["False", "True", "1 / 0"])
def test_a_broken_math_verify_refuses_to_start(fake, verdict):
    """By default, math-verify returns `False` on its own errors: every answer would be wrong and every label 0."""
    fake(verdict)
    with pytest.raises(
        GraderError,
        match="math-verify .* graded the answer '.*' to the reference .*expected correct=.*Reinstall math-verify",
    ):
        AnswerGrader().__enter__()


def test_a_missing_math_verify_refuses_to_start(fake, capfd):
    fake(code="raise ImportError('no module named antlr4')")
    with pytest.raises(GraderError, match="math-verify is installed"):
        AnswerGrader().__enter__()
    assert "no module named antlr4" in capfd.readouterr().err


def test_an_answer_that_kills_its_worker_twice_has_no_label(fake):
    log = fake()
    with AnswerGrader() as grader:
        assert grader.grade("9z", "7z") == Grade(None, "died")
        assert grader.grade("8z", "7z") == RIGHT
        assert grader.counts()["num_died"] == 1
    assert [line for line in log() if line == "9z"] == ["9z", "9z"]


def test_each_pair_is_graded_once(fake):
    """Most rollouts of a problem share a few answers, and these arrive together."""
    log = fake()

    async def ask(grader):
        return await asyncio.gather(*[grader.agrade(["8z", " 8z\n"][i % 2], "7z") for i in range(10)])

    with AnswerGrader(num_workers=2) as grader:
        assert asyncio.run(ask(grader)) == [RIGHT] * 10
        assert grader.grade("8z", "7z") == RIGHT
        assert grader.grade("8z", "6z") == RIGHT  # a different pair
        assert grader.counts() | {"num_graded": 2, "num_cached": 10} == grader.counts()
    assert [line for line in log() if line == "8z"] == ["8z", "8z"]


def test_cancelling_one_task_does_not_cancel_the_others(fake):
    """A cancelled search task must not cancel the grade for other tasks with the same answer."""
    fake()

    async def ask(grader):
        busy = asyncio.create_task(grader.agrade("8z", "6z"))  # the others wait for the worker and can be cancelled
        first = asyncio.create_task(grader.agrade("8z", "7z"))
        second = asyncio.create_task(grader.agrade("8z", "7z"))
        await asyncio.sleep(0)
        first.cancel()
        return await asyncio.gather(busy, first, second, return_exceptions=True)

    with AnswerGrader() as grader:
        _, first, second = asyncio.run(ask(grader))
    assert isinstance(first, asyncio.CancelledError)
    assert second == RIGHT


def test_workers_stay_light(fake):
    """If workers imported torch, a dozen would take gigabytes, and seconds to restart."""
    log = fake()
    with AnswerGrader():
        pass
    assert log()[0] == "light"


def test_many_at_once():
    """Every caller gets its own grade, including timeouts, while the event loop keeps running."""

    async def ask(grader):
        asked = [grader.agrade(HANGS if i == 50 else f"{i}+1", f"{i + i % 2}") for i in range(100)]
        ticks = asyncio.create_task(tick())
        grades = await asyncio.gather(*asked)
        ticks.cancel()
        return grades

    num_ticks = 0

    async def tick():
        nonlocal num_ticks
        while True:
            await asyncio.sleep(0.01)
            num_ticks += 1

    with AnswerGrader(num_workers=2, timeout=2) as grader:
        grades = asyncio.run(ask(grader))
        pids = [worker.process.pid for worker in grader._workers if worker.process]
    assert grades == [Grade(None, "timeout") if i == 50 else (RIGHT if i % 2 else WRONG) for i in range(100)]
    assert num_ticks > 10
    assert pids  # a killed worker is replaced only when it is needed
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


ORPHANS = """
import sys, time
from trl_hrm.grading import AnswerGrader
if __name__ == "__main__":
    with AnswerGrader(num_workers=2, timeout=1000 if len(sys.argv) == 1 else 0.5) as grader:
        grader.grade("1+1", "2")
        hangs = grader._submit({hangs!r}, "7") if len(sys.argv) > 1 else None
        time.sleep(0.2)
        print(*[worker.process.pid for worker in grader._workers if worker.process], flush=True)
        time.sleep(1000)
"""


@pytest.mark.parametrize("busy", [[], pytest.param(["busy"], marks=pytest.mark.slow)], ids=["idle", "busy"])
def test_a_killed_run_leaves_no_worker_behind(tmp_path, busy):
    """After twenty kills, twenty orphaned workers would still be computing."""
    script = tmp_path / "script.py"
    script.write_text(ORPHANS.format(hangs=HANGS))
    parent = subprocess.Popen([sys.executable, str(script), *busy], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "`num_workers` is 0. It must be at least 1"),
        ({"timeout": 0}, "`timeout` is 0. It must be greater than 0"),
        ({"timeout": float("nan")}, "`timeout` is nan. It must be greater than 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AnswerGrader(**options)


def test_describe(grader):
    """Another version of math-verify may grade differently, so the card must record it."""
    described = grader.describe()
    assert described["timeout"] == 10.0
    assert {"math-verify", "latex2sympy2_extended", "sympy"} < described.keys()


def test_importing_needs_no_math_verify():
    code = (
        "import sys, trl_hrm.grading\n"
        "assert not {'math_verify', 'sympy', 'torch', 'numpy'} & sys.modules.keys(), sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
