"""How a problem and its steps become token ids. Training, scoring, evaluation and serving all encode through it."""

import json
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


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEP_FORMAT_NAME = "step_format.json"
# Version of `step_format.json`. It changes when a file without some key must be read differently than before
VERSION = 2
# For each older version, the values of keys missing from its files where today's default is different: a checkpoint keeps
# the encoding it was trained with. Files without a version are version 1.
OLD_DEFAULTS: dict[int, dict[str, Any]] = {1: {"chat_template_date": None, "sanitize_control_tokens": False}}


@dataclass(frozen=True)
class StepFormat:
    r"""
    The text contract of a step reward model. It is saved as `step_format.json` next to every checkpoint.

    The prompt and every step are tokenised apart and joined as ids, so that no token crosses a border and a prefix has
    the same ids whatever follows it. Each step ends with the ids of `step_separator`; the last of them is the *step
    token*, the only position where a step is labelled and scored.

    Args:
        prompt_style (`str`, *optional*, defaults to `"plain"`):
            `"plain"`: the BOS token, if the tokenizer has one, then the prompt. `"chat"`: the prompt as a user message
            in the tokenizer's chat template, with the generation prompt.
        system_prompt (`str`, *optional*):
            System message in front of the user message. Only with `prompt_style="chat"`.
        step_separator (`str`, *optional*, defaults to `"\n\n"`):
            Text after every step.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the steps of a merged step. It tells a merged step from two single ones, so its ids must
            differ from those of `step_separator`.
        head (`str`, *optional*, defaults to `"classification"`):
            `"classification"`: token classification with 2 labels, score `softmax(logits)[1]`
            ([HRM](https://huggingface.co/papers/2503.13551), eq. 2). `"regression"`: token classification with 1
            label. `"lm"`: causal language model, score the probability of `label_tokens[0]` among the two label
            tokens at the step token.
        regression_loss (`str`, *optional*, defaults to `"mse"`):
            Loss of the regression head, which fixes its score too: `"mse"` clips the output to `[0, 1]`, `"bce"` takes
            its sigmoid. Only read with `head="regression"`.
        label_tokens (`tuple[str, str]`, *optional*, defaults to `("+", "-")`):
            Tokens for a correct and a wrong step. Only read with `head="lm"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the chat template, such as `{"enable_thinking": False}`. Only with `prompt_style="chat"`.
        chat_template_date (`str`, *optional*, defaults to `"2024-07-26"`):
            Date for chat templates that print today's date. `None`, the default of files of version 1, is the clock: the
            ids depend on the day, with a warning.
        sanitize_control_tokens (`bool`, *optional*, defaults to `True`):
            Whether to encode control tokens in the problem and the steps, such as `<|im_end|>`, as plain text. With
            `False`, the default of files of version 1, they become tokens, so data can forge turns and step tokens.

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
                expected = "a string or nothing" if name == "system_prompt" else "a string"
                raise ValueError(f"StepFormat: `{name}` is {value!r}, expected {expected}.")
        for name, allowed in (
            ("prompt_style", ("plain", "chat")),
            ("head", ("classification", "regression", "lm")),
            ("regression_loss", ("mse", "bce")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"StepFormat: `{name}` is {getattr(self, name)!r}, expected one of {allowed}.")
        if self.system_prompt is not None and self.prompt_style != "chat":
            raise ValueError('StepFormat: `system_prompt` needs `prompt_style="chat"`; a plain prompt has no roles.')
        if self.chat_template_kwargs is not None and self.prompt_style != "chat":
            raise ValueError(
                'StepFormat: `chat_template_kwargs` needs `prompt_style="chat"`; a plain prompt has no chat template.'
            )
        check_chat_template_options(self.chat_template_kwargs, self.chat_template_date)
        if not isinstance(self.sanitize_control_tokens, bool):
            raise ValueError(
                f"StepFormat: `sanitize_control_tokens` is {self.sanitize_control_tokens!r}, expected true or false."
            )
        if isinstance(self.label_tokens, list):  # JSON and the command line give lists
            object.__setattr__(self, "label_tokens", tuple(self.label_tokens))
        if (
            not isinstance(self.label_tokens, tuple)  # the string "+-" would be two tokens
            or not all(isinstance(token, str) for token in self.label_tokens)
            or len(self.label_tokens) != 2
            or self.label_tokens[0] == self.label_tokens[1]
        ):
            raise ValueError(
                f"StepFormat: `label_tokens` is {self.label_tokens!r}, expected two different tokens: correct, wrong."
            )

    def check(self, tokenizer: "PreTrainedTokenizerBase", merged: bool = False) -> None:
        """
        Refuse a tokenizer that cannot express this format, and warn if it splits `step_separator`.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer that will encode.
            merged (`bool`, *optional*, defaults to `False`):
                Whether merged steps will be encoded, so that `merge_separator` is checked too.

        Raises:
            `ValueError`: If a separator encodes to nothing or to the unknown token, if both separators encode to the
            same ids and merged steps are used, if `merge_separator` holds a control token, which in a merged step would be
            plain text, if the chat template is missing, fails, leaves out the prompt or the system message or has no
            variable of `chat_template_kwargs`, or if a label token is not one token.
        """
        step_ids = self._separator_ids(tokenizer, "step_separator")
        if len(step_ids) > 1:
            last = tokenizer.decode(step_ids[-1:])
            warnings.warn(
                f"StepFormat: the tokenizer encodes `step_separator` {self.step_separator!r} to {len(step_ids)} tokens, "
                f"and steps are judged at the last, {last!r}, which may also occur inside steps. If the model has a token for "
                "it, use the tokenizer of the model. To train with it, choose a separator that is one token, or add it "
                f"with `tokenizer.add_tokens([{self.step_separator!r}], special_tokens=True)` and resize the embeddings.",
                stacklevel=2,
            )
        if merged:
            self.check_merged(tokenizer)
        if self.prompt_style == "chat":
            self._check_chat_template(tokenizer)
        if self.head == "lm":
            self.label_token_ids(tokenizer)

    def check_merged(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Refuse a tokenizer that cannot tell `merge_separator` from `step_separator`."""
        step_ids = self._separator_ids(tokenizer, "step_separator")
        if self._separator_ids(tokenizer, "merge_separator") == step_ids:
            raise ValueError(
                f"StepFormat: `merge_separator` {self.merge_separator!r} and `step_separator` {self.step_separator!r} "
                f"encode to the same ids {step_ids}. A merged step would be the same text as two single steps, with "
                "another label. Choose two separators that the tokenizer tells apart."
            )
        if self.sanitize_control_tokens and find_control_text(tokenizer, self.merge_separator):
            raise ValueError(
                f"StepFormat: `merge_separator` {self.merge_separator!r} holds a control token. Merged steps are data, in which "
                "it would be plain text. Choose a separator of ordinary text, or set `sanitize_control_tokens=False`."
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
        except Exception as error:  # templates raise whatever they like
            raise ValueError(
                f"StepFormat: the chat template of the tokenizer fails with a user message ({error}). Set another "
                '`tokenizer.chat_template`, or use `prompt_style="plain"`.'
            ) from error
        if ids == other_ids:
            raise ValueError(
                "StepFormat: the chat template of the tokenizer leaves out the user message, so every problem has the same "
                'ids. Set another `tokenizer.chat_template`, or use `prompt_style="plain"`.'
            )
        if self.system_prompt is None:
            return
        remedy = "Remove `system_prompt`, or set a `tokenizer.chat_template` that supports system messages."
        try:
            system_ids = self.encode_prompt(tokenizer, "1+2?")
        except Exception as error:
            raise ValueError(
                f"StepFormat: the chat template of the tokenizer refuses the system message ({error}). {remedy}"
            ) from error
        if system_ids == ids:
            raise ValueError(
                "StepFormat: the chat template of the tokenizer ignores the system message, so `system_prompt` would have "
                f"no effect. {remedy}"
            )

    def _separator_ids(self, tokenizer: "PreTrainedTokenizerBase", name: str) -> list[int]:
        separator = getattr(self, name)
        ids = _encode(tokenizer, separator)
        if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
            found = "nothing" if not ids else f"{ids}, which holds the unknown token"
            raise ValueError(
                f"StepFormat: the tokenizer encodes `{name}` {separator!r} to {found}; a step would have no token of "
                "its own to be judged at. Choose a separator from the tokenizer's vocabulary. If the tokenizer was loaded from a "
                "folder, check that its files are there: without them, an empty tokenizer may be loaded."
            )
        return ids

    def label_token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Ids of the wrong and the correct label token, in the order of the classes (0 wrong, 1 correct)."""
        ids = []
        for token in reversed(self.label_tokens):
            token_ids = _encode(tokenizer, token)
            if len(token_ids) != 1 or token_ids[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"StepFormat: label token {token!r} encodes to {token_ids}, expected exactly one known token. "
                    "Choose other `label_tokens`, or add it to the tokenizer and resize the embeddings."
                )
            ids += token_ids
        return ids

    def merge(self, steps: Sequence[str]) -> str:
        """Text of the step that is made of consecutive `steps`."""
        return self.merge_separator.join(steps)

    def find_markers(self, tokenizer: "PreTrainedTokenizerBase", step: str) -> list[str]:
        """
        Return the control tokens and separators that occur inside a step, where they would forge turns or steps.

        Tags such as `<think>`, which policies write, are not included. The `step_separator` is included only if it has
        letters or digits, such as `" ки"`: ordinary text contains white space and punctuation too.
        """
        found = find_control_text(tokenizer, step, tags=False)
        is_marker = any(map(str.isalnum, self.step_separator)) and self.step_separator not in found
        return found + [self.step_separator] * (is_marker and self.step_separator in step)

    def encode_prompt(self, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
        """Ids of the prompt, up to where the first step begins."""
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
                S step texts, in any arrangement: each is encoded alone.

        Returns:
            `tuple[list[int], list[list[int]]]`: Ids of the prompt, and S lists of ids, each a step followed by the
            separator. The last id of each is the step token.
        """
        separator_ids = _encode(tokenizer, self.step_separator)
        step_ids = tokenizer(list(steps), add_special_tokens=False)["input_ids"] if len(steps) else []
        if self.sanitize_control_tokens:
            step_ids = [plain_text_ids(tokenizer, step, ids) for step, ids in zip(steps, step_ids, strict=True)]
        return self.encode_prompt(tokenizer, prompt), [ids + separator_ids for ids in step_ids]

    def encode_step(self, tokenizer: "PreTrainedTokenizerBase", step: str) -> list[int]:
        """Ids of one step and the separator after it, as [`StepFormat.encode`] gives them for several at a time."""
        return self._encode_data(tokenizer, step) + _encode(tokenizer, self.step_separator)

    def to_json(self) -> str:
        """Return the content of `step_format.json`."""
        return json.dumps({"version": VERSION} | asdict(self), indent=2, ensure_ascii=False)

    def save(self, directory: str | Path) -> None:
        """Write `step_format.json` into `directory`."""
        (Path(directory) / STEP_FORMAT_NAME).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **kwargs) -> "StepFormat":
        """
        Read `step_format.json` from a checkpoint folder or a Hub repository.

        Args:
            path_or_repo (`str` or `Path`):
                Folder, or id of a model repository.
            kwargs:
                Passed to [`~huggingface_hub.hf_hub_download`], for example `revision`.

        Raises:
            `FileNotFoundError`: If there is no `step_format.json`, or no such folder and the Hub cannot be reached.
            `ValueError`: See [`StepFormat.from_json`].
        """
        path = _find(path_or_repo, **kwargs)
        if path is None:
            raise FileNotFoundError(
                f"{path_or_repo} has no {STEP_FORMAT_NAME}: how its steps were encoded in training is not known. Pass "
                "`step_format=StepFormat(...)` (`--step_format FILE` on the command line) with the separators, prompt "
                "style and head it was trained with."
            )
        return cls.from_json(Path(path).read_bytes(), where=str(path))

    @classmethod
    def find(cls, path_or_repo: str | Path, **kwargs) -> "StepFormat | None":
        """Read `step_format.json` as [`StepFormat.from_pretrained`] does. Return `None` if it cannot be found."""
        try:
            path = _find(path_or_repo, **kwargs)
        except FileNotFoundError:
            return None
        return None if path is None else cls.from_json(Path(path).read_bytes(), where=str(path))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = STEP_FORMAT_NAME) -> "StepFormat":
        """
        Parse the content of a `step_format.json`.

        Missing keys have the default of the version in which the file was written. A file without a `version` was written
        before there was one: it is version 1.

        Args:
            text (`str` or `bytes`):
                Content of the file.
            where (`str`, *optional*, defaults to `"step_format.json"`):
                Name of the file, for errors.

        Raises:
            `ValueError`: If it is not a JSON object, has unknown or repeated keys or invalid values, or was written by a
            newer version of this package.
        """
        try:
            values = json.loads(text, object_pairs_hook=_unique_keys)
        except ValueError as error:
            raise ValueError(f"{where}: expected JSON, as the trainer saves it: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"{where}: found {json.dumps(values)[:60]}, expected a JSON object, as the trainer saves it."
            )
        version = values.pop("version", 1)
        if type(version) is not int or version < 1:
            raise ValueError(f"{where}: `version` is {version!r}, expected a whole number from 1 to {VERSION}.")
        if version > VERSION:
            raise ValueError(
                f"{where}: `version` is {version}. This trl_hrm reads versions up to {VERSION}. Upgrade it with `pip install "
                "--upgrade trl-hrm`."
            )
        known = [field.name for field in fields(cls)]
        unknown = sorted(values.keys() - set(known))
        if unknown:
            raise ValueError(
                f"{where}: unknown keys {unknown}, expected some of {known}. Correct or remove them. If a newer trl_hrm "
                "wrote the file, upgrade: ignoring a key could change the scores."
            )
        try:
            return cls(**(OLD_DEFAULTS.get(version, {}) | values))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a key occurs twice in {[key for key, _ in pairs]}")
    return values


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _find(path_or_repo: str | Path, **kwargs) -> str | Path | None:
    if Path(path_or_repo).is_dir():
        path = Path(path_or_repo) / STEP_FORMAT_NAME
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        return hf_hub_download(str(path_or_repo), STEP_FORMAT_NAME, **kwargs)
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{path_or_repo}: there is no such folder, and no such repository in the cache of the Hub, which cannot be reached: "
            f"{error}"
        ) from error
