"""Prompts for a policy: one for any instruction model, two reworded prompts of the HRM paper with its markers, and only the question."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..encoding import (
    CHAT_TEMPLATE_DATE,
    check_chat_template,
    check_chat_template_options,
    encode_around,
    find_control_text,
    render_chat,
)
from ..io import shown
from .thinking import ThinkingRule, dropped_tag


_ANSWER = """When you are done, write a line '# Answer', leave the next line empty, and give the final answer alone, without any \
explanation. Close with '# END!'."""

_END = """# Answer

6
# END!

Question: {question}

"""


NO_SYSTEM_NOTE = (
    "The policy's chat template has no system messages, so --system_prompt is at the start of the user message."
)
# Values for manifests written before these options existed, so that a resumed run keeps its encoding
OLD_DEFAULTS = {"chat_template_kwargs": None, "chat_template_date": None, "sanitize_control_tokens": False}


@dataclass(frozen=True)
class Prompt:
    """
    A prompt for a policy.

    Args:
        name (`str`):
            Name of the prompt.
        template (`str`):
            Text that contains `{question}`.
        rule (`str`):
            Name of the default [`~search.steps.StepRule`].
        final_stops (`tuple[str, ...]`, *optional*, defaults to `()`):
            Strings that end a solution, in addition to the end of the sequence.
        style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` applies the policy's chat template to a user message, `"plain"` uses the text as is.
        system_prompt (`str`, *optional*):
            System message, for `style="chat"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the chat template, such as `{"enable_thinking": False}`, for `style="chat"`.
        chat_template_date (`str`, *optional*, defaults to `"2024-07-26"`):
            Date for chat templates that print today's date. `None` uses the current date, as in runs started before this option
            existed.
        sanitize_control_tokens (`bool`, *optional*, defaults to `True`):
            Whether to encode control tokens in the question, such as `<|im_end|>`, as plain text. In `template` and
            `system_prompt` they are always encoded as tokens.

    Raises:
        `ValueError`: If the template has no `{question}`, or if an option is invalid or does not work with the style.
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
                f"The prompt {shown(self.name)} does not contain {{question}}, so the policy would not see the problem. Add it."
            )
        if self.style not in ("chat", "plain"):
            raise ValueError(f"The prompt style is {shown(self.style)}. It must be chat or plain.")
        if self.system_prompt is not None and self.style != "chat":
            raise ValueError(
                "`system_prompt` requires the prompt style chat. Remove it, or add its text to the prompt."
            )
        if self.chat_template_kwargs is not None and self.style != "chat":
            raise ValueError(
                "`chat_template_kwargs` requires the prompt style chat. Remove it, or use `--prompt_style chat`."
            )
        check_chat_template_options(self.chat_template_kwargs, self.chat_template_date)

    def text(self, question: str) -> str:
        """Return the prompt for a question."""
        return self.template.replace("{question}", question)

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return the prompt as messages for `style="chat"`: the system message, if any, and the user message."""
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": self.text(question)}]

    def for_tokenizer(self, tokenizer: Any) -> "Prompt":
        """
        Return the prompt with the system message at the start of the user message, if the chat template has no system messages
        (Gemma 2, Mistral 7B). Such templates fail for a system message, or ignore it.

        Raises:
            `ValueError`: If the system message contains `{question}`, which would be replaced in the user message, or a step rule for
                thinking is used with a tokenizer that leaves thinking tags out of texts.
        """
        if self.rule == ThinkingRule.name and (tag := dropped_tag(tokenizer)) is not None:
            raise ValueError(
                f"{tag} is a special token of the policy's tokenizer. Special tokens are left out of sampled texts, so "
                "`segmentation='thinking'` would take thinking for the answer. Make it a normal token (`special` is false in "
                "tokenizer.json and tokenizer_config.json), or use another segmentation."
            )
        if self.system_prompt is None or not tokenizer.chat_template:
            return self
        check_chat_template(
            tokenizer, self.chat_template_kwargs
        )  # so that the exceptions below are about the messages

        def render(prompt: Prompt) -> str:
            return render_chat(
                tokenizer, prompt.messages("1+2?"), prompt.chat_template_kwargs, prompt.chat_template_date
            )

        without_system = replace(self, system_prompt=None)
        try:
            if render(self) != render(without_system):
                return self
        except Exception:  # a template can raise any exception
            render(without_system)  # raises if the template fails for user messages, too
        if "{question}" in self.system_prompt:
            raise ValueError(
                "The chat template has no system messages, and `system_prompt` contains {question}. Remove it, or move the text to "
                "the prompt."
            )
        return replace(without_system, template=f"{self.system_prompt}\n\n{self.template}")

    def encode(self, tokenizer: Any, question: str) -> list[int]:
        """
        Return the token ids of the prompt. A prompt is encoded once per problem; all later requests continue its ids.

        Raises:
            `ValueError`: If the style is `"chat"` and the tokenizer has no chat template, or its template does not use a variable
            in `chat_template_kwargs`.
        """
        if self.style == "chat" and not tokenizer.chat_template:
            raise ValueError(
                "The policy's tokenizer has no chat template, but the prompt style is chat. Use --prompt_style plain, or a "
                "policy with a chat template."
            )

        def render(text: str) -> str:
            if self.style == "plain":
                return self.text(text)
            return render_chat(tokenizer, self.messages(text), self.chat_template_kwargs, self.chat_template_date)

        add_special_tokens = self.style == "plain"  # a chat template adds them itself
        if self.sanitize_control_tokens:
            return encode_around(tokenizer, question, render, add_special_tokens)
        return list(tokenizer.encode(render(question), add_special_tokens=add_special_tokens))

    def describe_control_text(self, tokenizer: Any, questions: Iterable[str]) -> str | None:
        """Return a note about questions that contain control tokens of the policy, or `None`."""
        found = [tokens for question in questions if (tokens := find_control_text(tokenizer, question))]
        if not found:
            return None
        how = "plain text" if self.sanitize_control_tokens else "these tokens, as when this run was started"
        return (
            f"Problems that contain control tokens of the policy, such as {shown(found[0][0])}: {len(found):,}. They are encoded as "
            f"{how}."
        )


def started_prompt(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the [`Prompt`] in a manifest. Missing options have their old defaults."""
    return OLD_DEFAULTS | manifest["prompt"]


PROMPTS = {
    prompt.name: prompt
    for prompt in (
        # No example, because small models copy it. The answer is in the two places where instruction models write it.
        Prompt(
            "boxed",
            "{question}\n\nSolve this problem step by step. Begin the steps with '# Step 1', '# Step 2' and so on. At the end, write "
            "'The answer is' and the final answer in \\boxed{}.",
            rule="step_header",
        ),
        # HRM, appendix A.2: for tree search, with a header before each step
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
