"""The tables of docs/model_zoo.md: the models and formats of the package, and what checks them."""

import json
import re

import pytest

from trl_hrm import StepFormat
from trl_hrm.published_formats import PUBLISHED_FORMATS
from trl_hrm.scoring.judge_templates import TEMPLATES

from .helpers import ROOT
from .scoring.published import PUBLISHED, REAL_TOKENIZERS


PAGE = (ROOT / "docs" / "model_zoo.md").read_text(encoding="utf-8")
TINY = {published.repository for published in PUBLISHED.values()}
TOKENIZERS = {"Qwen3": "qwen3", "Llama 3": "llama3", "Mistral 7B": "mistral_v1", "DeepSeek-V3": "deepseek_v3"}


def rows(heading: str) -> list[list[str]]:
    """Return the cells of a section's first table."""
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    [table] = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)[:1]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:]]


MODELS = rows("Models")


class TestModels:
    def test_every_model_of_the_package(self):
        listed = [(re.match(r"\[([^]]+)\]", cells[0])[1], cells[1].strip("`")) for cells in MODELS]
        assert listed == [(model, name) for name, (models, _) in PUBLISHED_FORMATS.items() for model in models]

    @pytest.mark.parametrize("cells", MODELS, ids=[cells[0] for cells in MODELS])
    def test_what_was_checked(self, cells):
        """Every format has a tiny copy, and the tests use every tokenizer that the table names."""
        repository, url = re.match(r"\[([^]]+)\]\(([^)]+)\)", cells[0]).groups()
        format_name, checked = cells[1].strip("`"), cells[3]
        assert url == f"https://huggingface.co/{repository}"
        copies = {published.repository for published in PUBLISHED.values() if published.format_name == format_name}
        assert copies & set(PUBLISHED_FORMATS[format_name][0])
        if not checked.startswith("as "):
            assert checked.startswith("tiny model") and (
                repository in TINY or format_name == "rlhflow-prm"  # two models of one class
            )
        for name in re.findall(r"tokenizer of (Qwen3|Llama 3|Mistral 7B|DeepSeek-V3)", checked):
            assert (format_name, TOKENIZERS[name]) in [case[:2] for case in REAL_TOKENIZERS]

    def test_sources_of_numbers(self):
        """A published number has a link to its paper."""
        numbers = [cells[2] for cells in MODELS if cells[2]]
        assert len(numbers) == 5
        for cell in numbers:
            assert re.fullmatch(r"\d\d\.\d \(\[(\d{4}\.\d{5})\]\(https://huggingface\.co/papers/\1\)\)", cell)


def test_every_format_with_its_fields():
    listed = {}
    for name, head, tokenization, prompt_style, others in rows("Formats"):
        fields = json.loads(others.strip("`")) if others else {}
        columns = {"head": head, "tokenization": tokenization, "prompt_style": prompt_style}
        fields |= {key: value.strip("`") for key, value in columns.items()}
        listed[name.strip("`")] = StepFormat(**fields)
    assert listed == {name: StepFormat.published(name) for name in PUBLISHED_FORMATS}


def test_files_of_the_page():
    [block] = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    assert StepFormat.from_json(block) == StepFormat.published("trl-prm")
    assert StepFormat.from_json('{"version": 3}') == StepFormat.published("pure-prm")
    assert '`{"version": 3}`' in PAGE


def test_generative_models():
    assert {cells[1].strip("`") for cells in rows("Generative models")} == TEMPLATES.keys() - {
        "instruct",
        "first_error",
        "first_error_reference",
    }


def test_files_named_on_the_page_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)`", PAGE)
    assert named and all((ROOT / name).is_file() for name in named)
