"""The code of docs/scoring_without_trl_hrm.md, run as printed, gives StepScorer's scores."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from trl_hrm import StepFormat, StepScorer
from trl_hrm.scoring.tree_scorer import read_text_contract

from .helpers import HEADS, tiny_model, tiny_tokenizer
from .scoring.pooling_server import PoolingServer
from .scoring.published import PUBLISHED
from .scoring.solutions import PROBLEM as MIXED_PROBLEM
from .scoring.solutions import SOLUTIONS, save_published
from .search.serving import ENVIRONMENT, serve


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "scoring_without_trl_hrm.md").read_text(encoding="utf-8")
PROBLEM = "1+2+3 = ?"
STEPS = ["add 1+2 = 3.", "so 3+3 = 7", "thus x"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
FORMATS = HEADS | {
    "chat": StepFormat(prompt_style="chat", system_prompt="Judge.", step_separator="; ", merge_separator=" then "),
    "user": StepFormat(prompt_style="chat", step_separator="\n", merge_separator=" "),
}
FORMATS |= {
    "all texts": StepFormat(prompt_template="Q: {problem}\n", step_prefix="{number}. ", step_suffix=" ", step_separator=";"),
    "before": StepFormat(score_position="before_separator", step_suffix="\n"),
    "string": StepFormat(tokenization="string", prompt_template="{problem} ", step_separator=" ;\n", step_prefix="Step {number}: "),
    "turns": StepFormat(tokenization="string", prompt_style="turns", step_separator="+", score_position="before_separator"),
}  # fmt: skip
CLASSIFIERS = [name for name in FORMATS if name != "lm"]


def code_under(heading: str) -> str:
    """Return the Python code of a section."""
    [section] = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    return "".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))


def with_names(code: str, **names: str) -> str:
    """Return the code with other values for the variables that users change."""
    for name, value in names.items():
        code, count = re.subn(rf'\b{name} = "[^"]*"', f"{name} = {json.dumps(value)}", code)
        assert count == 1, f"the code sets {name} {count} times"
    return code


def run(code: str) -> dict:
    names: dict = {}
    exec(compile(code, "docs", "exec"), names)
    return names


ENCODE = code_under("Encode")


def save(folder: Path, name: str, **config) -> str:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny_model(FORMATS[name], **config).save_pretrained(folder)
    FORMATS[name].save(folder)
    return str(folder)


def expected(folder: str | Path, **settings) -> list[float]:
    scores = StepScorer.from_pretrained(str(folder)).score([PROBLEM], [[STEPS]], **settings)[0][0]
    assert len(set(scores)) > 1
    return scores


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_transformers(name, tmp_path, capsys):
    folder = save(tmp_path, name)
    code = ENCODE + code_under("With transformers alone") + code_under("Merged steps")
    names = run(with_names(code, checkpoint=folder))
    assert names["score"](PROBLEM, STEPS) == pytest.approx(expected(folder), abs=1e-5)
    assert names["score_merged"](PROBLEM, STEPS) == pytest.approx(expected(folder, spans=(1, 2)), abs=1e-5)
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 2  # deepspeed may print before it


@pytest.mark.parametrize("name", ["classification", "chat", "user"])
def test_pipeline(name, tmp_path, capsys):
    folder = save(tmp_path, name)
    names = run(with_names(ENCODE + code_under("With transformers' `pipeline`"), checkpoint=folder))
    assert names["score"](PROBLEM, STEPS) == pytest.approx(expected(folder), abs=1e-5)
    assert len(capsys.readouterr().out.splitlines()[-1].split(",")) == 2
    names["tokenizer"].model_max_length = 30  # the pipeline truncates silently
    with pytest.raises(ValueError, match="call the model with the ids"):
        names["score"](PROBLEM, STEPS)


READ_REVISIONS = f"""
from trl_hrm import StepScorer
from trl_hrm.scoring.tree_scorer import read_text_contract
for revision in ("main", "v2"):
    scorer = StepScorer.from_pretrained(checkpoint, revision=revision)
    tokenizer, step_format = read_text_contract(checkpoint, None, revision, False)
    assert step_format == scorer.step_format and tokenizer.chat_template == scorer.tokenizer.chat_template
    print("FOUND", json.dumps([tokenizer.chat_template, scorer.score([{PROBLEM!r}], [[{STEPS!r}]])[0][0]]))
try:
    read_text_contract(checkpoint, None, "lora", False)
except ValueError as error:
    print("FOUND", json.dumps(str(error)))
"""


def test_pushed(tmp_path):
    """
    The page as printed, with the pushed files in the Hub client's cache under the name that it uses.

    Another revision has other weights, format and template. Mixing the two would still give scores.
    """
    repo = tmp_path / "models--me--my-hrm"
    (repo / "refs").mkdir(parents=True)
    folders = {}
    for revision, name, seed in (("main", "chat", 0), ("v2", "user", 1), ("lora", "chat", 0)):
        (repo / "refs" / revision).write_text(commit := revision[0] * 40)
        folders[revision] = save(repo / "snapshots" / commit, name, seed=seed)
    Path(folders["v2"], "chat_template.jinja").write_text("{{ messages[0]['content'] }}?")
    Path(folders["lora"], "adapter_config.json").write_text("{}")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    code = ENCODE + code_under("With transformers alone") + READ_REVISIONS
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    of_page = json.loads(done.stdout.splitlines()[0])
    main, v2, of_adapter = map(json.loads, re.findall("^FOUND (.*)$", done.stdout, flags=re.MULTILINE))
    scorer = StepScorer.from_pretrained(folders["main"])
    assert of_page == pytest.approx(scorer.score(["1+2+3 = ?"], [[["1+2 = 3.", "3+3 = 7."]]])[0][0], abs=1e-5)
    assert main == [TEMPLATE, pytest.approx(expected(folders["main"]), abs=1e-6)]
    assert v2 == ["{{ messages[0]['content'] }}?", pytest.approx(expected(folders["v2"]), abs=1e-6)]
    assert "is a LoRA adapter" in of_adapter


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_server(name, tmp_path):
    """The server answers like vLLM. The slow test uses vLLM."""
    folder = save(tmp_path, name)
    with PoolingServer(tiny_model(FORMATS[name]), tiny_tokenizer()) as server:
        code = ENCODE + code_under("With `vllm serve` alone")
        names = run(with_names(code, checkpoint=folder, server=server.url))
        assert names["score"](PROBLEM, STEPS) == pytest.approx(expected(folder), abs=1e-5)


def test_server_of_a_language_model(tmp_path):
    folder = save(tmp_path, "lm")
    with PoolingServer(tiny_model(FORMATS["lm"]), tiny_tokenizer()) as server:
        code = ENCODE + code_under("Language models with `vllm serve`")
        names = run(with_names(code, checkpoint=folder, server=server.url))
        assert names["score"](PROBLEM, STEPS) == pytest.approx(expected(folder), abs=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_encodings_of_published_models(name, tmp_path):
    """The ids of the code on the page, for texts of every kind."""
    _, folder, step_format = save_published(tmp_path, name)
    step_format = step_format or StepFormat.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    step_format.save(folder)
    encode = run(with_names(ENCODE, checkpoint=folder))["encode"]
    if step_format.chat_template_date and "strftime_now" in (tokenizer.chat_template or ""):
        if step_format.prompt_style != "plain":
            with pytest.raises(ValueError, match="only trl_hrm replaces"):
                encode(MIXED_PROBLEM, SOLUTIONS[0])
            tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(folder)
            encode = run(with_names(ENCODE, checkpoint=folder))["encode"]
    for steps in SOLUTIONS:
        prompt_ids, step_ids = step_format.encode(tokenizer, MIXED_PROBLEM, steps)
        ids, places = encode(MIXED_PROBLEM, steps)
        assert ids == prompt_ids + sum(step_ids, [])
        assert places == [len(prompt_ids) + sum(map(len, step_ids[: i + 1])) - 1 for i in range(len(steps))]


@pytest.mark.parametrize("name", ["Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B", "ScalableMath/llemma-7b-prm-prm800k-level-1to3-hf"])  # fmt: skip
def test_other_heads_become_a_classifier(name, tmp_path):
    """Exactly: the scores of the authors' loops."""
    published, folder, step_format = save_published(tmp_path, name)
    classifier = str(tmp_path / "classifier")
    run(with_names(code_under("Convert another head to a token classifier"), checkpoint=folder, classifier=classifier))
    assert step_format is None and StepFormat.from_pretrained(classifier).head == "regression"
    [found] = StepScorer.from_pretrained(classifier).score([MIXED_PROBLEM], [SOLUTIONS])
    for scores, plain in zip(found, published.scores(folder, MIXED_PROBLEM, SOLUTIONS), strict=True):
        assert scores == pytest.approx(plain, abs=1e-6)
    assert len({score for scores in found for score in scores}) > 5
    read_text_contract(classifier, None, None, False)  # vLLM has a class for it


def test_a_published_adapter(tmp_path):
    """Math-psa is an adapter without a `step_format.json`. Merged, vLLM runs it."""
    published, folder, _ = save_published(tmp_path, "openreasoner/Math-psa")
    merged = str(tmp_path / "merged")
    code = code_under("LoRA adapters").replace("AutoPeftModelForTokenClassification", "AutoPeftModelForCausalLM")
    run(with_names(code.replace(", num_labels=2", ""), adapter=folder, merged=merged))
    _, step_format = read_text_contract(merged, None, None, False)
    assert step_format == StepFormat.published("math-psa")
    [found] = StepScorer.from_pretrained(merged).score([MIXED_PROBLEM], [SOLUTIONS])
    for scores, plain in zip(found, published.scores(folder, MIXED_PROBLEM, SOLUTIONS), strict=True):
        assert scores == pytest.approx(plain, abs=1e-5)  # merging adds the weights


@pytest.mark.parametrize("tied", [False, True])
def test_label_tokens_become_a_classifier(tied, tmp_path):
    """Rows in the wrong order would give one minus the score, which looks like a score."""
    folder = save(tmp_path / "lm", "lm", tie_word_embeddings=tied)
    code = code_under("Convert another head to a token classifier")
    run(with_names(code, checkpoint=folder, classifier=str(tmp_path / "classifier")))
    assert StepFormat.from_pretrained(tmp_path / "classifier").head == "classification"
    assert expected(tmp_path / "classifier") == pytest.approx(expected(folder), abs=1e-5)


def test_merged_adapter_of_a_language_model(tmp_path):
    """Merged as described on the page, then converted to a classifier."""
    base, adapter, merged = save(tmp_path / "base", "lm"), tmp_path / "adapter", str(tmp_path / "merged")
    model = tiny_model(FORMATS["lm"])
    model.name_or_path = base
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    FORMATS["lm"].save(adapter)
    [loading] = re.findall(r'^For `head: "lm"` load it with `(.*)`\.', PAGE, flags=re.MULTILINE)
    code = code_under("LoRA adapters").replace("AutoPeftModelForTokenClassification", "AutoPeftModelForCausalLM")
    code = re.sub(r"AutoPeftModelForCausalLM\.from_pretrained\(.*?\)", loading, code)
    run(with_names(code, adapter=str(adapter), merged=merged))
    code = code_under("Convert another head to a token classifier")
    run(with_names(code, checkpoint=merged, classifier=str(tmp_path / "classifier")))
    assert expected(tmp_path / "classifier") == pytest.approx(expected(adapter), abs=1e-5)
    assert expected(adapter) != pytest.approx(expected(base), abs=1e-3)


def test_merged_adapter(tmp_path):
    """The trained head comes with the adapter, not with its base model."""
    base, adapter = save(tmp_path / "base", "lm"), tmp_path / "adapter"
    model = tiny_model(seed=1)
    model.model.load_state_dict(tiny_model(FORMATS["lm"]).model.state_dict())
    model.name_or_path = base
    config = LoraConfig(task_type="TOKEN_CLS", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    StepFormat().save(adapter)
    run(with_names(code_under("LoRA adapters"), adapter=str(adapter), merged=str(tmp_path / "merged")))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert expected(tmp_path / "merged") == pytest.approx(expected(adapter), abs=1e-5)


@pytest.fixture
def vllm_environment(monkeypatch):
    pytest.importorskip("vllm", reason="needs vLLM; `make test-slow` installs it")
    for name, value in (ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chat", "regression"])
def test_vllm_serve(name, vllm_environment, tmp_path):
    """The command and the code on the page."""
    folder = save(tmp_path / "prm", name)
    [command] = re.findall(r"^vllm (serve me/my-hrm.*)$", PAGE, flags=re.MULTILINE)
    flags = [folder if word == "me/my-hrm" else word for word in shlex.split(command)]
    with serve(tmp_path, "vllm.entrypoints.cli.main", *flags, "--enforce-eager", "--block-size", "32") as url:
        code = ENCODE + code_under("With `vllm serve` alone")
        names = run(with_names(code, checkpoint=folder, server=url.removesuffix("/v1")))
        assert names["score"](PROBLEM, STEPS) == pytest.approx(expected(folder), abs=1e-4)


@pytest.mark.slow
def test_vllm_in_the_same_process(vllm_environment, tmp_path):
    folder = save(tmp_path, "classification")
    code = with_names(ENCODE + code_under("With vLLM in the same process"), checkpoint=folder)
    code = code.replace(
        'dtype="float32")', 'dtype="float32", enforce_eager=True)'
    )  # compiling would take half a minute
    code += f"\nprint('SCORES', json.dumps(score({PROBLEM!r}, {[STEPS, STEPS[:1]]!r})))\n"
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = re.findall(r"^SCORES (.*)$", done.stdout, flags=re.MULTILINE)
    scores = expected(folder)
    first, second = json.loads(found)
    assert first == pytest.approx(scores, abs=1e-4) and second == pytest.approx(scores[:1], abs=1e-4)
