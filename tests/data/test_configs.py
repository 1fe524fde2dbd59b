"""Builder configs, which define the options of the command line."""

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints

import pytest

from trl_hrm.data.build_config import (
    BuildConfig,
    BuildMathShepherdConfig,
    BuildPRM800KConfig,
    BuildStepwiseConfig,
    unescape,
)
from trl_hrm.data.candidates_config import CandidatesConfig, RaftConfig
from trl_hrm.data.export_config import ExportConfig
from trl_hrm.search.steps import RULES
from trl_hrm.search.values import ESTIMATORS, LABELS, TRUNCATED


CONFIGS = [
    BuildConfig,
    BuildPRM800KConfig,
    BuildMathShepherdConfig,
    BuildStepwiseConfig,
    ExportConfig,
    CandidatesConfig,
    RaftConfig,
]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_is_described(config):
    """`--help` needs the metadata, and the class docstring needs an entry with the same default."""
    declared = inspect.get_annotations(config)
    for field in fields(config):
        if not field.init:
            continue
        assert field.metadata["help"].endswith((".", ").")), field.name
        if field.name in declared:
            _, _, rest = inspect.getdoc(config).partition(f"\n    {field.name} (`")
            entry = rest.split("\n    ", 1)[0]
            assert entry, field.name
            if field.default not in (None, MISSING):
                default = repr(field.default).replace("'", '"')
                assert f"defaults to `{default}`" in entry, field.name
            assert ("*optional*" not in entry) == (field.default is MISSING and field.default_factory is MISSING)


def test_choices_match_the_searches():
    hints = get_type_hints(ExportConfig)
    assert [get_args(hints[name]) for name in ("labels", "estimator", "truncated")] == [LABELS, ESTIMATORS, TRUNCATED]
    segmentation, _ = get_args(get_type_hints(CandidatesConfig)["segmentation"])
    assert get_args(segmentation) == (*RULES, "thinking", "regex")


@pytest.mark.parametrize("columns", [{"prompt": "a", "labels": "b.0"}, ["prompt=a", "labels=b.0"]])
def test_columns(columns):
    """Accept a dictionary in Python and words on the command line."""
    config = BuildStepwiseConfig(inputs="rows.jsonl", output_dir="out", columns=columns)
    assert config.columns == {"prompt": "a", "labels": "b.0"} and config.inputs == ["rows.jsonl"]
    assert RaftConfig(candidates="in.jsonl", output_dir="out", columns=columns).columns == config.columns
    assert CandidatesConfig(candidates="in.jsonl", columns="prompt=a").columns == {"prompt": "a"}
    assert CandidatesConfig(candidates="in.jsonl").columns == {}
    with pytest.raises(ValueError, match="'prompt'.*NAME=COLUMN"):
        CandidatesConfig(candidates="in.jsonl", columns=["prompt"])


def test_escapes_in_separators():
    assert unescape(r"\n\n- \t") == "\n\n- \t"


def test_help_needs_no_heavy_imports():
    code = (
        "import sys\n"
        "import trl_hrm.data.build_config, trl_hrm.data.export_config, trl_hrm.data.candidates_config\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'pyarrow'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
