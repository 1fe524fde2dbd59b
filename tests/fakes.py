"""Fakes and small writers that several test folders use: a tokenizer, the runner of the demo, trackers, files of rows."""

import json
import os
import string
from pathlib import Path
from types import SimpleNamespace

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


TEXTS = [
    "Find x in 3x + 4 = 10.\n\nThen x = 2 <b>and</b> 2 < 3.",
    "im_end eot_id extra User table think |> <| [INST] ",
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<extra_0>", "[INST]", "</s>"]
ADDED = ["<｜User｜>", "<think>", "</think>", "<call>", "\n\n\n", "<table>", "kilogram"]
CONTROL = {*SPECIAL, "<｜User｜>", "<think>", "</think>", "<call>"}
CHAT = (
    "{{ bos_token or '' }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    "{% if done %}</think>{% endif %}{% if tools %}<call>kilogram</call>{% endif %}"
)
LLAMA = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}\n\nToday Date: {{ date_string }}\n"
    "{{ messages[0]['content'] }}"
)
GPT = (
    "{%- macro system() -%}{{ 'Current date: ' + strftime_now('%Y-%m-%d') }} {{ effort | default('low') }}{%- endmacro -%}"
    "{{ system() }} {{ messages[0]['content'] }}"
)
INDIRECT = "  {%- set now = strftime_now %}{{ now('%A, %-d. %B, day %j, 100%%') }} {{ messages[0]['content'] }}"


def byte_level(added: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE like Qwen and Llama 3: control tokens are outside the model's vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return with_tokens(tokenizer, added)


def with_tokens(tokenizer: Tokenizer, added: bool) -> PreTrainedTokenizerFast:
    names = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    names += [AddedToken(text, special=False, normalized=False) for text in ADDED]
    tokenizer.add_tokens([name for name in names if added or name.content not in CONTROL])
    special = {"additional_special_tokens": SPECIAL} if added else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT if added else None, **special)


def merging_tokenizer(merges: list[tuple[str, str]], split: str = "") -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer over characters with a few merges. `split` matches tokens that it isolates first."""
    characters = {*"".join(string.printable.split()), *"\n\t ", *"所以答案是三。"}
    vocab = {token: i for i, token in enumerate([*sorted(characters), *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    if split:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(split), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Recorder:
    """Records the jobs of the stages without running them."""

    def __init__(self):
        self.jobs = {}

    def run(self, stage, jobs, describe):
        self.jobs |= {(stage, name): job for name, job in jobs.items()}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Python runs it at the start of every process with it on the path, including the processes that commands start
GUARD = """
import os, socket

def guarded(name):
    real = getattr(socket.socket, name)
    def call(self, *args):
        address = args[-1]
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            refuse(name, address[0])
        return real(self, *args)
    setattr(socket.socket, name, call)

def refuse(name, host):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(f"{name} {host}\\n")
    raise OSError("no network in this test")

for name in ("connect", "connect_ex", "sendto"):
    guarded(name)
resolve = socket.getaddrinfo
socket.getaddrinfo = lambda host, *args, **kwargs: (
    resolve(host, *args, **kwargs) if host in ("127.0.0.1", "localhost", None) else refuse("getaddrinfo", host)
)
"""


def guarded(folder: Path, offline: bool) -> dict[str, str]:
    """Return the environment of a process without network. Its attempts are written to `attempts`."""
    (folder / "guard").mkdir(exist_ok=True)
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    (folder / "attempts").touch()
    environment = os.environ | {
        "PYTHONPATH": str(folder / "guard"),
        "ATTEMPTS": str(folder / "attempts"),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    environment.pop("CI", None)  # with CI set, libraries would send no telemetry
    return environment


class Tracker(SimpleNamespace):
    """Stands for the modules trackio and wandb, which have the same classes. `run` is the current run, or `None`."""

    def __init__(self, name: str, run: str | None):
        super().__init__(__name__=name, __spec__=name, run=run, logged=[], runs=[])
        self.context_vars = SimpleNamespace(current_run=SimpleNamespace(get=lambda: self.run))

    def Html(self, data, inject):  # noqa: N802
        return ("html", data, inject)

    def Table(self, columns, data):  # noqa: N802
        return ("table", columns, data)

    def Image(self, image):  # noqa: N802
        return ("image", image.dtype, image.shape[2])

    def init(self, **settings):
        self.run = settings["name"]
        self.runs.append(settings)

    def finish(self):
        self.run = None

    def log(self, values):
        assert self.run is not None
        self.logged.append(values)
