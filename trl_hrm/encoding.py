"""Encode chat prompts and data so that the ids do not depend on today's date or on control tokens in the data."""

import bisect
import datetime
import inspect
import itertools
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from .io import shown


# Default of Llama 3.2's template if `strftime_now` is not available. Any fixed date works; templates print it as
# "today".
CHAT_TEMPLATE_DATE = "2024-07-26"
_DIRECTIVES = "aAbBcCdDeFgGhHIjmMpRTuUVwWxXyY"  # strftime directives of a date without a time zone
_UNPADDED = "dmyHIMSj"  # directives with an unpadded form, such as `%-d`
_BARS = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
_BRACKETS = re.compile(r"[<\[{(].+[>\]})]", re.DOTALL)
_TAG = re.compile(r"</?([\w.-]+)>")
_UNSEEN = [*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900)]  # noncharacters and private use characters, used as markers


# Chat templates


def check_chat_template_options(kwargs: Mapping[str, Any] | None, date: str | None) -> None:
    """
    Check the options of a chat template.

    Args:
        kwargs (`Mapping[str, Any]`, *optional*):
            Variables for the template, such as `{"enable_thinking": False}`.
        date (`str`, *optional*):
            Date to use as today's date, such as `"2024-07-26"`.

    Raises:
        `ValueError`: If `kwargs` is not a JSON object or contains a reserved name, or if `date` is not a date.
    """
    if kwargs is not None:
        if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
            raise ValueError(
                f"`chat_template_kwargs` is {shown(kwargs)}. It must be a JSON object with names and values."
            )
        try:
            json.dumps(kwargs, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`chat_template_kwargs` is {shown(kwargs)}. It must have JSON values only, so that it can be saved: {error}."
            ) from error
        taken = sorted(kwargs.keys() & _reserved_names())
        if taken:
            raise ValueError(
                f"`chat_template_kwargs` sets {', '.join(taken)}, which is reserved. Remove it, and only set variables of the chat "
                "template, such as `enable_thinking`."
            )
    if date is not None:
        try:
            datetime.date.fromisoformat(date)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`chat_template_date` is {shown(date)}. It must be a date such as '2024-07-26'."
            ) from error


@lru_cache
def _reserved_names() -> frozenset[str]:
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset(parameters) | {"messages", "strftime_now", "sanitize_control_tokens"}


def check_chat_template(tokenizer: Any, kwargs: Mapping[str, Any] | None) -> str:
    """
    Return the chat template of a tokenizer.

    Raises:
        `ValueError`: If the template is not valid Jinja, does not use a variable of `kwargs`, or is random.
    """
    import jinja2

    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else tokenizer.get_chat_template()
    try:
        facts = _read_template(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"The chat template is not valid Jinja ({error}). Set a different `tokenizer.chat_template`."
        ) from error
    if facts.random:
        raise ValueError(
            f"The chat template uses `{facts.random}`, so the ids of a prompt change every time. Set a different "
            "`tokenizer.chat_template`."
        )
    unknown = sorted(kwargs.keys() - facts.variables) if kwargs else []
    if unknown:
        special = set(getattr(tokenizer, "special_tokens_map", ()))
        known = ", ".join(sorted(facts.variables - _reserved_names() - special)) or "none"
        raise ValueError(
            f"`chat_template_kwargs` sets {', '.join(unknown)}, which the chat template does not use. Remove or correct it. "
            f"Variables of this template: {known}."
        )
    return template


def render_chat(
    tokenizer: Any,
    messages: list[dict[str, str]],
    kwargs: Mapping[str, Any] | None,
    date: str | None,
    add_generation_prompt: bool = True,
) -> str:
    """
    Render messages with the chat template of a tokenizer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        messages (`list[dict[str, str]]`):
            Messages with `role` and `content`.
        kwargs (`Mapping[str, Any]`, *optional*):
            Variables for the template.
        date (`str`, *optional*):
            Date to use as today's date. With `None`, the current date is used, and a warning is given if the template
            reads it.
        add_generation_prompt (`bool`, *optional*, defaults to `True`):
            Whether to add the start of an assistant message.

    Raises:
        `ValueError`: See [`check_chat_template`].
    """
    template = check_chat_template(tokenizer, kwargs)
    if uses_clock(template):
        if date is None:
            warnings.warn(
                "The chat template prints today's date and `chat_template_date` is not set, so the ids of prompts change every "
                "day. Set it to a fixed date. For an existing reward model, set it to the date of its training in its "
                "`step_format.json`."
            )
        else:
            kwargs = dict(kwargs or {}) | {"chat_template": dated_template(template, date)}
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **(kwargs or {})
    )


def uses_clock(template: str) -> bool:
    """Return whether a chat template reads the current date or time."""
    return "strftime_now" in _read_template(template).variables


def dated_template(template: str, date: str) -> str:
    """
    Return the chat template with a fixed date instead of the current date.

    transformers provides a function `strftime_now` to templates. A macro with the same name replaces it, because
    transformers does not allow functions as template variables.
    """
    day = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    values = {f"%{letter}": day.strftime(f"%{letter}") for letter in _DIRECTIVES}
    values |= {f"%-{letter}": str(int(day.strftime(f"%{letter}"))) for letter in _UNPADDED}
    values = {"%%": "\0"} | values | {"\0": "%"}
    formats = _read_template(template).formats
    if formats is not None and "%%" not in formats:
        values = {name: value for name, value in values.items() if name in formats}
    filters = "".join(f" | replace({json.dumps(name)}, {json.dumps(value)})" for name, value in values.items())
    # The newline is not rendered, because transformers removes the first newline after a block
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


class _Template:
    """
    Properties of a chat template: the `variables` that it reads, the name of a `random` function that it uses, and the
    `formats` of its dates if all of them are literals.
    """

    def __init__(self, template: str):
        import jinja2.meta

        from ._compat import compile_jinja_template  # supports the tags of chat templates

        environment = compile_jinja_template(template).environment
        without_globals = environment.overlay()
        without_globals.globals = {}  # jinja2 treats globals as declared
        tree = without_globals.parse(template)
        undeclared = jinja2.meta.find_undeclared_variables(tree)
        filters = {node.name for node in tree.find_all(jinja2.nodes.Filter)}
        self.random = "random" if "random" in filters else "lipsum" if "lipsum" in undeclared else None
        self.variables = undeclared - (environment.globals.keys() - {"strftime_now"})
        calls = [node for node in tree.find_all(jinja2.nodes.Call) if _is_clock(node.node)]
        tests = [node for node in tree.find_all(jinja2.nodes.Test) if _is_clock(node.node)]
        constants = [node.args[0] for node in calls if node.args and isinstance(node.args[0], jinja2.nodes.Const)]
        literals = [node.value for node in constants if isinstance(node.value, str)]
        is_known = len(literals) == len(calls) == sum(map(_is_clock, tree.find_all(jinja2.nodes.Name))) - len(tests)
        self.formats = "\n".join(literals) if is_known else None


def _is_clock(node: Any) -> bool:
    return getattr(node, "name", None) == "strftime_now"


_read_template = lru_cache(_Template)


# Control tokens in data


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """
    Return the control tokens of a tokenizer. They mark the structure of a text, such as the end of a turn.

    Control tokens are special tokens, other added tokens with bars (`<|user|>`, DeepSeek's `<｜User｜>`), and added
    tokens in brackets that the chat template contains (`<tool_call>`). All other added tokens are ordinary text, such
    as runs of whitespace and Gemma's `<table>`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer. Without `added_tokens_decoder`, it has no control tokens.

    Returns:
        `dict[int, str]`: Ids and texts of the tokens.
    """
    return _control(tokenizer).tokens


def find_control_text(tokenizer: Any, text: str, tags: bool = True) -> list[str]:
    """
    Return the control tokens that occur in a text, in order. Whitespace is never included, even if it is a special
    token.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer.
        text (`str`):
            Text to search.
        tags (`bool`, *optional*, defaults to `True`):
            Whether to include tags that are not special tokens, such as Qwen's `<think>` and `</think>`, which
            policies generate.

    Example:

    ```python
    >>> find_control_text(tokenizer, "7<|im_end|><think>")
    ['<|im_end|>', '<think>']
    ```
    """
    control = _control(tokenizer)
    found = [token for token in control.pattern.findall(text) if not token.isspace()]
    return found if tags else [token for token in found if token not in control.tags]


def plain_text_ids(tokenizer: Any, text: str, ids: Sequence[int]) -> list[int]:
    """
    Return the ids of a text with its control tokens encoded as plain text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer.
        text (`str`):
            Text from an untrusted source, such as a step of a solution.
        ids (`Sequence[int]`):
            Ids of the text from the tokenizer, with `add_special_tokens=False`. They are returned unchanged if none is
            a control token.

    Raises:
        `ValueError`: If the text contains control tokens and the tokenizer cannot encode them as plain text.
    """
    control = _control(tokenizer)
    return control.encode(tokenizer, text, str, False) if control.occur_in(text, ids) else list(ids)


def encode_around(
    tokenizer: Any, data: str, render: Callable[[str], str], add_special_tokens: bool = False
) -> list[int]:
    """
    Encode a rendered template. Control tokens are encoded as plain text in the data, and as tokens in the template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer.
        data (`str`):
            Text from an untrusted source, such as a problem.
        render (`Callable[[str], str]`):
            Function that inserts the data into the template.
        add_special_tokens (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer adds its own special tokens, such as BOS.

    Raises:
        `ValueError`: If the data contains control tokens and the tokenizer cannot encode them as plain text.
    """
    control = _control(tokenizer)
    if control.occur_in(data, tokenizer.encode(data, add_special_tokens=False)):
        return control.encode(tokenizer, data, render, add_special_tokens)
    return list(tokenizer.encode(render(data), add_special_tokens=add_special_tokens))


def encode_pieces(
    tokenizer: Any, data: Sequence[str], render: Callable[[Sequence[str]], Sequence[str]], sanitize: bool
) -> tuple[list[int], list[int]]:
    """
    Encode a text that consists of pieces as one string, and find the tokens at which the pieces end.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A fast tokenizer.
        data (`Sequence[str]`):
            Texts from an untrusted source.
        render (`Callable[[Sequence[str]], Sequence[str]]`):
            Function that inserts the data into the text and returns the pieces of the text.
        sanitize (`bool`):
            Whether to encode control tokens in the data as plain text. Elsewhere, they are encoded as tokens.

    Returns:
        `tuple[list[int], list[int]]`: Ids of the text, and for each piece except the last one the number of tokens up to
        its end.

    Raises:
        `ValueError`: If a token spans the end of a piece, or the data contains control tokens and the tokenizer cannot
        encode them as plain text.
    """
    if sanitize and any(find_control_text(tokenizer, text) for text in data):
        control = _control(tokenizer)
        pieces, copy = control.alias(tokenizer, data, render)
        ids, offsets = copy.encode_with_offsets("".join(pieces), tokenizer.unk_token_id)
    else:
        pieces = render(data)
        encoded = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    starts = [start for start, _ in offsets]  # ascending; equal for the bytes of one character
    ends, position = [], 0
    for number, piece in enumerate(pieces[:-1]):
        position += len(piece)
        end = bisect.bisect_left(starts, position)
        if end == 0 or offsets[end - 1][1] > position:
            merged = tokenizer.decode(ids[max(end - 1, 0) : end + 1])
            raise ValueError(
                f"The tokenizer merges the end of step {number + 1} with the text after it to {shown(merged)}, so that the "
                f"end of {shown(piece[-60:])} is not a token. Remove white space and control characters around the steps."
            )
        ends.append(end)
    return ids, ends


class _Control:
    """Control tokens of a tokenizer: their ids and texts, a pattern that matches them, and the `tags` among them."""

    def __init__(self, tokenizer: Any):
        added = getattr(tokenizer, "added_tokens_decoder", {})
        listed = set(getattr(tokenizer, "chat_control_tokens", None) or ())
        template = str(getattr(tokenizer, "chat_template", None) or "")
        self.tokens = {
            index: token.content
            for index, token in added.items()
            if token.special
            or token.content in listed
            or _BARS.fullmatch(token.content)
            or (_BRACKETS.fullmatch(token.content) and token.content in template)
        }
        longest_first = sorted(self.tokens.values(), key=len, reverse=True)
        first_letters = re.escape("".join(sorted({token[:1] for token in longest_first})))
        pattern = f"(?=[{first_letters}])(?:{'|'.join(map(re.escape, longest_first))})"  # the lookahead makes it fast
        self.pattern = re.compile(pattern if self.tokens else "(?!)")  # (?!) matches nothing
        self.tags = {text for index, text in self.tokens.items() if _TAG.fullmatch(text) and not added[index].special}
        self._unknown = getattr(tokenizer, "unk_token_id", None)
        self._copies: dict[str, _PlainCopy] = {}
        self._names = _names(tokenizer)
        self._size = _size(tokenizer)
        self._next_id = max([index + 1 for index in added] + [self._size])

    def is_current(self, tokenizer: Any) -> bool:
        """
        Return whether the tokenizer still has the same control tokens.

        This is called for every text, so it must be fast. Reading the size or the added tokens of a large tokenizer
        takes up to 15 ms, longer than encoding a step. Checking whether the next free id is used takes less than 1 µs.
        """
        if _names(tokenizer) != self._names:
            return False
        backend = _backend(tokenizer)
        return backend.id_to_token(self._next_id) is None if backend else len(tokenizer) == self._size

    def occur_in(self, text: str, ids: Sequence[int]) -> bool:
        """Return whether a text contains control tokens. The id of the unknown token may also come from an unknown word."""
        found = self.tokens.keys() & ids
        return bool(found - {self._unknown}) or (bool(found) and self.tokens[self._unknown] in text)

    def encode(self, tokenizer: Any, data: str, render: Callable[[str], str], add_special_tokens: bool) -> list[int]:
        """Return the ids of `render(data)`, with control tokens in the data encoded as plain text."""
        (text,), copy = self.alias(tokenizer, [data], lambda texts: [render(texts[0])])
        return copy.encode(text, self._unknown, add_special_tokens)

    def alias(
        self, tokenizer: Any, data: Sequence[str], render: Callable[[Sequence[str]], Sequence[str]]
    ) -> "tuple[list[str], _PlainCopy]":
        """
        Return the pieces of `render(data)`, in which all control tokens outside the data are written as aliases, and the
        copy of the tokenizer that knows the aliases.
        """
        used = set().union(*data, *render(data))
        mark, end = itertools.islice((letter for letter in map(chr, _UNSEEN) if letter not in used), 2)
        if mark not in self._copies:
            self._copies[mark] = _PlainCopy(tokenizer, self.tokens, mark)
        copy = self._copies[mark]
        # Mark the control tokens of the data to distinguish them from control tokens of the template. The template may
        # truncate the data and leave a single mark
        marked = render([self.pattern.sub(lambda match: mark + match[0] + end, text) for text in data])
        pattern = re.compile(f"{mark}({self.pattern.pattern}){end}|({self.pattern.pattern})|{mark}|{end}")

        def replace(match: re.Match) -> str:
            return match[1] or (copy.alias(match[2]) if match[2] else "")

        return [pattern.sub(replace, piece) for piece in marked], copy


_CONTROL: WeakKeyDictionary[Any, _Control] = WeakKeyDictionary()


def _control(tokenizer: Any) -> _Control:
    # check the class, because reading the property of an instance creates all added tokens
    if not hasattr(type(tokenizer), "added_tokens_decoder"):
        return _Control(tokenizer)
    found = _CONTROL.get(tokenizer)
    if found is None or not found.is_current(tokenizer):
        found = _CONTROL[tokenizer] = _Control(tokenizer)
    return found


def _names(tokenizer: Any) -> tuple[str, tuple[str, ...]]:
    """Return the chat template and the special tokens, which determine which added tokens are control tokens."""
    return str(getattr(tokenizer, "chat_template", None)), tuple(getattr(tokenizer, "all_special_tokens", ()))


def _backend(tokenizer: Any) -> Any:
    """Return the `tokenizers.Tokenizer` of a fast tokenizer, or `None`."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, Tokenizer) else None


def _size(tokenizer: Any) -> int:
    """Return the size of the vocabulary, without added tokens for fast tokenizers."""
    backend = _backend(tokenizer)
    if backend is not None:
        return backend.get_vocab_size(with_added_tokens=False)
    return len(tokenizer) if hasattr(tokenizer, "__len__") else 0


class _PlainCopy:
    """
    A copy of a tokenizer in which each control token is renamed to an alias, so that its original text is ordinary
    text.

    A tokenizer without control tokens would give the same ids. Splitting the text at control tokens and encoding the
    parts separately would give different ids.
    """

    def __init__(self, tokenizer: Any, tokens: dict[int, str], mark: str):
        from tokenizers import Tokenizer

        backend = _backend(tokenizer)
        if backend is None:
            raise ValueError(
                f"A text contains control tokens, which {type(tokenizer).__name__} cannot encode as plain text. Use a fast "
                "tokenizer, remove them from the text, or set `sanitize_control_tokens=False`."
            )
        self._aliases = {text: f"{mark}{index}{mark}" for index, text in tokens.items()}
        values = json.loads(backend.to_str())
        values["truncation"] = values["padding"] = None
        kept = _rename(values["model"], self._aliases)
        for token in values["added_tokens"]:
            if token["content"] in self._aliases:
                token |= {"content": self.alias(token["content"]), "normalized": False}
        # The alias of a token that stays in the vocabulary gets a new id. It comes last, so that other ids do not
        # change
        last = {self.alias(text) for text in kept}
        values["added_tokens"].sort(key=lambda token: token["content"] in last)
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(values))
        except Exception as error:  # that package has no class for its errors
            raise ValueError(
                f"{tokenizer.name_or_path}: a special token of the tokenizer is part of ordinary tokens ({shown(str(error), 200)}). Choose "
                "special tokens that no text contains, or save the tokenizer again."
            ) from error
        self._ids = {self._tokenizer.token_to_id(self.alias(text)): index for index, text in tokens.items()}
        self._tokens = tokens

    def alias(self, token: str) -> str:
        """Return the alias of a control token."""
        return self._aliases[token]

    def encode(self, text: str, unknown: int | None, add_special_tokens: bool) -> list[int]:
        """
        Return the ids of a text in which control tokens are written as their aliases.

        Raises:
            `ValueError`: If the tokenizer produces a control token from ordinary text.
        """
        ids, _ = self.encode_with_offsets(text, unknown)
        if add_special_tokens:
            ids = self._known(self._tokenizer.encode(text, add_special_tokens=True).ids)
        return ids

    def encode_with_offsets(self, text: str, unknown: int | None) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text, without special tokens around it, and the first and last character of each token."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        made = (self._tokens.keys() & encoding.ids) - self._ids.keys() - {unknown}
        if made:
            raise ValueError(
                f"The tokenizer cannot encode {', '.join(repr(self._tokens[index]) for index in sorted(made))} as plain text. "
                "Remove it from the text, or set `sanitize_control_tokens=False`."
            )
        return self._known(encoding.ids), encoding.offsets

    def _known(self, ids: Sequence[int]) -> list[int]:
        return [self._ids.get(index, index) for index in ids]


def _rename(model: dict[str, Any], names: dict[str, str]) -> set[str]:
    """
    Rename tokens of a vocabulary, so that the model cannot produce them from text.

    Returns:
        `set[str]`: Tokens that keep their names: the unknown token, and tokens produced by merges.
    """
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram model
        unknown = set() if model.get("unk_id") is None else {vocab[model["unk_id"]][0]}
        for entry in vocab:
            if entry[0] not in unknown:
                entry[0] = names.get(entry[0], entry[0])
        return unknown & names.keys()
    merges = model.get("merges", ())
    merged = {merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in merges}
    found = names.keys() & vocab.keys()
    kept = found & (merged | {model.get("unk_token")})
    for text in found - kept:
        vocab[names[text]] = vocab.pop(text)
    return kept
