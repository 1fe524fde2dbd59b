"""Encoding of a problem and its steps to token ids, shared by training, scoring, evaluation and serving."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from .encoding import (
    CHAT_TEMPLATE_DATE,
    check_chat_template,
    check_chat_template_options,
    encode_around,
    encode_pieces,
    find_control_text,
    plain_text_ids,
    render_chat,
)
from .io import dump_json, parse_json, shown
from .published_formats import PUBLISHED_FORMATS


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .forest import TokenTrie

STEP_FORMAT_NAME = "step_format.json"
# Version of `step_format.json`. It increases when the default of a key changes.
VERSION = 3
# Defaults of older versions that differ from today's. Keys missing from an older file get these values, so that a
# checkpoint keeps the encoding it was trained with. Files without a version are version 1.
OLD_DEFAULTS: dict[int, dict[str, Any]] = {1: {"chat_template_date": None, "sanitize_control_tokens": False}}
# Fields that only apply to the head "implicit". The files of other heads do not have them
_IMPLICIT = ("beta", "score_span", "reference_model", "reference_revision", "reference_weights")
_REPLIES = range(
    0xF0000, 0xFFFFE
)  # private use characters. One stands for the replies while a conversation is rendered
# A problem and steps that end in different kinds of characters, to check how a tokenizer encodes the ends of steps
_PROBES = ("1+2?", ("1+2 = 3", "So $x^{2}=\\frac{1}{2}$", "所以答案是三。", "Done.", "a b)"))


@dataclass(frozen=True)
class StepFormat:
    r"""
    How a step reward model encodes a problem and its steps, and which head it has. Saved as `step_format.json` with every
    checkpoint.

    The text of a solution is `problem, step, separator, suffix, step, separator, suffix, ...`. Each step is scored at one
    token, its *step token*: the last token of the separator after it, or the token before the separator. A score depends
    only on the text up to its step token.

    [`StepFormat.published`] returns the formats of published reward models.

    Args:
        prompt_style (`str`, *optional*, defaults to `"plain"`):
            `"plain"`: the BOS token, if the tokenizer has one, then the problem. `"chat"`: the problem as a user message
            in the tokenizer's chat template, with the generation prompt, then the steps. `"turns"`: a conversation in which
            each step is a user message (the first one follows the problem) and `step_separator` is the reply of the
            assistant to each. Requires `tokenization="string"`.
        system_prompt (`str`, *optional*):
            System message before the user message. Requires `prompt_style="chat"` or `"turns"`.
        step_separator (`str`, *optional*, defaults to `"\n\n"`):
            Text after every step.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the original steps of a merged step. It must not encode to the same ids as `step_separator`.
        head (`str`, *optional*, defaults to `"classification"`):
            `"classification"`: token classification with 2 labels, score `softmax(logits)[1]`
            ([HRM](https://huggingface.co/papers/2503.13551), eq. 2). `"mlp"`: the same with a hidden layer, as in
            [Qwen2.5-Math-PRM](https://huggingface.co/papers/2501.07301). `"regression"`: token classification with 1
            label. `"value"`: causal language model with a value head (`v_head.summary`) of 1 output. `"lm"`: causal
            language model, score `p(correct) / (p(correct) + p(wrong))` of the two label tokens. `"lm_mean"`: causal
            language model, whose output is the mean of all logits. `"implicit"`: causal language model, whose output is `beta`
            times the sum over tokens of the log-ratio ln π(token) − ln π_ref(token) to a reference model
            ([ImplicitPRM](https://huggingface.co/papers/2412.01981)). The score is its sigmoid.
        regression_loss (`str`, *optional*, defaults to `"mse"`):
            Loss of a head with 1 output (`"regression"`, `"value"`, `"lm_mean"`). It also determines the score: with `"mse"`
            the output clipped to `[0, 1]`, with `"bce"` its sigmoid. `"implicit"` always has `"bce"`.
        label_tokens (`tuple[str, str]` or `tuple[int, int]`, *optional*, defaults to `("+", "-")`):
            Tokens for a correct and a wrong step, as texts or as ids. Only used with `head="lm"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the chat template, such as `{"enable_thinking": False}`. Requires `prompt_style="chat"` or
            `"turns"`.
        chat_template_date (`str`, *optional*, defaults to `"2024-07-26"`):
            Date for chat templates that print today's date. With `None`, the default in files of version 1, the
            current date is used: the ids change every day, and a warning is given.
        sanitize_control_tokens (`bool`, *optional*, defaults to `True`):
            Whether to encode control tokens in the problem and the steps, such as `<|im_end|>`, as plain text. With
            `False`, the default in files of version 1, they are encoded as control tokens, so that data can fake turns
            and step tokens.
        tokenization (`str`, *optional*, defaults to `"pieces"`):
            `"pieces"`: the problem, each step, the separator and the suffix are tokenized separately, so that no token
            spans two of them. `"string"`: the whole text is tokenized as one string. White space around steps is removed
            unless `step_separator` is a control token, because it could become part of the separator.
        prompt_template (`str`, *optional*, defaults to `"{problem}"`):
            Text of the problem up to the first step, where `{problem}` is replaced.
        step_prefix (`str`, *optional*, defaults to `""`):
            Text before every step, where `{number}` is replaced by the number of the step, from 1. A step that already
            starts with it is not changed.
        step_suffix (`str`, *optional*, defaults to `""`):
            Text between the separator and the next step.
        score_position (`str`, *optional*, defaults to `"separator"`):
            Step token: `"separator"`, the last token of the separator, or `"before_separator"`, the token before it.
        thinking_marks (`tuple[str, ...]`, *optional*):
            Phrases that begin a thought, for `spans=(1, "thought")`. They must be the marks of the merged steps in the training data.
            Defaults to [`~search.thinking.MARKS`].
        max_thought (`int`, *optional*, defaults to `16`):
            Maximum number of steps in a merged thought.
        beta (`float`, *optional*, defaults to `0.05`):
            Factor of the log-ratios. Only used with `head="implicit"`, as the next four.
        score_span (`str`, *optional*, defaults to `"step"`):
            Tokens whose log-ratios are summed for the score of a step: `"step"`, all tokens after the previous step token up to
            its own, or `"prefix"`, all tokens after the problem up to its step token.
        reference_model (`str`, *optional*):
            Path or Hub id of the reference model. Required, except for an adapter, whose reference is its base model.
        reference_revision (`str`, *optional*):
            Revision of the reference model on the Hub.
        reference_weights (`str`, *optional*):
            Digest of the weight files of the reference model. If set, other weights are refused.

    Example:

    ```python
    >>> step_format = StepFormat(step_separator="\n")
    >>> prompt_ids, step_ids = step_format.encode(tokenizer, "1+2+3?", ["1+2=3.", "3+3=6."])
    >>> tokenizer.decode(prompt_ids + step_ids[0] + step_ids[1])
    '1+2+3?1+2=3.\n3+3=6.\n'
    ```
    """

    prompt_style: Literal["plain", "chat", "turns"] = "plain"
    system_prompt: str | None = None
    step_separator: str = "\n\n"
    merge_separator: str = "\n"
    head: Literal["classification", "mlp", "regression", "value", "lm", "lm_mean", "implicit"] = "classification"
    regression_loss: Literal["mse", "bce"] = "mse"
    label_tokens: tuple[str, str] | tuple[int, int] = ("+", "-")
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template_date: str | None = CHAT_TEMPLATE_DATE
    sanitize_control_tokens: bool = True
    tokenization: Literal["pieces", "string"] = "pieces"
    prompt_template: str = "{problem}"
    step_prefix: str = ""
    step_suffix: str = ""
    score_position: Literal["separator", "before_separator"] = "separator"
    thinking_marks: tuple[str, ...] | None = None
    max_thought: int = 16
    beta: float = 0.05
    score_span: Literal["step", "prefix"] = "step"
    reference_model: str | None = None
    reference_revision: str | None = None
    reference_weights: str | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("str", str) and not isinstance(value, str):
                raise ValueError(f"StepFormat: `{field.name}` is {shown(value)}. It must be a string.")
            allowed = get_args(field.type) if get_origin(field.type) is Literal else None
            if allowed and value not in allowed:
                raise ValueError(
                    f"StepFormat: `{field.name}` is {shown(value)}. It must be one of {', '.join(allowed)}."
                )
        if not isinstance(self.system_prompt, str | None):
            raise ValueError(
                f"StepFormat: `system_prompt` is {shown(self.system_prompt)}. It must be a string or `None`."
            )
        if self.prompt_template.count("{problem}") != 1:
            raise ValueError(
                f"StepFormat: `prompt_template` is {shown(self.prompt_template)}. It must contain {{problem}} once."
            )
        if self.prompt_style == "turns":
            if self.tokenization != "string":
                raise ValueError('StepFormat: `prompt_style="turns"` requires `tokenization="string"`.')
            if self.step_suffix or not self.step_separator or self.step_separator != self.step_separator.strip():
                raise ValueError(
                    f'StepFormat: with `prompt_style="turns"`, `step_separator` is the reply to each step, without white space '
                    f"around it, and `step_suffix` is empty. Found {shown(self.step_separator)} and {shown(self.step_suffix)}."
                )
        if self.system_prompt is not None and self.prompt_style == "plain":
            raise ValueError(
                'StepFormat: `system_prompt` requires `prompt_style="chat"`. Plain prompts have no roles.'
            )
        if self.chat_template_kwargs is not None and self.prompt_style == "plain":
            raise ValueError(
                'StepFormat: `chat_template_kwargs` requires `prompt_style="chat"`. Plain prompts use no chat template.'
            )
        check_chat_template_options(self.chat_template_kwargs, self.chat_template_date)
        if self.head == "implicit":
            object.__setattr__(self, "regression_loss", "bce")
        elif changed := [name for name in _IMPLICIT if getattr(self, name) != getattr(type(self), name)]:
            raise ValueError(
                f"StepFormat: `{changed[0]}` is {shown(getattr(self, changed[0]))}, which has no effect with `head` "
                f"{shown(self.head)}. Set `head` to 'implicit', or remove it."
            )
        if type(self.beta) not in (int, float) or not 0 < self.beta < math.inf:
            raise ValueError(f"StepFormat: `beta` is {shown(self.beta)}. It must be a number greater than 0.")
        for name in ("reference_model", "reference_revision", "reference_weights"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(
                    f"StepFormat: `{name}` is {shown(getattr(self, name))}. It must be a string or `None`."
                )
        if not isinstance(self.sanitize_control_tokens, bool):
            raise ValueError(
                f"StepFormat: `sanitize_control_tokens` is {shown(self.sanitize_control_tokens)}. It must be true or false."
            )
        if isinstance(self.label_tokens, list):  # as JSON and the command line pass it
            object.__setattr__(self, "label_tokens", tuple(self.label_tokens))
        if (
            not isinstance(self.label_tokens, tuple)  # the string "+-" has two elements too
            or {type(token) for token in self.label_tokens} not in ({str}, {int})
            or len(self.label_tokens) != 2
            or self.label_tokens[0] == self.label_tokens[1]
        ):
            raise ValueError(
                f"StepFormat: `label_tokens` is {shown(self.label_tokens)}. It must be two different tokens or two ids: "
                "correct, wrong."
            )
        if isinstance(self.thinking_marks, list):
            object.__setattr__(self, "thinking_marks", tuple(self.thinking_marks))
        marks = self.thinking_marks
        if marks is not None and not (
            isinstance(marks, tuple) and marks and all(isinstance(mark, str) and mark.strip() for mark in marks)
        ):
            raise ValueError(
                f"StepFormat: `thinking_marks` is {shown(marks)}. It must be phrases such as 'Wait', or `None`."
            )
        if type(self.max_thought) is not int or not 2 <= self.max_thought <= 1000:
            raise ValueError(f"StepFormat: `max_thought` is {shown(self.max_thought)}. It must be from 2 to 1000.")

    @property
    def num_labels(self) -> int:
        """Number of outputs of the head: 2 (0 wrong, 1 correct), or 1 for the heads that predict one number."""
        return 1 if self.head in ("regression", "value", "lm_mean", "implicit") else 2

    @property
    def is_causal_lm(self) -> bool:
        """Whether the head consists of the output embeddings of a causal language model."""
        return self.head in ("lm", "lm_mean", "implicit")

    @classmethod
    def published(cls, name: str) -> "StepFormat":
        """
        Return the format of published reward models, such as `"qwen2.5-math-prm"`. The names and their models are listed in
        `docs/model_zoo.md`.

        Raises:
            `ValueError`: If the name is unknown.
        """
        if name not in PUBLISHED_FORMATS:
            raise ValueError(
                f"There is no published step format {shown(name)}. Names: {', '.join(PUBLISHED_FORMATS)}."
            )
        return cls(**PUBLISHED_FORMATS[name][1])

    def check(self, tokenizer: "PreTrainedTokenizerBase", merged: bool = False) -> None:
        """
        Check that the tokenizer supports this format. Warn if it encodes `step_separator` to several tokens.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer to check.
            merged (`bool`, *optional*, defaults to `False`):
                Whether the data contains merged steps. If `True`, `merge_separator` is checked too.

        Raises:
            `ValueError`: If a separator encodes to nothing or to the unknown token; if the data contains merged steps
            and both separators encode to the same ids, or `merge_separator` contains a control token; if the chat
            template is missing, fails, ignores the prompt or the system message, or does not use a variable of
            `chat_template_kwargs`; or if a label token is not exactly one token.
        """
        if self.prompt_style != "plain":
            self._check_chat_template(tokenizer)
        if self.tokenization == "string":
            self._check_string(tokenizer)
        else:
            self._check_pieces(tokenizer)
        if merged:
            self.check_merged(tokenizer)
        if self.head == "lm":
            self.label_token_ids(tokenizer)

    def _check_pieces(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        step_ids = self._separator_ids(tokenizer, "step_separator")
        if len(step_ids) > 1 and self.score_position == "separator":
            last = tokenizer.decode(step_ids[-1:])
            warnings.warn(
                f"StepFormat: the tokenizer encodes `step_separator` {shown(self.step_separator)} to {len(step_ids)} tokens, "
                f"and steps are scored at the last, {shown(last)}, which may also occur inside steps. If the model was trained "
                "with a token for the separator, use the model's tokenizer. To train a new model, choose a separator that is "
                f"one token, or add it with `tokenizer.add_tokens([{shown(self.step_separator)}], special_tokens=True)` and "
                "resize the embeddings.",
                stacklevel=3,
            )

    def _check_string(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Check with a test solution that a step token and the tokens before it do not depend on the text around it."""
        if not tokenizer.is_fast:
            raise ValueError(
                f'StepFormat: `tokenization="string"` requires a fast tokenizer. {type(tokenizer).__name__} does not return '
                "the positions of tokens."
            )
        name = self.step_separator.strip()
        if name[:1] + name[-1:] == "<>" and len(_encode(tokenizer, name)) > 1:
            raise ValueError(
                f"StepFormat: `step_separator` {shown(name)} is not a token of this tokenizer. Use the tokenizer of the "
                "model, or a different step format."
            )
        remedy = 'Choose a different `step_separator` or `step_suffix`, or `tokenization="pieces"`.'
        prompt, steps = _PROBES
        try:
            step_token = self._step_token(tokenizer)
            ids, ends = self._encode_path(tokenizer, prompt, steps, step_token)
            prefixes = [self._encode_path(tokenizer, prompt, steps[: i + 1]) for i in range(len(steps))]
        except ValueError as error:
            raise ValueError(f"StepFormat: {error} {remedy}") from error
        if step_token is not None and step_token == tokenizer.unk_token_id:
            raise ValueError(f"StepFormat: with this tokenizer, the step token is the unknown token. {remedy}")
        for end, (prefix_ids, prefix_ends) in zip(ends, prefixes, strict=True):
            if prefix_ids[: prefix_ends[-1]] != ids[:end]:
                raise ValueError(
                    "StepFormat: the tokenizer encodes a step differently depending on the text after it, so that its score "
                    f"would depend on later steps. {remedy}"
                )

    def check_merged(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """
        Raise `ValueError` if the tokenizer cannot encode `merge_separator` as text distinct from `step_separator`, or the head
        does not support merged steps.
        """
        if self.head == "implicit":
            raise ValueError(
                "StepFormat: the head 'implicit' does not support merged steps: a merged step has other tokens than the solution "
                "that the policy was trained on. Use single steps (`spans` 1, a dataset built with the view `prm` or `orm`)."
            )
        step_ids = self._separator_ids(tokenizer, "step_separator")
        if self.prompt_style != "turns" and self._separator_ids(tokenizer, "merge_separator") == step_ids:
            raise ValueError(
                f"StepFormat: `merge_separator` {shown(self.merge_separator)} and `step_separator` {shown(self.step_separator)} "
                f"encode to the same ids {step_ids}. A merged step could not be distinguished from two single steps. "
                "Choose two separators with different ids."
            )
        if self.sanitize_control_tokens and find_control_text(tokenizer, self.merge_separator):
            raise ValueError(
                f"StepFormat: `merge_separator` {shown(self.merge_separator)} contains a control token, which is encoded as plain "
                "text inside a merged step. Choose ordinary text, or set `sanitize_control_tokens=False`."
            )

    def _check_chat_template(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"StepFormat: `prompt_style` is {shown(self.prompt_style)}, but the tokenizer has no chat template. Set "
                '`tokenizer.chat_template`, or use `prompt_style="plain"`.'
            )
        check_chat_template(tokenizer, self.chat_template_kwargs)
        without_system = replace(self, system_prompt=None)
        try:
            ids = without_system.encode(tokenizer, "1+2?", ["3", "7"])
            other_ids = without_system.encode(tokenizer, "3+4?", ["3", "7"])
        except Exception as error:  # a template can raise any exception
            raise ValueError(
                f"StepFormat: the tokenizer's chat template fails for a user message ({error}). Set a different "
                '`tokenizer.chat_template`, or use `prompt_style="plain"`.'
            ) from error
        if ids == other_ids:
            raise ValueError(
                "StepFormat: the tokenizer's chat template ignores the user message, so every problem has the same ids. "
                'Set a different `tokenizer.chat_template`, or use `prompt_style="plain"`.'
            )
        if self.system_prompt is None:
            return
        remedy = "Remove `system_prompt`, or set a `tokenizer.chat_template` that supports system messages."
        try:
            system_ids = self.encode(tokenizer, "1+2?", ["3", "7"])
        except Exception as error:
            raise ValueError(
                f"StepFormat: the tokenizer's chat template fails for a system message ({error}). {remedy}"
            ) from error
        if system_ids == ids:
            raise ValueError(
                "StepFormat: the tokenizer's chat template ignores the system message, so `system_prompt` would have no "
                f"effect. {remedy}"
            )

    def _separator_ids(self, tokenizer: "PreTrainedTokenizerBase", name: str) -> list[int]:
        separator = getattr(self, name)
        ids = _encode(tokenizer, separator)
        if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
            found = "nothing" if not ids else f"{ids}, which contains the unknown token"
            raise ValueError(
                f"StepFormat: the tokenizer encodes `{name}` {shown(separator)} to {found}. Choose a separator from the "
                "tokenizer's vocabulary. If the tokenizer was loaded from a folder, check that its files are there: "
                "without them, transformers may load an empty tokenizer."
            )
        return ids

    def label_token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Return the ids of the wrong and the correct label token, in the order of the classes (0 wrong, 1 correct)."""
        ids: list[int] = []
        for token in reversed(self.label_tokens):
            if isinstance(token, int):
                if not 0 <= token < len(tokenizer):
                    raise ValueError(
                        f"StepFormat: label token {token} is not an id of this tokenizer, which has {len(tokenizer)} tokens."
                    )
                ids.append(token)
                continue
            token_ids = _encode(tokenizer, token)
            if len(token_ids) != 1 or token_ids[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"StepFormat: label token {shown(token)} encodes to {token_ids}, expected exactly one known token. "
                    "Choose different `label_tokens`, or add it to the tokenizer and resize the embeddings."
                )
            ids += token_ids
        return ids

    def merge(self, steps: Sequence[str]) -> str:
        """Return the text of the step that merges `steps`."""
        return self.merge_separator.join(steps)

    def find_markers(self, tokenizer: "PreTrainedTokenizerBase", step: str) -> list[str]:
        """
        Return the control tokens and separators inside a step, which could fake turns or steps.

        Tags that policies write, such as `<think>`, are not included. The `step_separator` is included only if it
        contains a letter or digit, as `" ки"` does: whitespace and punctuation are normal in a step. It is also found
        if its space is the one before the step, or is written as `▁`, which is the same to SentencePiece.
        """
        found = find_control_text(tokenizer, step, tags=False)
        is_marker = any(map(str.isalnum, self.step_separator)) and self.step_separator not in found
        texts = [f" {text}".replace("\u2581", " ") for text in (step, step.strip())]
        return found + [self.step_separator] * (is_marker and any(self.step_separator in text for text in texts))

    def encode_prompt(self, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
        """Return the ids of the problem alone. With `tokenization="string"`, they may depend on the first step."""
        if self.prompt_style != "plain":
            render = lambda text: self._render(tokenizer, self._insert_problem(text), [])  # noqa: E731
            if self.sanitize_control_tokens:
                return encode_around(tokenizer, prompt, render)
            return _encode(tokenizer, render(prompt))
        if not self.sanitize_control_tokens or self.prompt_template == "{problem}":
            return self._bos(tokenizer) + self._encode_data(tokenizer, self._insert_problem(prompt))
        return self._bos(tokenizer) + encode_around(tokenizer, prompt, self._insert_problem)

    def _encode_data(self, tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
        ids = _encode(tokenizer, text)
        return plain_text_ids(tokenizer, text, ids) if self.sanitize_control_tokens else ids

    def _bos(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        return [] if self.prompt_style != "plain" or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def _insert_problem(self, prompt: str) -> str:
        return self.prompt_template.replace("{problem}", prompt)

    def _step_text(self, step: str, number: int) -> str:
        prefix = self.step_prefix.replace("{number}", str(number))
        return step if step.startswith(prefix) else prefix + step

    def _render(
        self, tokenizer: "PreTrainedTokenizerBase", problem: str, turns: Sequence[str], reply: str = ""
    ) -> str:
        """Render the problem as a user message or, with `turns`, as a conversation with `reply` after each turn."""
        messages = [{"role": "user", "content": problem}]
        if turns:
            messages = [
                {"role": role, "content": content}
                for turn in [problem + turns[0], *turns[1:]]
                for role, content in (("user", turn), ("assistant", reply))
            ]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return render_chat(
            tokenizer, messages, self.chat_template_kwargs, self.chat_template_date, add_generation_prompt=not turns
        )

    def encode(
        self, tokenizer: "PreTrainedTokenizerBase", prompt: str, steps: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """
        Encode a solution.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            prompt (`str`):
                The problem.
            steps (`Sequence[str]`):
                Texts of the S steps of the solution.

        Returns:
            `tuple[list[int], list[list[int]]]`: Ids of the problem, and for each step the ids after the previous step token
            up to its own, which is the last one. The concatenation is the input of the model.

        Raises:
            `ValueError`: With `tokenization="string"`, if the tokenizer merges the separator with the text around it.
        """
        if self.tokenization == "pieces":
            prompt_ids = self.encode_prompt(tokenizer, prompt)
            step_ids = self._encode_pieces(tokenizer, steps, range(1, len(steps) + 1))
            gap = self._gap_ids(tokenizer)
            return prompt_ids, step_ids[:1] + [gap + ids for ids in step_ids[1:]]
        if not len(steps):
            return self.encode_prompt(tokenizer, prompt), []
        ids, ends = self._encode_path(tokenizer, prompt, steps, self._step_token(tokenizer))
        starts = [self._prompt_length(tokenizer, prompt, ids[: ends[0]]), *ends]
        return ids[: starts[0]], [ids[start:end] for start, end in zip(starts, ends, strict=False)]

    def insert(
        self,
        trie: "TokenTrie",
        tokenizer: "PreTrainedTokenizerBase",
        prompt: str,
        steps: Sequence[str],
        parents: Sequence[int],
    ) -> dict[int, int]:
        """
        Encode a step tree and insert it into a token trie. Every path is encoded as [`StepFormat.encode`] does.

        Args:
            trie ([`~forest.TokenTrie`]):
                Trie to insert into.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            prompt (`str`):
                The problem.
            steps (`Sequence[str]`):
                Texts of the S steps.
            parents (`Sequence[int]`):
                For each of the S steps, the index of the previous step, which is smaller, or `-1` for the problem.

        Returns:
            `dict[int, int]`: Node of the step token of each step, and at `-1` the node of the last token of the problem.

        Raises:
            `ValueError`: See [`StepFormat.encode`].
        """
        depths = {-1: 0}
        for i, parent in enumerate(parents):
            depths[i] = depths[parent] + 1
        if self.tokenization == "pieces" or not len(steps):
            step_ids = self._encode_pieces(tokenizer, steps, [depths[i] for i in range(len(steps))])
            gap = self._gap_ids(tokenizer)
            nodes = {-1: trie.insert(self.encode_prompt(tokenizer, prompt))}
            for i, (ids, parent) in enumerate(zip(step_ids, parents, strict=True)):
                nodes[i] = trie.insert(ids if parent == -1 else gap + ids, after=nodes[parent])
            return nodes
        nodes, differ, step_token = {}, False, self._step_token(tokenizer)
        for leaf in sorted(set(range(len(steps))) - set(parents)):
            path = [leaf]
            while parents[path[-1]] != -1:
                path.append(parents[path[-1]])
            path.reverse()
            ids, ends = self._encode_path(tokenizer, prompt, [steps[i] for i in path], step_token)
            start = self._prompt_length(tokenizer, prompt, ids[: ends[0]])
            node = trie.insert(ids[:start])
            nodes.setdefault(-1, node)
            for i, end in zip(path, ends, strict=True):
                node = trie.insert(ids[start:end], after=node)
                differ |= nodes.setdefault(i, node) != node
                start = end
        if differ:
            warnings.warn(
                f"The tokenizer encodes steps of the problem {shown(prompt)} differently depending on the steps after them. The "
                "paths are encoded separately, and a step that they share is scored on the first one.",
                stacklevel=2,
            )
        return nodes

    def _gap_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Return the ids between a step token and the next step."""
        rest = [] if self.score_position == "separator" else _encode(tokenizer, self.step_separator)
        return rest + _encode(tokenizer, self.step_suffix)

    def _encode_pieces(
        self, tokenizer: "PreTrainedTokenizerBase", steps: Sequence[str], numbers: Sequence[int]
    ) -> list[list[int]]:
        """Return the ids of each step up to its step token, tokenized separately."""
        end = _encode(tokenizer, self.step_separator) if self.score_position == "separator" else []
        texts = [self._step_text(step, number) for step, number in zip(steps, numbers, strict=True)]
        step_ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        if self.sanitize_control_tokens:
            step_ids = [plain_text_ids(tokenizer, text, ids) for text, ids in zip(texts, step_ids, strict=True)]
        return [ids + end for ids in step_ids]

    def _step_token(self, tokenizer: "PreTrainedTokenizerBase") -> int | None:
        """Return the id that every step token has, or `None` if steps are scored at their own last tokens."""
        if self.score_position == "before_separator" and self.prompt_style != "turns":
            return None
        ids, ends = self._encode_path(tokenizer, _PROBES[0], _PROBES[1][:1])
        return ids[ends[0] - 1]

    def _encode_path(
        self, tokenizer: "PreTrainedTokenizerBase", prompt: str, steps: Sequence[str], step_token: int | None = None
    ) -> tuple[list[int], list[int]]:
        """
        Encode a solution as one string. Return its ids and, for each step, the number of tokens up to its step token, which
        must have the id `step_token` if given.
        """
        # White space around a step would become part of a separator that is text. Chat templates remove it themselves
        is_text = self.prompt_style != "turns" and not find_control_text(tokenizer, self.step_separator)

        def render(data: Sequence[str]) -> list[str]:
            problem = self._insert_problem(data[0])
            texts = [
                self._step_text(step.strip(), number).strip() if is_text else self._step_text(step, number)
                for number, step in enumerate(data[1:], start=1)
            ]
            before, after = self.step_separator, self.step_suffix
            if self.score_position == "before_separator":
                before, after = "", before + after
            if self.prompt_style == "turns":
                parts = self._render(tokenizer, problem, texts, reply).split(reply)
                if len(parts) != len(steps) + 1:
                    raise ValueError(
                        f"the chat template renders {len(parts) - 1} of {len(steps)} replies of the assistant"
                    )
                return [parts[0] + before, *(after + part + before for part in parts[1:-1]), after + parts[-1]]
            if self.prompt_style == "chat":
                problem = self._render(tokenizer, problem, [])
            pieces = [text + before for text in texts]
            return [problem + pieces[0], *(after + piece for piece in pieces[1:]), after]

        data = [prompt, *steps]
        letters = set().union(*data)
        reply = next(letter for letter in map(chr, _REPLIES) if letter not in letters)
        ids, ends = encode_pieces(tokenizer, data, render, self.sanitize_control_tokens)
        if step_token is not None:
            for step, end in zip(steps, ends, strict=True):
                if ids[end - 1] != step_token:
                    raise ValueError(
                        f"The step {shown(step)} ends with the token {shown(tokenizer.decode(ids[end - 1 : end]))} instead of the step "
                        f"token {shown(tokenizer.decode([step_token]))}, because the tokenizer merges the separator with the step. "
                        "Remove blank steps, and unusual characters at the end of steps."
                    )
        bos = self._bos(tokenizer)
        return bos + ids, [len(bos) + end for end in ends]

    def _prompt_length(self, tokenizer: "PreTrainedTokenizerBase", prompt: str, first_ids: Sequence[int]) -> int:
        """Return the number of tokens that the problem has in common with the first step token's path."""
        prompt_ids = self.encode_prompt(tokenizer, prompt)
        return next(
            (i for i, (a, b) in enumerate(zip(prompt_ids, first_ids, strict=False)) if a != b),
            min(len(prompt_ids), len(first_ids) - 1),
        )

    def encode_step(self, tokenizer: "PreTrainedTokenizerBase", step: str) -> list[int]:
        """Return the ids of one step and its separator, with `tokenization="pieces"`."""
        return self._encode_data(tokenizer, step) + _encode(tokenizer, self.step_separator)

    def to_json(self) -> str:
        """Return the content of `step_format.json`."""
        values = asdict(self)
        if self.head != "implicit":
            values = {name: value for name, value in values.items() if name not in _IMPLICIT}
        return dump_json({"version": VERSION} | values, STEP_FORMAT_NAME, indent=2)

    def save(self, directory: str | Path) -> None:
        """Save as `step_format.json` in `directory`."""
        (Path(directory) / STEP_FORMAT_NAME).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **kwargs) -> "StepFormat":
        """
        Return the format of a checkpoint folder or a Hub repository: its `step_format.json` or, without one, the format of
        the published model with this repository id or folder name.

        Args:
            path_or_repo (`str` or `Path`):
                Path of a folder, or id of a model repository.
            kwargs:
                Passed to [`~huggingface_hub.hf_hub_download`], for example `revision`.

        Raises:
            `FileNotFoundError`: If the checkpoint has no `step_format.json` and is not a known published model, or if the
            folder does not exist and the Hub cannot be reached.
            `ValueError`: See [`StepFormat.from_json`].
        """
        path = _find(path_or_repo, **kwargs)
        if path is not None:
            return cls.from_json(Path(path).read_bytes(), where=str(path))
        name = published_name(path_or_repo)
        if name is None:
            raise FileNotFoundError(
                f"{path_or_repo} has no {STEP_FORMAT_NAME}, so the encoding used in training is unknown. Pass "
                "`step_format=StepFormat(...)` (`--step_format FILE` on the command line) with the separators, prompt "
                f"style and head it was trained with, or the name of a published format ({', '.join(PUBLISHED_FORMATS)})."
            )
        return cls.published(name)

    @classmethod
    def find(cls, path_or_repo: str | Path, **kwargs) -> "StepFormat | None":
        """Like [`StepFormat.from_pretrained`], but return `None` if the format is unknown."""
        try:
            return cls.from_pretrained(path_or_repo, **kwargs)
        except FileNotFoundError:
            return None

    @classmethod
    def named(cls, name_or_file: str | Path) -> "StepFormat":
        """
        Return the published format with this name, or read it from a file, or from the `step_format.json` of a folder.

        Raises:
            `FileNotFoundError`: If it is neither a name nor such a file.
            `ValueError`: See [`StepFormat.from_json`].
        """
        if not isinstance(name_or_file, str | Path):
            raise ValueError(
                f"`step_format` is {shown(name_or_file)}. It must be the name of a published format, or the path of a file."
            )
        if name_or_file in PUBLISHED_FORMATS:
            return cls.published(name_or_file)
        file = Path(name_or_file)
        if file.is_dir():
            file /= STEP_FORMAT_NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"`step_format`: the file {file} does not exist. Pass a {STEP_FORMAT_NAME}, which the trainer saves with "
                f"every checkpoint, or the name of a published format: {', '.join(PUBLISHED_FORMATS)}."
            )
        return cls.from_json(file.read_bytes(), where=str(file))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = STEP_FORMAT_NAME) -> "StepFormat":
        """
        Parse the content of a `step_format.json`.

        Missing keys get the default of the version that the file was written with. A file without `version` is version
        1.

        Args:
            text (`str` or `bytes`):
                Content of the file.
            where (`str`, *optional*, defaults to `"step_format.json"`):
                Name of the file for error messages.

        Raises:
            `ValueError`: If `text` is not a JSON object, has unknown or duplicate keys or invalid values, or was
            written by a newer version of this package.
        """
        values = parse_json(text, where)
        if not isinstance(values, dict):
            raise ValueError(f"{where}: found {shown(values)}, expected a JSON object as saved by the trainer.")
        version = values.pop("version", 1)
        if type(version) is not int or version < 1:
            raise ValueError(f"{where}: `version` is {shown(version)}, expected a whole number from 1 to {VERSION}.")
        if version > VERSION:
            raise ValueError(
                f"{where}: `version` is {shown(version)}. This trl_hrm reads versions up to {VERSION}. Upgrade with `pip install "
                "--upgrade trl-hrm`."
            )
        known = [field.name for field in fields(cls)]
        unknown = sorted(values.keys() - set(known))
        if unknown:
            raise ValueError(
                f"{where}: unknown keys {shown(unknown)}. Valid keys are {known}. Correct or remove them, or upgrade trl_hrm if a "
                "newer version wrote the file."
            )
        try:
            return cls(**(OLD_DEFAULTS.get(version, {}) | values))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def published_name(path_or_repo: str | Path) -> str | None:
    """
    Return the name of the published format of a model with this repository id or folder name, or `None`. Repositories of other
    owners may have the same name, but a different model.
    """
    is_folder = Path(path_or_repo).is_dir()
    given = Path(path_or_repo).absolute().name if is_folder else str(path_or_repo)
    for name, (repositories, _) in PUBLISHED_FORMATS.items():
        known = [repository.split("/")[1] if is_folder else repository for repository in repositories]
        if given.casefold() in map(str.casefold, known):
            return name
    return None


def _find(path_or_repo: str | Path, **kwargs) -> str | Path | None:
    if Path(path_or_repo).is_dir():
        path = Path(path_or_repo) / STEP_FORMAT_NAME
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    check_repo_id(path_or_repo)
    try:
        return hf_hub_download(str(path_or_repo), STEP_FORMAT_NAME, **kwargs)
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        if published_name(path_or_repo) is not None:
            return None  # the file does not exist, so it is never in the cache
        raise FileNotFoundError(
            f"{path_or_repo}: this folder does not exist. A Hub repository with this name is not in the cache, and the Hub "
            f"cannot be reached: {error}"
        ) from error


def check_repo_id(path_or_repo: str | Path) -> None:
    """
    Check that the path of a missing folder can be the id of a repository on the Hub.

    Raises:
        `FileNotFoundError`: If it cannot, such as `./model`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(str(path_or_repo))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{path_or_repo}: this folder does not exist, and no Hub repository can have this name. Pass the folder of a model, or "
            "the id of a repository on the Hub."
        ) from error
