r"""
Prompts and verdicts of language models that judge the steps of a solution.

A [`JudgeTemplate`] says what the judge is asked and how its verdict is read. Verdicts are read strictly: a response that does not
end as the template requires has no verdict.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..encoding import CHAT_TEMPLATE_DATE, encode_around, find_control_text, render_chat
from ..grading import visible_text
from ..io import parse_json, read_text, shown
from ..schema import from_json
from ..search.steps import HEADER


_PLACEHOLDER = re.compile(r"\{(problem|steps|step|number|answer)\}")
_BOX = re.compile(r"\\boxed(?![A-Za-z])\s*(\{)?")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
# Fields that only apply to templates with verdicts in words
_WORD_FIELDS = ("next_user", "marker", "closing", "stop", "end", "yes", "no", "step_yes", "step_no")
# Why a response has no verdict
FAULTS = {
    "cut_off": "cut off at the maximum number of tokens",
    "empty": "empty, or only thinking",
    "no_verdict": "without a verdict at the end",
    "no_box": r"without a \boxed{}",
    "damaged_box": r"with a \boxed{} that is not closed",
    "several_boxes": r"with several different \boxed{}",
    "not_a_number": r"with another text than a number in \boxed{}",
    "no_such_step": "with the number of a step that does not exist",
    "contradiction": "with a verdict on the solution that contradicts the verdicts on its steps",
    "no_room": "without room for the verdict in the context of the model",
    "too_long": "not sampled, because the prompt does not fit into the context of the model",
}


@dataclass(frozen=True)
class Reading:
    """
    Verdict in a response, before the probability of its word is known.

    Args:
        before (`str`):
            Response up to the word of the verdict. The model continues it with one of the two words.
        verdict (`bool`, *optional*):
            Whether the response says that the step (or the solution) is correct. `None` if the response ends before the word, which
            the template then adds.
        steps (`tuple[bool, ...]`, *optional*, defaults to `()`):
            For `scope="solution"`, the verdict of each step that the judge has read, in order. The judge may stop at the first wrong
            step.
    """

    before: str
    verdict: bool | None
    steps: tuple[bool, ...] = ()


class FirstError(NamedTuple):
    """
    Vote of a response on the first wrong step of a solution.

    Args:
        vote (`int`, *optional*):
            Index of the first wrong step from 0, or `-1` if all steps are right. `None` if the response is unreadable.
        fault (`str`, *optional*):
            Why the response is unreadable, as in `FAULTS`.
    """

    vote: int | None
    fault: str | None = None


@dataclass(frozen=True)
class JudgeTemplate:
    r"""
    Prompt of a judge and the form of its verdict.

    Args:
        user (`str`):
            User message. `{problem}`, `{steps}` (all steps up to the judged one), `{step}` (the judged step), `{number}` (its number,
            from 1) and `{answer}` (the reference answer) are replaced.
        name (`str`, *optional*, defaults to `"custom"`):
            Name of the template.
        scope (`str`, *optional*, defaults to `"step"`):
            What one prompt asks for. `"step"`: one step, with the steps before it. `"turns"`: one step per user turn, with the judge's
            earlier responses between them. `"solution"`: all steps of a solution, and then the whole solution. `"first_error"`: the
            first wrong step of a solution, as a number in `\boxed{}`. See [`JudgeTemplate.read_first_error`].
        system (`str`, *optional*):
            System message.
        next_user (`str`, *optional*, defaults to `"{step}"`):
            User message of the second and later steps, for `scope="turns"`.
        step (`str`, *optional*, defaults to `"Step {number}: {step}"`):
            Form of each step in `{steps}`.
        step_separator (`str`, *optional*, defaults to `"\n\n"`):
            Text between the steps in `{steps}`.
        start (`str`, *optional*, defaults to `""`):
            Beginning of the response, which the model continues. `{number}` is replaced.
        marker (`str`, *optional*, defaults to `"Verdict:"`):
            Text before the word of the verdict. The last line of a response must be the marker and one of the words, apart from
            punctuation. Not used with `closing`.
        closing (`str`, *optional*):
            Text that is added to a finished response, and that the model continues with one of the words.
        stop (`list[str]`, *optional*):
            Strings that end a response, for `closing`. They are removed from it.
        end (`str`, *optional*, defaults to `""`):
            Text after the word in earlier responses, for `scope="turns"`.
        yes (`str`, *optional*, defaults to `"Yes"`), no (`str`, *optional*, defaults to `"No"`):
            The words of the verdict.
        step_yes (`str`, *optional*), step_no (`str`, *optional*):
            Strings that say whether a step is correct, for `scope="solution"`.
        first_number (`int`, *optional*, defaults to `1`):
            Number of the first step in `{steps}`, for `scope="first_error"`.
        none (`str`, *optional*, defaults to `"-1"`):
            Content of the box if no step is wrong, for `scope="first_error"`.
        max_tokens (`int`, *optional*, defaults to `1024`):
            Default maximum number of tokens of a response.
        temperature (`float`, *optional*, defaults to `0.7`):
            Default sampling temperature.

    Raises:
        `ValueError`: If a text lacks a placeholder, or the parts contradict each other.
    """

    user: str
    name: str = "custom"
    scope: Literal["step", "turns", "solution", "first_error"] = "step"
    system: str | None = None
    next_user: str = "{step}"
    step: str = "Step {number}: {step}"
    step_separator: str = "\n\n"
    start: str = ""
    marker: str = "Verdict:"
    closing: str | None = None
    stop: list[str] = field(default_factory=list)
    end: str = ""
    yes: str = "Yes"
    no: str = "No"
    step_yes: str | None = None
    step_no: str | None = None
    first_number: int = field(default=1, repr=False)
    none: str = field(default="-1", repr=False)
    max_tokens: int = 1024
    temperature: float = 0.7

    def __post_init__(self):
        needed = {"step": ("{problem}", "{step}", "{steps}"), "turns": ("{problem}", "{step}")}
        needed = needed.get(self.scope, ("{problem}", "{steps}"))
        if needed[0] not in self.user or not any(name in self.user for name in needed[1:]):
            raise ValueError(
                f"`user` does not contain {needed[0]} and {' or '.join(needed[1:])}, so the judge would not see them. Add them."
            )
        for name, text in (("next_user", self.next_user), ("step", self.step)):
            if "{step}" not in text:
                raise ValueError(f"`{name}` is {shown(text)}. It must contain {{step}}.")
        if self.max_tokens < 1 or not self.temperature >= 0:
            raise ValueError(
                f"`max_tokens` is {self.max_tokens} and `temperature` is {self.temperature}. They must be at least 1 and 0."
            )
        if self.scope == "first_error":
            self._check_first_error()
            return
        if (self.first_number, self.none) != (1, "-1"):
            raise ValueError(
                f"`first_number` and `none` only apply with `scope='first_error'`, but `scope` is {self.scope}. Remove them."
            )
        if not self.yes.strip() or not self.no.strip() or self.yes.strip() == self.no.strip():
            raise ValueError(
                f"`yes` is {shown(self.yes)} and `no` is {shown(self.no)}. They must be two different words."
            )
        if self.scope != "solution" and (self.step_yes or self.step_no):
            raise ValueError(
                f"`step_yes` and `step_no` only apply with `scope='solution'`, but `scope` is {self.scope}. Remove them."
            )
        if self.scope == "solution" and (not self.step_yes or not self.step_no or self.step_yes == self.step_no):
            raise ValueError(
                f"`step_yes` is {shown(self.step_yes)} and `step_no` is {shown(self.step_no)}. With `scope='solution'` they must be two "
                "different strings."
            )
        if self.closing is None and (self.stop or self.end):
            raise ValueError("`stop` and `end` only apply with `closing`. Remove them, or set `closing`.")
        if self.closing is None and not self.marker.strip():
            raise ValueError("`marker` is empty. Set it to the text before the verdict, such as 'Verdict:'.")
        if self.closing is None and not all(
            part in self.user + (self.system or "") for part in (self.marker, self.yes, self.no)
        ):
            raise ValueError(
                f"The prompt does not say that the response must end with {self.marker + ' ' + self.yes!r} or "
                f"{self.marker + ' ' + self.no!r}, so no verdict could be read. Add this to the prompt, or set `marker`, `yes` and `no`."
            )

    def _check_first_error(self) -> None:
        """Check the fields of a template that asks for the first wrong step."""
        defaults = {one.name: [] if one.name == "stop" else one.default for one in fields(self)}
        if given := [name for name in _WORD_FIELDS if getattr(self, name) != defaults[name]]:
            raise ValueError(
                f"`{given[0]}` has no effect with `scope='first_error'`, whose verdict is a number in \\boxed{{}}. Remove it."
            )
        if self.first_number < 0:
            raise ValueError(f"`first_number` is {self.first_number}. It must be at least 0.")
        is_step = _NUMBER.fullmatch(self.none) is not None and int(self.none) >= self.first_number
        if not self.none or self.none != self.none.strip() or set("{}") & set(self.none) or is_step:
            raise ValueError(
                f"`none` is {shown(self.none)}. It must be a text without braces that is not the number of a step, such as '-1'."
            )
        if "{number}" not in self.step:
            raise ValueError(f"`step` is {shown(self.step)}. It must contain {{number}}, which the judge names.")
        prompt = self.user + (self.system or "")
        if "\\boxed" not in prompt or self.none not in prompt:
            raise ValueError(
                f"The prompt does not say that the response must contain the number of the first wrong step in \\boxed{{}}, or "
                f"\\boxed{{{self.none}}} if all steps are right. Add this to the prompt, or set `none`."
            )

    def settings(self) -> dict[str, Any]:
        """Return the fields, for a file. Those of `scope="first_error"` are left out for other scopes, as in older files."""
        own = ("first_number", "none") if self.scope != "first_error" else ()
        return {name: value for name, value in asdict(self).items() if name not in own}

    @property
    def is_whole(self) -> bool:
        """Whether one prompt asks about a whole solution."""
        return self.scope in ("solution", "first_error")

    @property
    def needs_answer(self) -> bool:
        """Whether the prompt shows the reference answer."""
        return "{answer}" in self.user + self.next_user

    @classmethod
    def load(cls, name_or_path: str) -> "JudgeTemplate":
        """
        Return a built-in template (`"first_error"`, `"first_error_reference"`, `"instruct"`, `"genprm"` or `"thinkprm"`), or read one
        from a file.

        A file that ends with `.json` has the arguments of this class. Any other file is the user message.

        Raises:
            `ValueError`: If the template is unknown, or the file is invalid.
        """
        if name_or_path in TEMPLATES:
            return TEMPLATES[name_or_path]
        path = Path(name_or_path)
        if not path.is_file():
            raise ValueError(
                f"The judge template is {shown(name_or_path)}. It must be {', '.join(TEMPLATES)}, or the path of a text or JSON file."
            )
        text = read_text(path)
        if path.suffix == ".json":
            return from_json(cls, parse_json(text, str(path)), path, "See `JudgeTemplate` for the keys.")
        try:
            return cls(user=text.strip(), name=path.stem)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def encode(
        self,
        tokenizer: Any,
        problem: str,
        steps: Sequence[str],
        replies: Sequence[str] = (),
        answer: str | None = None,
    ) -> list[int]:
        """
        Return the token ids of the prompt that asks about the last of `steps`, up to where the judge continues.

        Control tokens in the problem, the steps, the replies and the answer are encoded as plain text.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the judge, with a chat template.
            problem (`str`):
                The problem.
            steps (`Sequence[str]`):
                Texts of the steps up to the judged one.
            replies (`Sequence[str]`, *optional*):
                Responses to the steps before the last one, for `scope="turns"`. See [`JudgeTemplate.reply`].
            answer (`str`, *optional*):
                Reference answer, for a template that shows it.

        Raises:
            `ValueError`: If the tokenizer has no chat template, or the template shows the reference answer and `answer` is missing.
        """
        if self.needs_answer and answer is None:
            raise ValueError(
                f"The template {self.name} shows the reference answer of a problem, but none is given. Add the answers, or use another "
                "template."
            )
        if not tokenizer.chat_template:
            raise ValueError(
                "The tokenizer of the judge has no chat template. Use an instruction model, or set `tokenizer.chat_template`."
            )
        texts = [problem, answer if self.needs_answer else "", *steps, *replies]
        used = set().union(*texts)
        separator = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in used)

        def render(data: str) -> str:
            first, second, *others = data.split(separator)
            return self._text(tokenizer, first, second, others[: len(steps)], others[len(steps) :])

        return encode_around(tokenizer, separator.join(texts), render)

    def _text(self, tokenizer: Any, problem: str, answer: str, steps: Sequence[str], replies: Sequence[str]) -> str:
        listed = [
            _fill(self.step, {"number": str(i), "step": _without_number(step)})
            for i, step in enumerate(steps, self.first_number)
        ]
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = range(len(steps)) if self.scope == "turns" else [len(steps) - 1]
        for i in asked:
            values = {
                "problem": problem,
                "answer": answer,
                "steps": self.step_separator.join(listed[: i + 1]),
                "step": steps[i],
                "number": str(i + self.first_number),
            }
            user = self.user if i == asked[0] else self.next_user
            messages.append({"role": "user", "content": _fill(user, values)})
            if i < asked[-1]:
                messages.append({"role": "assistant", "content": replies[i]})
        prompt = render_chat(tokenizer, messages, None, CHAT_TEMPLATE_DATE)
        return prompt + _fill(self.start, {"number": str(len(steps) - 1 + self.first_number)})

    def read_first_error(self, text: str, finish: str, num_steps: int) -> FirstError:
        r"""
        Read the number of the first wrong step in a response, for `scope="first_error"`.

        Reading is strict. All of this must hold, otherwise the response is unreadable:

        1. The response is not cut off.
        2. Without the thinking of a reasoning model, some text is left. Only this text is read. If a thinking tag is not closed, the
           rest of the response is thinking.
        3. The text has at least one `\boxed{...}`, each is closed, and all have the same content, apart from whitespace around it.
        4. The content is `none`, or the number of a step as shown in the prompt, in plain digits without a sign, a leading zero or
           other characters.

        So prose, JSON without a box, `\boxed{\text{2}}`, `\boxed{2.0}`, `\boxed{Step 2}`, and a response that repeats the instruction
        with other boxes have no vote.

        Args:
            text (`str`):
                Response, after `<think>` if the prompt ends with this tag.
            finish (`str`):
                Why it ended. See [`~search.engines.base.Sample`].
            num_steps (`int`):
                Number of steps in the prompt.

        Returns:
            [`FirstError`]: The vote, or why the response is unreadable.
        """
        if finish == "length":
            return FirstError(None, "cut_off")
        text = visible_text(text)
        if not text.strip():
            return FirstError(None, "empty")
        contents = set()
        for box in _BOX.finditer(text):
            depth, end = int(box[1] is not None), box.end()
            while depth and end < len(text):
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            if box[1] is None or depth:
                return FirstError(None, "damaged_box")
            contents.add(text[box.end() : end - 1].strip())
        if len(contents) != 1:
            return FirstError(None, "several_boxes" if contents else "no_box")
        [content] = contents
        if content == self.none:
            return FirstError(-1)
        if _NUMBER.fullmatch(content) is None:
            return FirstError(None, "not_a_number")
        vote = int(content) - self.first_number
        return FirstError(vote) if 0 <= vote < num_steps else FirstError(None, "no_such_step")

    def read(self, text: str, finish: str, stop_reason: str | None, num_steps: int) -> Reading | None:
        """
        Read the verdict in a response, for all scopes except `"first_error"`.

        Args:
            text (`str`):
                Text that the model generated.
            finish (`str`), stop_reason (`str`, *optional*):
                Why it ended. See [`~search.engines.base.Sample`].
            num_steps (`int`):
                Number of steps in the prompt.

        Returns:
            [`Reading`] or `None`: `None` if the response is cut off, its last line is not a verdict, or, for `scope="solution"`, it does
            not judge all steps up to the first wrong one, each once.
        """
        if finish == "length" or not text.strip():
            return None
        if stop_reason is not None:
            text = text[: text.index(stop_reason)]
        steps: tuple[bool, ...] = ()
        if self.scope == "solution":
            words = re.findall(f"{re.escape(self.step_yes)}|{re.escape(self.step_no)}", text)
            steps = tuple(word == self.step_yes for word in words)
            ends_at_error = False in steps and steps.index(False) == len(steps) - 1 < num_steps
            if len(steps) != num_steps and not ends_at_error:
                return None
        if self.closing is not None:
            return Reading(text + self.closing, None, steps)
        end = len(text.rstrip())
        start = text.rfind("\n", 0, end) + 1
        marker = re.escape(self.marker.strip().rstrip(":"))
        found = re.fullmatch(rf"\W*{marker}\W*?({re.escape(self.yes)}|{re.escape(self.no)})\W*", text[start:end])
        if found is None:
            return None
        return Reading(text[: start + found.start(1)], found[1] == self.yes, steps)

    def reply(self, reading: Reading, verdict: bool, number: int) -> str:
        """Return the whole response to a step, for the prompt of the next step."""
        return (
            _fill(self.start, {"number": str(number)}) + reading.before + (self.yes if verdict else self.no) + self.end
        )

    def encode_response(self, tokenizer: Any, before: str, word: str = "") -> list[int]:
        """
        Return the token ids of a response up to the word of the verdict, and of the word.

        Special tokens in the response are encoded as plain text: the judge has quoted them from a step. Tags such as `</think>` are
        encoded as tokens, because the judge has generated them.
        """
        closing = self.closing or ""
        response = before.removesuffix(closing)
        if find_control_text(tokenizer, response, tags=False):
            return encode_around(tokenizer, response, lambda text: text + closing + word)
        return list(tokenizer.encode(before + word, add_special_tokens=False))

    def verdict_tokens(self, tokenizer: Any, before: str) -> tuple[list[int], int, int]:
        """
        Return the token ids after which the model decides between the two words, and the ids of its next token for yes and no.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the judge.
            before (`str`):
                Response up to the word.

        Raises:
            `ValueError`: If no token distinguishes the two words.
        """
        yes, no = (self.encode_response(tokenizer, before, word) for word in (self.yes, self.no))
        same = next((i for i, pair in enumerate(zip(yes, no, strict=False)) if pair[0] != pair[1]), None)
        if same is None:
            raise ValueError(
                f"The tokens of {self.yes!r} and {self.no!r} cannot be told apart by one token. Choose other words for `yes` and `no`."
            )
        return yes[:same], yes[same], no[same]


def _without_number(step: str) -> str:
    """Return a step without its own header, such as `**Step 2:**`. A second number could be taken for the one of the prompt."""
    text = f"{step.strip()}\n"
    header = re.match(HEADER, text)
    return step if header is None else text[header.end() :].strip()


def _fill(template: str, values: dict[str, str]) -> str:
    """Replace the placeholders of a template, but not text in the values that looks like one."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


_FIRST_ERROR = (
    "Here is a problem and a solution in numbered steps.\n\n# Problem\n\n{problem}\n\n# Solution\n\n{steps}\n\n# Task\n\n"
    "Find the first wrong step. A step is wrong if it contains a false statement or a wrong calculation, or if it does not follow from "
    "the problem and the earlier steps. Check the steps in order, each in a few words, and stop at the first wrong one. Do not write "
    "\\boxed before the end. Then write one last line: \\boxed{k}, where k is the number of the first wrong step (the last step has the "
    "number {number}), or \\boxed{-1} if all steps are correct."
)
TEMPLATES = {
    template.name: template
    for template in (
        JudgeTemplate(name="first_error", scope="first_error", user=_FIRST_ERROR, max_tokens=4096),
        JudgeTemplate(
            name="first_error_reference",
            scope="first_error",
            user=_FIRST_ERROR.replace(
                "# Task\n\n",
                "# Correct answer\n\n{answer}\n\n# Task\n\nThe solution may have another final answer. Then at least one step is wrong. ",
            ),
            max_tokens=4096,
        ),
        JudgeTemplate(
            name="instruct",
            user=(
                "Here is a problem and the beginning of a solution, one numbered step at a time.\n\n# Problem\n\n{problem}\n\n"
                "# Solution\n\n{steps}\n\n# Task\n\nCheck Step {number}, and nothing after it. It is correct if every statement and every "
                "calculation in it is right and follows from the problem and from the earlier steps. The solution may be unfinished. Explain in "
                "a few sentences what you checked. Then write one last line, which is either 'Verdict: Yes' if Step {number} is correct, "
                "or 'Verdict: No' if it contains an error."
            ),
        ),
        # GenPRM (arXiv 2504.00891), without execution of code: the critique ends at </analyze>, and the verdict follows at once
        JudgeTemplate(
            name="genprm",
            scope="turns",
            system="You are a math teacher. Your task is to review and critique the paragraphs in solution step by step.",
            user="Question: {problem}\n\n{step}",
            start="<analyze>\nLet's analyze the Paragraph {number} step by step: ",
            stop=["</analyze>"],
            closing="</analyze>\n<output>\n**Judgement**: $\\boxed{",
            end="}$\n</output>\n",
            max_tokens=2048,
            temperature=0.6,
        ),
        # ThinkPRM (arXiv 2504.16828)
        JudgeTemplate(
            name="thinkprm",
            scope="solution",
            user=(
                "You are given a math problem and a proposed step-by-step solution:\n\n[Math Problem]\n\n{problem}\n\n[Solution]\n\n"
                "{steps}\n\nReview and critique each step in the proposed solution to determine whether each step is correct. If the "
                "solution is incomplete, only verify the provided steps."
            ),
            step_separator="\n",
            start="\nLet's verify step by step:",
            stop=["Is the solution correct?", "</think>"],
            closing="\nIs the solution correct? ",
            step_yes="\\boxed{correct}",
            step_no="\\boxed{incorrect}",
            max_tokens=8192,
            temperature=0.7,
        ),
    )
}


def published_template(name: str) -> str | None:
    """Return the name of the template of a published judge (GenPRM, ThinkPRM), by its Hub id, or `None`."""
    known = {"genprm/genprm-": "genprm", "launch/thinkprm-": "thinkprm"}
    return next((template for start, template in known.items() if name.lower().startswith(start)), None)
