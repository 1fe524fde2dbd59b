"""Encoding of a problem and its steps to token ids, shared by training, scoring, evaluation and serving."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .encoding import (
    CHAT_TEMPLATE_DATE,
    check_chat_template,
    check_chat_template_options,
    encode_around,
    find_control_text,
    plain_text_ids,
    render_chat,
)
from .io import dump_json, parse_json, shown


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEP_FORMAT_NAME = "step_format.json"
# Version of `step_format.json`. It increases when the default of a key changes.
VERSION = 2
# Defaults of older versions that differ from today's. Keys missing from an older file get these values, so that a
# checkpoint keeps the encoding it was trained with. Files without a version are version 1.
OLD_DEFAULTS: dict[int, dict[str, Any]] = {1: {"chat_template_date": None, "sanitize_control_tokens": False}}


@dataclass(frozen=True)
class StepFormat:
    r"""
    How a step reward model encodes a problem and its steps. Saved as `step_format.json` with every checkpoint.

    The prompt and each step are tokenized separately and their ids are concatenated. No token spans two steps, and the
    ids of a prefix do not depend on what follows it. Each step ends with the ids of `step_separator`. The last of
    these ids is the *step token*, the only position where the step is labelled and scored.

    Args:
        prompt_style (`str`, *optional*, defaults to `"plain"`):
            `"plain"`: the BOS token, if the tokenizer has one, then the prompt. `"chat"`: the prompt as a user message
            in the tokenizer's chat template, with the generation prompt.
        system_prompt (`str`, *optional*):
            System message before the user message. Requires `prompt_style="chat"`.
        step_separator (`str`, *optional*, defaults to `"\n\n"`):
            Text after every step.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the original steps of a merged step. It must not encode to the same ids as `step_separator`.
        head (`str`, *optional*, defaults to `"classification"`):
            `"classification"`: token classification with 2 labels, score `softmax(logits)[1]`
            ([HRM](https://huggingface.co/papers/2503.13551), eq. 2). `"regression"`: token classification with 1
            label. `"lm"`: causal language model, score `p(correct) / (p(correct) + p(wrong))` of the two label tokens
            at the step token.
        regression_loss (`str`, *optional*, defaults to `"mse"`):
            Loss of the regression head. It also determines the score: with `"mse"` the output clipped to `[0, 1]`,
            with `"bce"` its sigmoid. Only used with `head="regression"`.
        label_tokens (`tuple[str, str]`, *optional*, defaults to `("+", "-")`):
            Tokens for a correct and a wrong step. Only used with `head="lm"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the chat template, such as `{"enable_thinking": False}`. Requires `prompt_style="chat"`.
        chat_template_date (`str`, *optional*, defaults to `"2024-07-26"`):
            Date for chat templates that print today's date. With `None`, the default in files of version 1, the
            current date is used: the ids change every day, and a warning is given.
        sanitize_control_tokens (`bool`, *optional*, defaults to `True`):
            Whether to encode control tokens in the problem and the steps, such as `<|im_end|>`, as plain text. With
            `False`, the default in files of version 1, they are encoded as control tokens, so that data can fake turns
            and step tokens.

    Example:

    ```python
    >>> step_format = StepFormat(step_separator="\n")
    >>> prompt_ids, step_ids = step_format.encode(tokenizer, "1+2+3?", ["1+2=3.", "3+3=6."])
    >>> tokenizer.decode(prompt_ids + step_ids[0] + step_ids[1])
    '1+2+3?1+2=3.\n3+3=6.\n'
    ```
    """

    prompt_style: Literal["plain", "chat"] = "plain"
    system_prompt: str | None = None
    step_separator: str = "\n\n"
    merge_separator: str = "\n"
    head: Literal["classification", "regression", "lm"] = "classification"
    regression_loss: Literal["mse", "bce"] = "mse"
    label_tokens: tuple[str, str] = ("+", "-")
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template_date: str | None = CHAT_TEMPLATE_DATE
    sanitize_control_tokens: bool = True

    def __post_init__(self):
        for name in ("step_separator", "merge_separator", "system_prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name != "system_prompt"):
                expected = "a string or `None`" if name == "system_prompt" else "a string"
                raise ValueError(f"StepFormat: `{name}` is {shown(value)}. It must be {expected}.")
        for name, allowed in (
            ("prompt_style", ("plain", "chat")),
            ("head", ("classification", "regression", "lm")),
            ("regression_loss", ("mse", "bce")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"StepFormat: `{name}` is {shown(getattr(self, name))}. It must be one of {', '.join(allowed)}."
                )
        if self.system_prompt is not None and self.prompt_style != "chat":
            raise ValueError(
                'StepFormat: `system_prompt` requires `prompt_style="chat"`. Plain prompts have no roles.'
            )
        if self.chat_template_kwargs is not None and self.prompt_style != "chat":
            raise ValueError(
                'StepFormat: `chat_template_kwargs` requires `prompt_style="chat"`. Plain prompts use no chat template.'
            )
        check_chat_template_options(self.chat_template_kwargs, self.chat_template_date)
        if not isinstance(self.sanitize_control_tokens, bool):
            raise ValueError(
                f"StepFormat: `sanitize_control_tokens` is {shown(self.sanitize_control_tokens)}. It must be true or false."
            )
        if isinstance(self.label_tokens, list):  # as JSON and the command line pass it
            object.__setattr__(self, "label_tokens", tuple(self.label_tokens))
        if (
            not isinstance(self.label_tokens, tuple)  # the string "+-" has two elements too
            or not all(isinstance(token, str) for token in self.label_tokens)
            or len(self.label_tokens) != 2
            or self.label_tokens[0] == self.label_tokens[1]
        ):
            raise ValueError(
                f"StepFormat: `label_tokens` is {shown(self.label_tokens)}. It must be two different tokens: correct, wrong."
            )

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
        step_ids = self._separator_ids(tokenizer, "step_separator")
        if len(step_ids) > 1:
            last = tokenizer.decode(step_ids[-1:])
            warnings.warn(
                f"StepFormat: the tokenizer encodes `step_separator` {shown(self.step_separator)} to {len(step_ids)} tokens, "
                f"and steps are scored at the last, {shown(last)}, which may also occur inside steps. If the model was trained "
                "with a token for the separator, use the model's tokenizer. To train a new model, choose a separator that is "
                f"one token, or add it with `tokenizer.add_tokens([{shown(self.step_separator)}], special_tokens=True)` and "
                "resize the embeddings.",
                stacklevel=2,
            )
        if merged:
            self.check_merged(tokenizer)
        if self.prompt_style == "chat":
            self._check_chat_template(tokenizer)
        if self.head == "lm":
            self.label_token_ids(tokenizer)

    def check_merged(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise `ValueError` if the tokenizer cannot encode `merge_separator` as text distinct from `step_separator`."""
        step_ids = self._separator_ids(tokenizer, "step_separator")
        if self._separator_ids(tokenizer, "merge_separator") == step_ids:
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
                'StepFormat: `prompt_style="chat"`, but the tokenizer has no chat template. Set '
                '`tokenizer.chat_template`, or use `prompt_style="plain"`.'
            )
        check_chat_template(tokenizer, self.chat_template_kwargs)
        without_system = replace(self, system_prompt=None)
        try:
            ids = without_system.encode_prompt(tokenizer, "1+2?")
            other_ids = without_system.encode_prompt(tokenizer, "3+4?")
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
            system_ids = self.encode_prompt(tokenizer, "1+2?")
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
        ids = []
        for token in reversed(self.label_tokens):
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
        contains a letter or digit, as `" ки"` does: whitespace and punctuation are normal in a step.
        """
        found = find_control_text(tokenizer, step, tags=False)
        is_marker = any(map(str.isalnum, self.step_separator)) and self.step_separator not in found
        return found + [self.step_separator] * (is_marker and self.step_separator in step)

    def encode_prompt(self, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
        """Return the ids of the prompt, up to the first step."""
        if self.prompt_style == "chat":
            if self.sanitize_control_tokens:
                return encode_around(tokenizer, prompt, lambda text: self._render(tokenizer, text))
            return _encode(tokenizer, self._render(tokenizer, prompt))
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + self._encode_data(tokenizer, prompt)

    def _render(self, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return render_chat(tokenizer, messages, self.chat_template_kwargs, self.chat_template_date)

    def _encode_data(self, tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
        ids = _encode(tokenizer, text)
        return plain_text_ids(tokenizer, text, ids) if self.sanitize_control_tokens else ids

    def encode(
        self, tokenizer: "PreTrainedTokenizerBase", prompt: str, steps: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """
        Encode a prompt and steps.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            prompt (`str`):
                The problem.
            steps (`Sequence[str]`):
                Texts of the S steps. Each is encoded separately, so their order does not matter.

        Returns:
            `tuple[list[int], list[list[int]]]`: Ids of the prompt, and for each step the ids of its text and the
            separator. The last id of each step is its step token.
        """
        separator_ids = _encode(tokenizer, self.step_separator)
        step_ids = tokenizer(list(steps), add_special_tokens=False)["input_ids"] if len(steps) else []
        if self.sanitize_control_tokens:
            step_ids = [plain_text_ids(tokenizer, step, ids) for step, ids in zip(steps, step_ids, strict=True)]
        return self.encode_prompt(tokenizer, prompt), [ids + separator_ids for ids in step_ids]

    def encode_step(self, tokenizer: "PreTrainedTokenizerBase", step: str) -> list[int]:
        """Return the ids of one step and its separator, as [`StepFormat.encode`] does for several steps."""
        return self._encode_data(tokenizer, step) + _encode(tokenizer, self.step_separator)

    def to_json(self) -> str:
        """Return the content of `step_format.json`."""
        return dump_json({"version": VERSION} | asdict(self), STEP_FORMAT_NAME, indent=2)

    def save(self, directory: str | Path) -> None:
        """Save as `step_format.json` in `directory`."""
        (Path(directory) / STEP_FORMAT_NAME).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **kwargs) -> "StepFormat":
        """
        Read `step_format.json` from a checkpoint folder or a Hub repository.

        Args:
            path_or_repo (`str` or `Path`):
                Path of a folder, or id of a model repository.
            kwargs:
                Passed to [`~huggingface_hub.hf_hub_download`], for example `revision`.

        Raises:
            `FileNotFoundError`: If the checkpoint has no `step_format.json`, or if the folder does not exist and the
            Hub cannot be reached.
            `ValueError`: See [`StepFormat.from_json`].
        """
        path = _find(path_or_repo, **kwargs)
        if path is None:
            raise FileNotFoundError(
                f"{path_or_repo} has no {STEP_FORMAT_NAME}, so the encoding used in training is unknown. Pass "
                "`step_format=StepFormat(...)` (`--step_format FILE` on the command line) with the separators, prompt "
                "style and head it was trained with."
            )
        return cls.from_json(Path(path).read_bytes(), where=str(path))

    @classmethod
    def find(cls, path_or_repo: str | Path, **kwargs) -> "StepFormat | None":
        """Like [`StepFormat.from_pretrained`], but return `None` if `step_format.json` is missing."""
        try:
            path = _find(path_or_repo, **kwargs)
        except FileNotFoundError:
            return None
        return None if path is None else cls.from_json(Path(path).read_bytes(), where=str(path))

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
