"""The model card: its code gives StepScorer's scores, its metadata describes the training, and it reveals no path."""

import io
import json
import random
import re
import shlex
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig

from tests.helpers import HEADS, dataset_of, make_trainer, random_tree, tiny_model, tiny_tokenizer
from tests.trainer.kl_training import make_kl_trainer, random_rows
from trl_hrm import StepFormat, StepScorer, StepTree
from trl_hrm.trainer.model_card import COUNTS
from trl_hrm.training.model_card import hub_id, shown_name


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
PROBLEM, STEPS = "1+2+3 = ?", ["1+2 = 3.", "3+3 = 6."]  # as in the card
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def trees():
    rng = random.Random(0)
    return [random_tree(rng, f"p{i}") for i in range(6)]


def read(path: Path) -> tuple[dict, str]:
    """Return the metadata and the text of a card."""
    _, metadata, text = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


class Server:
    """Answers token-classification requests like `vllm serve`, using transformers."""

    def __init__(self, model):
        self.model = model
        self.names = []

    def __call__(self, request: urllib.request.Request) -> io.BytesIO:
        body = json.loads(request.data)
        assert request.full_url.endswith("/pooling") and request.headers["Content-type"] == "application/json"
        assert body["task"] == "token_classify" and body["use_activation"] is False
        self.names.append(body["model"])
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor(body["input"])).logits[0]
        return io.BytesIO(json.dumps({"data": [{"data": logits.tolist()}]}).encode())


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("style", ["plain", "bos", "chat", "system"])
@pytest.mark.parametrize("head", HEADS)
def test_the_code_of_the_card_gives_the_scores_of_the_scorer(tmp_path, monkeypatch, trees, head, style, adapter):
    """If the card's code joined texts differently, everyone who copies it would get plausible but wrong scores."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer().__class__.from_pretrained(save_base(tmp_path / "base", style))
    format_args = {"head": HEADS[head].head, "regression_loss": HEADS[head].regression_loss}
    if style in ("chat", "system"):
        format_args["prompt_style"] = "chat"
    if style == "system":
        format_args["system_prompt"] = 'Judge "each" step.\n'
    make_trainer(
        "out",
        trees,
        str(tmp_path / "base"),
        tokenizer=tokenizer,
        peft_config=LoraConfig(**LORA) if adapter else None,
        step_separator="\n",
        merge_separator=" ",
        **format_args,
    ).save_model()
    expected = StepScorer.from_pretrained("out").score([PROBLEM], [[STEPS]])[0][0]
    with_trl_hrm, with_transformers, *others = blocks(read(tmp_path / "out" / "README.md")[1])
    found = {}
    exec(with_trl_hrm, found)
    np.testing.assert_allclose(found["scores"], expected, rtol=0, atol=1e-5)
    found = {}
    exec(with_transformers, found)
    np.testing.assert_allclose(found["scores"], expected, rtol=0, atol=1e-5)
    if HEADS[head].head == "lm":
        assert not others
        return
    if adapter:
        exec(others.pop(0), found)
        assert (tmp_path / "out-merged" / "model.safetensors").exists()
        found["model"] = type(found["model"].get_base_model()).from_pretrained("out-merged").eval()
    server = Server(found["model"])
    monkeypatch.setattr(urllib.request, "urlopen", server)
    del found["scores"]
    [with_vllm] = others
    exec(with_vllm, found)
    np.testing.assert_allclose(found["scores"], expected, rtol=0, atol=1e-5)
    assert server.names == ["out-merged" if adapter else "out"]


def test_the_code_of_the_card_sets_template_variables_and_date(tmp_path, monkeypatch, trees, on_day):
    """With a chat template that prints the date, the card's code must give the same scores on any day."""
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base", "chat")
    dated = "{{ strftime_now('%d %b %Y') }}{% if brief %}so{% endif %}" + CHAT
    (tmp_path / "base" / "chat_template.jinja").write_text(dated)
    make_trainer(
        "out",
        trees,
        str(tmp_path / "base"),
        tokenizer=tiny_tokenizer().__class__.from_pretrained(tmp_path / "base"),
        step_separator="\n",
        merge_separator=" ",
        prompt_style="chat",
        chat_template_kwargs={"brief": True},
        chat_template_date="2025-03-04",
    ).save_model()
    code = blocks(read(tmp_path / "out" / "README.md")[1])[1]
    expected = StepScorer.from_pretrained("out").score([PROBLEM], [[STEPS]])[0][0]
    for day in ("2024-07-26", "2026-01-01"):
        on_day(day)
        found = {}
        exec(code, found)
        assert found["tokenizer"].decode(found["ids"]).startswith("04 Mar 2025so<user>")
        np.testing.assert_allclose(found["scores"], expected, rtol=0, atol=1e-6)


def save_base(folder: Path, style: str) -> Path:
    tiny_model(HEADS["lm"]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if style == "bos":
        config["bos_token"] = config["eos_token"]
    if style in ("chat", "system"):
        (folder / "chat_template.jinja").write_text(CHAT)
    path.write_text(json.dumps(config))
    return folder


def test_metadata_and_metrics(tmp_path, trees):
    """The Hub finds models by their metadata and shows `model-index` as their results."""
    model = tiny_model()
    model.config._name_or_path = "Qwen/Qwen2.5-Math-1.5B"
    merged = StepTree(
        "1+2?", ["1+1=3.", "1+1=2.", "1+1=3.\n1+1=2."], [0.0, 1.0, 1.0], [-1, 0, -1], num_merged=[1, 1, 2]
    )
    trainer = make_trainer(tmp_path, [merged, *trees], model, evaluation=trees, weight_decay=0.01)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card(dataset_name="me/steps", tags="math", license="apache-2.0")
    facts, text = read(tmp_path / "README.md")
    assert facts["base_model"] == "Qwen/Qwen2.5-Math-1.5B" and facts["datasets"] == "me/steps"
    assert facts["pipeline_tag"] == "token-classification" and facts["library_name"] == "transformers"
    assert facts["license"] == "apache-2.0"
    assert facts["tags"] == sorted(
        {"generated_from_trainer", "hrm-reward", "math", "step-reward-model", "trl", "trl-hrm"}
    )
    [index] = facts["model-index"]
    [result] = index["results"]
    assert index["name"] == tmp_path.name and result["task"] == {"type": "token-classification"}
    assert result["dataset"] == {"name": "me/steps", "type": "me/steps"}
    shown = {f"eval_{metric['type']}": metric["value"] for metric in result["metrics"]}
    assert {"eval_accuracy", "eval_error_f1", "eval_auroc", "eval_loss"} <= shown.keys()
    assert shown == {name: value for name, value in metrics.items() if name in shown}
    assert "[Qwen/Qwen2.5-Math-1.5B](https://huggingface.co/Qwen/Qwen2.5-Math-1.5B)" in text
    assert "| `weight_decay` | 0.01 |" in text and "| `learning_rate` | 0.1 |" in text and "| `steps` | 1 |" in text
    report = trainer.reports["train_dataset"]
    assert report.labels_merged == 1 and "spans=(1, 2)" in text
    assert f"| labels | {report.labels_in} | {trainer.reports['eval_dataset'].labels_in} |" in text
    assert re.search(r"````json\n(.*?)````", text, flags=re.DOTALL)[1] == StepFormat().to_json() + "\n"
    assert text.count("@article{wang2025hierarchical") == 1
    first = (tmp_path / "README.md").read_bytes()
    trainer.create_model_card(dataset_name="me/steps", tags="math", license="apache-2.0")
    assert (tmp_path / "README.md").read_bytes() == first


def test_each_count_of_the_data_has_its_name(tmp_path, trees):
    """Names and counts in different orders once showed contradicting labels as dropped labels."""
    trainer = make_trainer(tmp_path, trees)
    for number, name in enumerate(COUNTS):
        setattr(trainer.reports["train_dataset"], name, 100 + number)
    trainer.create_model_card()
    text = read(tmp_path / "README.md")[1]
    for number, title in enumerate(COUNTS.values()):
        assert f"| {title} | {100 + number} |" in text


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_local_paths_are_not_revealed(tmp_path, trees, adapter):
    """A path reveals the user name, and a link to it or to "None" is dead. PEFT's own card names its base by path."""
    base = save_base(tmp_path / "base", "plain")
    trainer = make_trainer(
        tmp_path / "my-hrm",
        trees,
        str(base),
        peft_config=LoraConfig(**LORA) if adapter else None,
        save_strategy="epoch",
    )
    trainer.dataset_name = str(base)  # any folder
    trainer.train()
    trainer.save_model()
    cards = [tmp_path / "my-hrm" / "README.md", tmp_path / "my-hrm" / "checkpoint-1" / "README.md"]
    for path in cards:
        facts, text = read(path)
        content = path.read_text(encoding="utf-8")
        assert str(tmp_path) not in content and "None" not in content and "More Information Needed" not in content
        assert "base_model" not in facts and "datasets" not in facts
        assert "# Model Card for my-hrm" in text and 'from_pretrained("my-hrm"' in text
        assert ("| `adapter` | LORA, r = 4, alpha = 8 |" in text) == adapter
        assert facts["library_name"] == ("peft" if adapter else "transformers")
        assert "## Data\n\nbase.\n" in text


def test_only_metrics_of_these_weights(tmp_path, trees):
    """Weights of one step shown with the accuracy of another step would be a false claim."""
    trainer = make_trainer(
        tmp_path,
        trees,
        evaluation=trees,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    cards = {step: read(tmp_path / f"checkpoint-{step}" / "README.md") for step in (1, 2, 3)}
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert losses.keys() == {2, 3} and losses[2] != losses[3]
    assert "model-index" not in cards[1][0] and "## Evaluation" not in cards[1][1]
    for step, loss in losses.items():
        facts, text = cards[step]
        shown = {metric["type"]: metric["value"] for metric in facts["model-index"][0]["results"][0]["metrics"]}
        assert shown["loss"] == loss and f"Metrics of the weights at step {step}." in text


@pytest.mark.parametrize("save_steps", [1, 2])
def test_metrics_of_the_best_weights(tmp_path, save_steps):
    """With `load_best_model_at_end`, the final weights belong neither to the last evaluation nor to the best one if it
    was not saved."""
    rng = random.Random(0)
    trees = [random_tree(rng, f"p{i}") for i in range(8)]
    trainer = make_trainer(
        tmp_path,
        trees,
        evaluation=trees,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=save_steps,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best step is not the last one by chance
    )
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = trainer.state.best_global_step
    assert best == max(losses, key=losses.get)
    if save_steps == 2:
        assert best == 3  # step 3 was not saved, so the best saved weights are loaded
        best = 2
    trainer.create_model_card()
    facts, text = read(tmp_path / "README.md")
    shown = {metric["type"]: metric["value"] for metric in facts["model-index"][0]["results"][0]["metrics"]}
    assert shown["loss"] == losses[best] and f"Metrics of the weights at step {best}." in text
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best])


def test_several_evaluation_sets(tmp_path, trees):
    """`eval_a_b_accuracy` may belong to the set `a` or to the set `a_b`."""
    sets = {"a": dataset_of(trees[:3]), "a_b": dataset_of(trees[3:])}
    trainer = make_trainer(tmp_path, trees, evaluation=sets, eval_strategy="epoch")
    trainer.train()
    trainer.create_model_card()
    facts, text = read(tmp_path / "README.md")
    found = {
        result["dataset"]["name"]: {metric["type"]: metric["value"] for metric in result["metrics"]}
        for result in facts["model-index"][0]["results"]
    }
    assert found.keys() == {"the evaluation dataset, a", "the evaluation dataset, a_b"}
    logged = {name: value for log in trainer.state.log_history for name, value in log.items()}
    for name in sets:
        metrics = found[f"the evaluation dataset, {name}"]
        assert (
            metrics["accuracy"] == logged[f"eval_{name}_accuracy"] and metrics["loss"] == logged[f"eval_{name}_loss"]
        )
    assert logged["eval_a_accuracy"] != logged["eval_a_b_accuracy"]
    assert "| a_b | accuracy |" in text


@pytest.mark.parametrize("chat", [False, True])
def test_the_card_of_a_policy(tmp_path, monkeypatch, chat):
    """TRL's card of an unpushed policy loads the model "None", with messages that a plain tokenizer rejects."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer().__class__.from_pretrained(save_base(tmp_path / "base", "chat" if chat else "plain"))
    trainer = make_kl_trainer(
        "policy", random_rows(4), eval_rows=random_rows(2), kl_coef=0.25, trainer_args={"processing_class": tokenizer}
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    facts, text = read(tmp_path / "policy" / "README.md")
    assert facts["pipeline_tag"] == "text-generation" and "kl-self" in facts["tags"] and "base_model" not in facts
    shown = {metric["type"]: metric["value"] for metric in facts["model-index"][0]["results"][0]["metrics"]}
    logged = {name: value for log in trainer.state.log_history for name, value in log.items()}
    assert shown["kl"] == logged["eval_kl"] and shown["loss"] == logged["eval_loss"]
    assert "| `kl_coef` | 0.25 |" in text and "None" not in text.replace("| None |", "") and "2503.13551" in text
    [code] = blocks(text)
    found = {}
    exec(code.replace("max_new_tokens=512", "max_new_tokens=2"), found)
    assert isinstance(found["solution"], str)


def test_odd_names(tmp_path, trees, monkeypatch):
    """A name with characters special to tables, YAML or the shell breaks the card, and the Hub rejects it."""
    monkeypatch.chdir(tmp_path)
    name = "my: hrm's #1"
    trainer = make_trainer(name, trees, evaluation={"a|b": dataset_of(trees), "- x\n: y": dataset_of(trees)})
    trainer.dataset_name = "/data/Ünï: 'steps' #1 | x"
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card = ModelCard.load(Path(name) / "README.md")
    assert card.data.model_name == name
    assert {(result.dataset_name, result.dataset_config) for result in card.data.eval_results} == {
        ("Ünï: 'steps' #1 | x, a|b", "a|b"),
        ("Ünï: 'steps' #1 | x, - x\n: y", "- x\n: y"),
    }
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert "| `a\\|b` | loss |" in card.text and "| `- x : y` | loss |" in card.text
    for rows in re.findall(r"(?:^\|.*\n)+", card.text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}) == 1, rows
    command = re.search("(vllm serve .*) --runner", card.text)[1]
    assert shlex.split(command) == ["vllm", "serve", name]


def test_no_placeholders_in_the_metadata(tmp_path, trees):
    """TRL writes the placeholder `licence: license`, and every evaluation counts tokens."""
    trainer = make_trainer(tmp_path / "hrm", trees)
    trainer.save_model()
    assert not any("licen" in key for key in read(tmp_path / "hrm" / "README.md")[0])
    policy = make_kl_trainer(tmp_path / "policy", random_rows(4), eval_rows=random_rows(2))
    assert "eval_num_tokens" in policy.evaluate()
    policy.save_model()
    assert "num tokens" not in read(tmp_path / "policy" / "README.md")[1]


def test_names():
    assert hub_id("me/model") == "me/model" and hub_id("gpt2") == "gpt2"
    assert [hub_id(name) for name in (None, "", "/home/me/model", "a/b/c", str(Path(__file__).parent))] == [None] * 5
    assert shown_name("/home/me/model") == "model" and shown_name("outputs/model") == "outputs/model"
