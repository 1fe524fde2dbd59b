"""Select solutions, and train TRL's SFTTrainer on the prompts that the policy had."""

import copy
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from tokenizers.processors import TemplateProcessing
from trl import SFTConfig, SFTTrainer

from trl_hrm.data.export import export
from trl_hrm.data.export_config import ExportConfig
from trl_hrm.data.self_training import answered, asked, choose, distinct
from trl_hrm.search.prompts import Prompt
from trl_hrm.search.run_folder import check_manifest, finish_shard
from trl_hrm.tiny_model import make_tokenizer

from ..helpers import HEADS, tiny_model
from ..search.scripted import PROMPT, SEARCHES, make_problems, run_scripted


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TestChoose:
    def test_by_hand(self):
        scores = [0.5, 0.9, 0.7, 0.9, 0.2]
        assert choose(scores) == ([1, 3, 2, 0, 4], 0, 0)
        assert choose(scores, min_score=0.5) == ([1, 3, 2, 0], 1, 0)  # 0.5 reaches 0.5
        assert choose(scores, min_score=0.6, top_k=2) == ([1, 3], 2, 1)
        assert choose(scores, top_k=1, evidence=[9, 2, 9, 4, 9]) == ([3], 0, 4)
        assert choose(scores, top_k=1, evidence=[9, 4, 9, 4, 9]) == ([1], 0, 4)
        assert choose(scores, min_score=1.0) == ([], 5, 0)
        assert choose([]) == ([], 0, 0)

    def test_minimum_score_tolerates_rounding(self):
        """The mean of 2/5, 5/5 and 5/5 is 0.8. Whether it passes must not depend on the order of a sum."""
        score = (2 / 5 + 5 / 5 + 5 / 5) / 3
        assert score == 0.7999999999999999
        assert choose([score, 0.7999], min_score=0.8) == ([0], 1, 0)

    def test_against_pairwise_comparison(self):
        """Kept solutions are beaten by fewer than k others. A sort with reversed ties would pass the test by hand."""
        rng = random.Random(0)
        num_ties = 0
        for _ in range(500):
            scores = [rng.randrange(4) / 4 for _ in range(rng.randrange(9))]
            evidence = [rng.randrange(3) for _ in scores] if rng.random() < 0.5 else None
            least, top_k = rng.choice([0.0, 0.5]), rng.choice([None, 1, 2, 3])

            def beats(i: int, j: int, scores=scores, evidence=evidence) -> bool:
                if scores[i] != scores[j]:
                    return scores[i] > scores[j]
                if evidence and evidence[i] != evidence[j]:
                    return evidence[i] > evidence[j]
                return i < j

            reach = [i for i, score in enumerate(scores) if score >= least]
            place = {i: sum(beats(j, i) for j in reach) for i in reach}
            expected = [i for i in reach if top_k is None or place[i] < top_k]
            found = choose(scores, least, top_k, evidence)
            assert found.kept == sorted(expected, key=place.get)
            assert found.num_below == len(scores) - len(reach)
            assert len(found.kept) + found.num_below + found.num_beyond == len(scores)
            num_ties += len(set(scores)) < len(scores)
        assert num_ties > 200

    def test_distinct(self):
        assert distinct(["a", "b", " a\n", "b ", "A", "a b"]) == [0, 1, 4, 5]
        assert distinct([]) == []


def test_asked_and_answered():
    plain = Prompt("p", "Solve {question}\n", "blank_line", style="plain")
    assert asked(plain, "1+1?") == "Solve 1+1?\n"
    assert answered(asked(plain, "1+1?"), "2") == "2"
    chat = replace(plain, style="chat", system_prompt="Be brief.")
    assert asked(chat, "1+1?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Solve 1+1?\n"},
    ]
    assert answered(asked(chat, "1+1?"), "2") == [{"role": "assistant", "content": "2"}]
    assert asked(replace(chat, system_prompt=None), "{question}") == [
        {"role": "user", "content": "Solve {question}\n"}
    ]


@pytest.fixture(scope="module")
def tokenizer():
    """Return a tokenizer with a chat template."""
    tokenizer = make_tokenizer(["What is the sum? Step 1: The value is 7.\n\n# Answer"] * 3, vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def exported(folder: Path, prompt: Prompt) -> Dataset:
    """Return the solutions of a run of a scripted policy with this prompt, as a dataset."""
    run_scripted(folder / "run", SEARCHES["full_tree"], make_problems(4))
    check_manifest(folder / "run", {"prompt": asdict(prompt)})
    finish_shard(folder / "run", 0, 1)
    run, output = str(folder / "run"), str(folder / "sft")
    export(ExportConfig(inputs=run, output_dir=output, view="sft", max_solutions=2, test_size=0, num_proc=1))
    return load_dataset(str(folder / "sft"), split="train", cache_dir=str(folder / "cache"))


def sft_trainer(folder: Path, dataset, tokenizer) -> SFTTrainer:
    config = SFTConfig(
        str(folder / "trained"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=None,
    )
    model = tiny_model(HEADS["lm"], max_position_embeddings=2048)
    model.resize_token_embeddings(len(tokenizer))
    return SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT,
        replace(PROMPT, style="chat"),
        replace(PROMPT, style="chat", system_prompt="Be brief.", template="{question}"),
    ],
    ids=["plain", "chat", "system"],
)
def test_training_prompt_equals_the_policys_prompt(tmp_path, tokenizer, prompt):
    """
    The ids before the first trained token must equal the policy's prompt. With the bare problem, a doubled BOS token or
    a nested template, the loss would fall too, but the policy would learn to answer a prompt that it never gets.
    """
    dataset = exported(tmp_path, prompt)
    trainer = sft_trainer(tmp_path, dataset, tokenizer)
    assert len(trainer.train_dataset) == len(dataset) > 5
    for row, prepared in zip(dataset, trainer.train_dataset, strict=True):
        given = prompt.encode(tokenizer, row["problem"])
        assert prepared["input_ids"][: len(given)] == given
        assert [label == -100 for label in prepared["labels"]] == [
            i < len(given) for i in range(len(prepared["labels"]))
        ]
        text = row["completion"] if prompt.style == "plain" else row["completion"][0]["content"]
        end = tokenizer.eos_token if prompt.style == "plain" else "<|im_end|>\n"
        assert tokenizer.decode(prepared["input_ids"][len(given) :]) == text + end
    trainer.train()
    assert trainer.state.global_step == 1


def test_training_prompt_has_the_template_variables(tmp_path, tokenizer):
    """A policy that was told not to think must not be trained on a prompt that allows thinking."""
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = CHATML.replace("assistant\n", "assistant\n{% if not think %}No.{% endif %}")
    prompt = replace(PROMPT, style="chat", chat_template_kwargs={"think": True})
    dataset = exported(tmp_path, prompt)
    assert set(map(str, dataset["chat_template_kwargs"])) == {"{'think': True}"}
    trainer = sft_trainer(tmp_path, dataset, thinking)
    for row, prepared in zip(dataset, trainer.train_dataset, strict=True):
        given = prompt.encode(thinking, row["problem"])
        assert prepared["input_ids"][: len(given)] == given
        assert given != replace(prompt, chat_template_kwargs=None).encode(thinking, row["problem"])


def test_runs_with_different_variables_have_no_common_prompt(tmp_path):
    for name, change in (("a", {}), ("b", {"chat_template_kwargs": {"think": True}})):
        run_scripted(tmp_path / name, SEARCHES["full_tree"], make_problems(4))
        check_manifest(tmp_path / name, {"prompt": asdict(replace(PROMPT, style="chat", **change))})
        finish_shard(tmp_path / name, 0, 1)
    runs, output = [str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "sft")
    report = export(ExportConfig(inputs=runs, output_dir=output, view="sft", test_size=0, num_proc=1))
    assert any("used different prompts" in warning for warning in report["warnings"])


def test_training_prompt_has_one_bos(tmp_path):
    """With a tokenizer that adds BOS to every text, the plain prompt must have it once, as in sampling."""
    tokenizer = make_tokenizer(["The value is 7."], vocab_size=300)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    dataset = exported(tmp_path, PROMPT)
    given = PROMPT.encode(tokenizer, dataset[0]["problem"])
    assert given.count(tokenizer.bos_token_id) == 1
    prepared = sft_trainer(tmp_path, dataset, tokenizer).train_dataset[0]
    assert prepared["input_ids"][: len(given)] == given
    assert prepared["labels"].count(-100) == len(given)
