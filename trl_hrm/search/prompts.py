"""Prompts for a policy: the two prompts of the HRM paper in our own words, with its markers, and the question alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..encoding import CHAT_TEMPLATE_DATE, check_chat_template_options, encode_around, find_control_text, render_chat


_ANSWER = """When you are done, write a line '# Answer', leave the next line empty, and give the final answer alone, without any \
explanation. Close with '# END!'."""

_END = """# Answer

6
# END!

Question: {question}

"""


# Values for manifests written before these options existed: a run keeps the encoding it was started with
OLD_DEFAULTS = {"chat_template_kwargs": None, "chat_template_date": None, "sanitize_control_tokens": False}


@dataclass(frozen=True)
class Prompt:
    """
    A prompt for a policy.

    Args:
        name (`str`):
            Name of the prompt.
        template (`str`):
            Text with `{question}` in it.
        rule (`str`):
            Name of the [`~search.steps.StepRule`] that goes with it.
        final_stops (`tuple[str, ...]`, *optional*, defaults to `()`):
            Strings that end a solution, in addition to the end of the sequence.
        style (`str`, *optional*, defaults to `"chat"`):
            `"chat"`: a user's message in the policy's chat template. `"plain"`: the text alone.
        system_prompt (`str`, *optional*):
            System message, for `style="chat"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the chat template, such as `{"enable_thinking": False}`, for `style="chat"`.
        chat_template_date (`str`, *optional*, defaults to `"2024-07-26"`):
            Date for chat templates that print today's date. `None` is the clock, as in runs started before this option
            existed.
        sanitize_control_tokens (`bool`, *optional*, defaults to `True`):
            Whether to encode control tokens in the question, such as `<|im_end|>`, as plain text. In `template` and
            `system_prompt` they are always tokens.

    Raises:
        `ValueError`: If the template has no `{question}`, or if an option is invalid or does not go with the style.
    """

    name: str
    template: str
    rule: str
    final_stops: tuple[str, ...] = ()
    style: str = "chat"
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template_date: str | None = CHAT_TEMPLATE_DATE
    sanitize_control_tokens: bool = True

    def __post_init__(self):
        if "{question}" not in self.template:
            raise ValueError(
                f"prompt {self.name!r} has no {{question}} in it: the policy would never see the problem."
            )
        if self.style not in ("chat", "plain"):
            raise ValueError(f"prompt style is {self.style!r}, expected chat or plain.")
        if self.system_prompt is not None and self.style != "chat":
            raise ValueError(
                "a system prompt goes with the prompt style chat only; leave it out, or put it in the prompt."
            )
        if self.chat_template_kwargs is not None and self.style != "chat":
            raise ValueError(
                "`chat_template_kwargs` needs the prompt style chat. Leave it out, or use `--prompt_style chat`."
            )
        check_chat_template_options(self.chat_template_kwargs, self.chat_template_date)

    def text(self, question: str) -> str:
        """The prompt with the question in it."""
        return self.template.replace("{question}", question)

    def messages(self, question: str) -> list[dict[str, str]]:
        """The prompt as messages, for `style="chat"`: the system prompt, if there is one, and the user's message."""
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": self.text(question)}]

    def encode(self, tokenizer: Any, question: str) -> list[int]:
        """
        Token ids of the prompt. Rendered once per problem: the policy then continues ids.

        Raises:
            `ValueError`: If the style is `"chat"` and the tokenizer has no chat template, or one that has no variable of the
            names in `chat_template_kwargs`.
        """
        if self.style == "chat" and not tokenizer.chat_template:
            raise ValueError(
                "the policy's tokenizer has no chat template, and the prompt style is chat. Use --prompt_style plain, or "
                "a policy with a chat template."
            )

        def render(text: str) -> str:
            if self.style == "plain":
                return self.text(text)
            return render_chat(tokenizer, self.messages(text), self.chat_template_kwargs, self.chat_template_date)

        add_special_tokens = self.style == "plain"  # a chat template writes them
        if self.sanitize_control_tokens:
            return encode_around(tokenizer, question, render, add_special_tokens)
        return list(tokenizer.encode(render(question), add_special_tokens=add_special_tokens))

    def describe_control_text(self, tokenizer: Any, questions: Iterable[str]) -> str | None:
        """Return a note about questions with control tokens of the policy, or `None` if there are none."""
        found = [tokens for question in questions if (tokens := find_control_text(tokenizer, question))]
        if not found:
            return None
        how = "plain text" if self.sanitize_control_tokens else "these tokens, as when this run was started"
        return f"Problems with control tokens of the policy, such as {found[0][0]!r}: {len(found):,}. They are encoded as {how}."


def started_prompt(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the [`Prompt`] of a manifest. Options that it lacks have their old defaults."""
    return OLD_DEFAULTS | manifest["prompt"]


PROMPTS = {
    prompt.name: prompt
    for prompt in (
        # HRM, appendix A.2: for search, with a header before each step
        Prompt(
            "steps",
            "Solve the math problem below, one step of reasoning at a time. Begin each step with a line '# Step k', where "
            f"k counts from 1. {_ANSWER} This is the layout to follow:\n\nQuestion: 1 + 2 + 3 = ?\n\n# Step 1\n"
            f"1 + 2 = 3.\n\n# Step 2\n3 + 3 = 6.\n\n{_END}",
            rule="step_header",
            final_stops=("# END!",),
        ),
        # HRM, appendix A.1: steps end with formulas
        Prompt(
            "formulas",
            f"Solve the math problem below, one step of reasoning at a time, and write formulas as LaTeX. {_ANSWER} This is "
            f"the layout to follow:\n\nQuestion: 1 + 2 + 3 = ?\n\nFirst, \\(1 + 2 = 3\\)\n\nThen, \\(3 + 3 = 6\\)\n\n{_END}",
            rule="formula",
            final_stops=("# END!",),
        ),
        Prompt("question", "{question}", rule="blank_line"),
    )
}
