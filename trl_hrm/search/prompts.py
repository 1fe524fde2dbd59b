"""What a policy is asked. The two prompts of the HRM paper in our words, with its markers, and the question alone."""

from dataclasses import dataclass
from typing import Any


_ANSWER = """When you are done, write a line '# Answer', leave the next line empty, and give the final answer alone, without any \
explanation. Close with '# END!'."""

_END = """# Answer

6
# END!

Question: {question}

"""


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
            Name of the [`StepRule`] that goes with it.
        final_stops (`tuple[str, ...]`, *optional*, defaults to `()`):
            Strings that end a solution, beside the end of the sequence.
        style (`str`, *optional*, defaults to `"chat"`):
            `"chat"`: a user's message in the policy's chat template. `"plain"`: the text alone.
        system_prompt (`str`, *optional*):
            System message, for `style="chat"`.

    Raises:
        `ValueError`: If the template has no `{question}`, or if an option does not go with the style.
    """

    name: str
    template: str
    rule: str
    final_stops: tuple[str, ...] = ()
    style: str = "chat"
    system_prompt: str | None = None

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

    def text(self, question: str) -> str:
        """The prompt with the question in it."""
        return self.template.replace("{question}", question)

    def messages(self, question: str) -> list[dict[str, str]]:
        """The prompt as messages, for `style="chat"`: that of the system, if there is one, and that of the user."""
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": self.text(question)}]

    def encode(self, tokenizer: Any, question: str) -> list[int]:
        """
        Token ids of the prompt. Rendered once per problem: the policy then continues ids.

        Raises:
            `ValueError`: If the style is `"chat"` and the tokenizer has no chat template.
        """
        if self.style == "plain":
            return list(tokenizer.encode(self.text(question)))
        if not tokenizer.chat_template:
            raise ValueError(
                "the policy's tokenizer has no chat template, and the prompt style is chat. Use --prompt_style plain, or "
                "a policy with a chat template."
            )
        rendered = tokenizer.apply_chat_template(self.messages(question), tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(rendered, add_special_tokens=False))


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
