"""Which checkpoints load as reward models, and the errors for the others: a missing weight would silently be random."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers.integrations.deepspeed as transformers_deepspeed
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from trl_hrm import StepFormat, StepScorer
from trl_hrm.loading import (
    check_checkpoint,
    check_policy,
    list_misfits,
    load_base_model,
    load_reward_model,
    read_step_format,
)

from .checkpoints import drop, edit, save, two_layer_head, value_head
from .helpers import ALL_HEADS, HEADS, tiny_model, tiny_tokenizer


CLASSIFICATION, REGRESSION, LM = HEADS["classification"], HEADS["regression"], HEADS["lm"]
MLP, VALUE, LM_MEAN = ALL_HEADS["mlp"], ALL_HEADS["value"], ALL_HEADS["lm_mean"]
NOT_OURS = "Its head is not supported"
NO_HEAD = "It has no trained head"
DAMAGED = "Files are missing or damaged"


def last_layer(weights: dict) -> list[str]:
    return [name for name in weights if ".layers.1." in name]


def keep(weights: dict) -> None:
    """Change nothing."""


MISFITS = {
    "two-layer head": (tiny_model, two_layer_head, CLASSIFICATION, r"missing `score.bias`, `score.weight`; unexpected "
                       r"`score.0.bias`, `score.0.weight`, `score.2.bias`, `score.2.weight`", "to 'mlp'"),
    "value head": (lambda: tiny_model(LM), value_head, CLASSIFICATION, "missing .*unexpected `lm_head.weight`, `v_head", "to 'value'"),
    "value head, read as label tokens": (lambda: tiny_model(LM), value_head, LM, "unexpected `v_head.summary.bias`", "to 'value'"),
    "a linear head as two layers": (
        tiny_model, keep, MLP, "missing `score.0.bias`, .*unexpected `score.bias`, `score.weight`", 'to "classification" if'
    ),
    "a layer of a two-layer head": (
        lambda: tiny_model(MLP), drop("score.2.weight", "score.2.bias"), MLP, "missing `score.2.bias`, `score.2.weight`", NOT_OURS
    ),
    "a two-layer head with one output": (
        lambda: tiny_model(MLP),
        lambda weights: weights.update({"score.2.weight": torch.randn(1, 64), "score.2.bias": torch.randn(1)}),
        MLP,
        r"`score.2.bias` \(1,\), expected \(2,\)",
        '"classification" has 2',
    ),
    "a two-layer head as a value head": (lambda: tiny_model(MLP), keep, VALUE, "missing `v_head.*unexpected `score.0", "to 'mlp'"),
    "a causal language model as a value head": (lambda: tiny_model(LM), keep, VALUE, "missing `v_head.summary.bias`", NO_HEAD),
    "a value head without its weight": (
        lambda: tiny_model(VALUE), drop("v_head.summary.weight"), VALUE, "missing `v_head.summary.weight`", NOT_OURS
    ),
    "a value head as mean logits": (lambda: tiny_model(VALUE), keep, LM_MEAN, "unexpected `v_head.summary", "to 'value'"),
    "a second head": (tiny_model, value_head, CLASSIFICATION, "unexpected `v_head.summary.bias`", NOT_OURS),
    "no bias": (tiny_model, drop("score.bias"), CLASSIFICATION, "missing `score.bias`", NOT_OURS),
    "no weight": (tiny_model, drop("score.weight"), CLASSIFICATION, "missing `score.weight`", NOT_OURS),
    "no head": (tiny_model, drop("score.weight", "score.bias"), CLASSIFICATION, "missing `score.bias`, `score.weight`", NO_HEAD),
    "another name of the head": (
        tiny_model,
        lambda weights: weights.update({f"classifier.{k}": weights.pop(f"score.{k}") for k in ("weight", "bias")}),
        CLASSIFICATION,
        "missing `score.bias`, `score.weight`; unexpected `classifier.bias`",
        NOT_OURS,
    ),
    "a base model": (lambda: AutoModel.from_config(tiny_model().config), keep, CLASSIFICATION, "missing `score", NO_HEAD),
    "a causal language model": (lambda: tiny_model(LM), keep, CLASSIFICATION, "unexpected `lm_head.weight`", 'to "lm"'),
    "a causal language model with tied embeddings": (
        lambda: tiny_model(LM, tie_word_embeddings=True), keep, CLASSIFICATION, "missing `score.bias`", NO_HEAD
    ),
    "a sequence classifier": (
        lambda: AutoModelForSequenceClassification.from_config(tiny_model().config),
        keep,
        CLASSIFICATION,
        "missing `score.bias`",
        NOT_OURS,
    ),
    "a sequence classifier with one output": (
        lambda: AutoModelForSequenceClassification.from_config(tiny_model(REGRESSION).config),
        keep,
        CLASSIFICATION,
        r"`score.weight` \(1, 64\), expected \(2, 64\)",
        '"regression" has 1',
    ),
    "two labels as regression": (tiny_model, keep, REGRESSION, r"`score.bias` \(2,\), expected \(1,\)", '"regression" has 1'),
    "one label as classification": (
        lambda: tiny_model(REGRESSION), keep, CLASSIFICATION, r"`score.bias` \(1,\), expected \(2,\)", '"regression" has 1'
    ),
    "a classifier as label tokens": (tiny_model, keep, LM, "unexpected `score.bias`, `score.weight`", "If it is a token classifier"),
    "label tokens without output embeddings": (
        lambda: tiny_model(LM), drop("lm_head.weight"), LM, "missing `lm_head.weight`", DAMAGED
    ),
    "a layer less": (
        tiny_model,
        lambda weights: [weights.pop(name) for name in last_layer(weights)],
        CLASSIFICATION,
        "missing `model.layers.1.input_layernorm.weight`, .* and 8 more",
        DAMAGED,
    ),
    "a layer more": (
        tiny_model,
        lambda weights: weights.update({n.replace(".1.", ".2.", 1): weights[n].clone() for n in last_layer(weights)}),
        CLASSIFICATION,
        "unexpected `model.layers.2.input_layernorm.weight`, .* and 8 more",
        DAMAGED,
    ),
    "another vocabulary": (
        tiny_model,
        lambda weights: weights.update({"model.embed_tokens.weight": torch.randn(10, 64)}),
        CLASSIFICATION,
        r"`model.embed_tokens.weight` \(10, 64\), expected",
        DAMAGED,
    ),
}  # fmt: skip


class TestRewardModels:
    @pytest.mark.parametrize("head", ALL_HEADS)
    @pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen2-moe-sliding"])
    def test_what_fits(self, tmp_path, head, architecture):
        """In mixtures of experts, parameter names in the files differ from those in the model. They must still load."""
        model = tiny_model(ALL_HEADS[head], architecture)
        folder = str(save(tmp_path, model, ALL_HEADS[head]))
        assert check_checkpoint(folder, ALL_HEADS[head])
        found = load_reward_model(folder, ALL_HEADS[head]).state_dict()
        assert all(torch.equal(weight, found[name]) for name, weight in model.state_dict().items())

    @pytest.mark.parametrize(("head", "name"), [(two_layer_head, "qwen2.5-math-prm"), (value_head, "skywork-o1-prm")])
    def test_published_heads(self, tmp_path, head, name):
        """Without a `step_format.json` and a known name, the head is recognised by the names of its weights."""
        folder = save(tmp_path, tiny_model() if head is two_layer_head else tiny_model(LM))
        (folder / "step_format.json").unlink()
        with pytest.raises(FileNotFoundError, match="has no step_format.json"):
            read_step_format(str(folder))
        edit(folder, head)
        step_format = read_step_format(str(folder))
        assert step_format == StepFormat.published(name) and check_checkpoint(str(folder), step_format)
        weights = load_file(folder / "model.safetensors")
        found = load_reward_model(str(folder), step_format).state_dict()
        assert all(torch.equal(weight, found[name]) for name, weight in weights.items())

    def test_a_value_head_does_not_need_output_embeddings(self, tmp_path):
        folder = save(tmp_path, tiny_model(VALUE), VALUE)
        edit(folder, drop("lm_head.weight"))
        assert check_checkpoint(str(folder), VALUE)
        StepScorer.from_pretrained(str(folder))

    def test_tied_output_embeddings_are_not_missing(self, tmp_path):
        folder = save(tmp_path, tiny_model(LM, tie_word_embeddings=True), LM)
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        assert check_checkpoint(str(folder), LM)
        StepScorer.from_pretrained(str(folder))

    def test_label_names_are_kept(self, tmp_path):
        model = tiny_model(id2label={0: "bad", 1: "good"})
        assert load_reward_model(str(save(tmp_path, model)), CLASSIFICATION).config.id2label == {0: "bad", 1: "good"}

    @pytest.mark.parametrize("case", MISFITS)
    def test_what_does_not_fit(self, tmp_path, caplog, case):
        """The loaded model and the headers of its files give the same error, without a hint to train the head."""
        make, change, step_format, names, remedy = MISFITS[case]
        folder = save(tmp_path, make(), step_format)
        edit(folder, change)
        caplog.clear()
        errors = []
        for load in (load_reward_model, check_checkpoint, lambda path, _: StepScorer.from_pretrained(path)):
            with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}: .*{names}") as error:
                load(str(folder), step_format)
            errors.append(str(error.value))
        assert remedy in errors[0] and len(set(errors)) == 1
        assert "LOAD REPORT" not in caplog.text

    def test_ignoring_mismatched_sizes_does_not_help(self, tmp_path):
        folder = str(save(tmp_path, tiny_model(REGRESSION)))
        with pytest.raises(ValueError, match=r"`score.bias` \(1,\), expected \(2,\)"):
            StepScorer.from_pretrained(folder, ignore_mismatched_sizes=True)

    def test_several_files(self, tmp_path):
        tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
        tiny_tokenizer().save_pretrained(tmp_path)
        StepFormat().save(tmp_path)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert check_checkpoint(str(tmp_path), CLASSIFICATION)
        [file] = [file for file in tmp_path.glob("model-*.safetensors") if "score.weight" in load_file(file)]
        edit(tmp_path, drop("score.weight"), file.name)
        for load in (load_reward_model, check_checkpoint):
            with pytest.raises(ValueError, match="missing `score.weight`"):
                load(str(tmp_path), CLASSIFICATION)

    def test_pytorch_files(self, tmp_path):
        """Reading their names would mean loading them, so the check only warns. StepScorer loads and checks them."""
        folder = save(tmp_path, tiny_model())
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        assert not check_checkpoint(str(folder), CLASSIFICATION)
        StepScorer.from_pretrained(str(folder))
        two_layer_head(weights)
        torch.save(weights, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="unexpected `score.0.bias`"):
            StepScorer.from_pretrained(str(folder))

    def test_a_torn_file(self, tmp_path):
        folder = save(tmp_path, tiny_model())
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="damaged .* Download or save it again"):
            load_reward_model(str(folder), CLASSIFICATION)
        (folder / "model.safetensors").write_bytes(content[:20])
        with pytest.raises(ValueError, match="damaged .* Download or save it again"):
            check_checkpoint(str(folder), CLASSIFICATION)

    def test_quantized_bodies_are_not_compared(self, tmp_path):
        """Names and shapes in the body depend on the quantization library. Only the head is compared."""
        folder = save(tmp_path, tiny_model())
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "awq", "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
        edit(folder, lambda weights: weights.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(3)}))
        edit(folder, drop("model.layers.0.mlp.up_proj.weight"))
        assert check_checkpoint(str(folder), CLASSIFICATION)
        edit(folder, two_layer_head)
        with pytest.raises(ValueError, match="missing `score.bias`, `score.weight`; unexpected `score.0.bias`"):
            check_checkpoint(str(folder), CLASSIFICATION)

    def test_a_few_names_and_a_count(self):
        assert list_misfits(["b", "a"]) == "missing `a`, `b`"
        found = list_misfits([], [f"w{i}" for i in range(6)], {"s": ((1,), (2,))})
        assert found == "unexpected `w0`, `w1`, `w2`, `w3` and 2 more; with a different shape `s` (1,), expected (2,)"


class TestBaseModels:
    """Models that training may start from."""

    @pytest.mark.parametrize(
        ("make", "step_format", "is_new"),
        [
            (lambda: tiny_model(LM), CLASSIFICATION, True),
            (lambda: tiny_model(LM), REGRESSION, True),
            (lambda: tiny_model(LM, tie_word_embeddings=True), CLASSIFICATION, True),
            (lambda: AutoModel.from_config(tiny_model().config), CLASSIFICATION, True),
            (tiny_model, CLASSIFICATION, False),
            (lambda: tiny_model(LM), LM, False),
            *((lambda: tiny_model(LM), step_format, True) for step_format in (MLP, VALUE)),
            *((lambda: tiny_model(LM, tie_word_embeddings=True), step_format, True) for step_format in (MLP, VALUE)),
            *((lambda: AutoModel.from_config(tiny_model().config), step_format, True) for step_format in (MLP, VALUE)),
            (lambda: tiny_model(MLP), MLP, False),
            (lambda: tiny_model(VALUE), VALUE, False),
            (lambda: tiny_model(LM), LM_MEAN, False),
        ],
    )
    def test_a_new_head_or_a_whole_one(self, tmp_path, caplog, make, step_format, is_new):
        make().save_pretrained(tmp_path)
        caplog.clear()
        _, has_new_head = load_base_model(str(tmp_path), step_format)
        assert has_new_head == is_new
        assert ("newly initialized" in caplog.text) == is_new  # here transformers' message is correct

    @pytest.mark.parametrize(
        ("case", "can_begin_anew"),
        [
            ("two-layer head", True),
            ("value head", True),
            ("a second head", True),
            ("no bias", True),
            ("no weight", True),
            ("another name of the head", True),
            ("a sequence classifier", True),
            ("two labels as regression", True),
            ("one label as classification", True),
            ("value head, read as label tokens", True),
            ("a linear head as two layers", True),
            ("a layer of a two-layer head", True),
            ("a two-layer head as a value head", True),
            ("a value head without its weight", True),
            ("a value head as mean logits", True),
            ("a classifier as label tokens", False),  # the head of a language model is not newly initialized
            ("label tokens without output embeddings", False),
            ("a layer less", False),
            ("another vocabulary", False),
        ],
    )
    def test_part_of_a_head_another_head_or_part_of_a_body(self, tmp_path, case, can_begin_anew):
        make, change, step_format, names, _ = MISFITS[case]
        make().save_pretrained(tmp_path)
        edit(tmp_path, change)
        with pytest.raises(ValueError, match=names) as error:
            load_base_model(str(tmp_path), step_format)
        assert ("To train a new head on its body" in str(error.value)) == can_begin_anew


class TestAdapters:
    @pytest.fixture
    def base(self, tmp_path):
        folder = tmp_path / "base"
        tiny_model(LM).save_pretrained(folder)
        return folder

    def adapter(
        self, folder: Path, base: Path, step_format: StepFormat = CLASSIFICATION, task="TOKEN_CLS", **options
    ) -> Path:
        if step_format is LM:
            model = AutoModelForCausalLM.from_pretrained(base)
        else:
            num_labels = 1 if step_format is REGRESSION else 2
            model = AutoModelForTokenClassification.from_pretrained(base, num_labels=num_labels)
        config = LoraConfig(task_type=task, target_modules=["q_proj"], init_lora_weights=False, **options)
        return save(folder, get_peft_model(model, config), step_format)

    @pytest.mark.parametrize(
        ("step_format", "options"),
        [
            (CLASSIFICATION, {}),
            (REGRESSION, {}),
            (LM, {"task": "CAUSAL_LM"}),
            (LM, {"task": "CAUSAL_LM", "modules_to_save": ["lm_head"]}),
            (CLASSIFICATION, {"task": None, "modules_to_save": ["score"]}),
            (CLASSIFICATION, {"modules_to_save": ["score", "embed_tokens"]}),
        ],
    )
    def test_with_its_head(self, tmp_path, base, caplog, step_format, options):
        """It loads with these weights, and without misleading messages about a newly initialized head."""
        folder = self.adapter(tmp_path / "adapter", base, step_format, **options)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            scorer = StepScorer.from_pretrained(str(folder))
        assert "newly initialized" not in caplog.text and "LOAD REPORT" not in caplog.text
        assert check_checkpoint(str(folder), step_format)
        weights = load_file(folder / "adapter_model.safetensors")
        if step_format is not LM:
            head = scorer.model.get_submodule("base_model.model.score.modules_to_save.default")
            assert torch.equal(head.weight, weights["base_model.model.score.weight"])
            assert torch.equal(head.bias, weights["base_model.model.score.bias"])

    def test_without_its_head(self, tmp_path, base):
        folder = self.adapter(tmp_path / "adapter", base, task="FEATURE_EXTRACTION")
        for load in (load_reward_model, check_checkpoint, lambda path, _: StepScorer.from_pretrained(path)):
            with pytest.raises(ValueError, match=r"missing `base_model.model.score.bias`.*TOKEN_CLS"):
                load(str(folder), CLASSIFICATION)

    def test_on_a_base_with_a_trained_head(self, tmp_path):
        folder = self.adapter(tmp_path / "adapter", save(tmp_path / "base", tiny_model()), task="FEATURE_EXTRACTION")
        found = load_reward_model(str(folder), CLASSIFICATION).get_submodule("base_model.model.score").weight
        assert torch.equal(found, tiny_model().score.weight)

    @pytest.mark.parametrize("has_head", [False, True])
    def test_a_file_without_the_head(self, tmp_path, base, has_head):
        """PEFT would raise a KeyError."""
        if has_head:
            base = save(tmp_path / "trained", tiny_model())
        folder = self.adapter(tmp_path / "adapter", base)
        edit(folder, drop("base_model.model.score.weight", "base_model.model.score.bias"), "adapter_model.safetensors")
        with pytest.raises(ValueError, match="missing .*`base_model.model.score.weight`"):
            load_reward_model(str(folder), CLASSIFICATION)

    def test_a_file_with_a_part_of_the_layers(self, tmp_path, base):
        folder = self.adapter(tmp_path / "adapter", base)
        edit(folder, lambda w: [w.pop(name) for name in last_layer(w)], "adapter_model.safetensors")
        with (
            pytest.warns(UserWarning, match="missing adapter keys"),
            pytest.raises(ValueError, match=r"missing `base.*lora_A"),
        ):
            load_reward_model(str(folder), CLASSIFICATION)

    def test_a_file_with_other_layers(self, tmp_path, base):
        folder = self.adapter(tmp_path / "adapter", base)
        more = lambda w: w.update({n.replace(".1.", ".5."): w[n].clone() for n in last_layer(w)})  # noqa: E731
        edit(folder, more, "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"unexpected `base_model.model.model.layers.5.*lora_A"):
            load_reward_model(str(folder), CLASSIFICATION)

    @pytest.mark.parametrize(
        ("saved", "read", "message"),
        [
            (CLASSIFICATION, REGRESSION, "size mismatch for .*Set `head`"),
            (REGRESSION, CLASSIFICATION, "size mismatch for .*Set `head`"),
            (LM, CLASSIFICATION, "missing `base_model.model.score.bias`"),
            (CLASSIFICATION, LM, "unexpected `base_model.model.score.bias`"),
        ],
    )
    def test_another_head(self, tmp_path, base, saved, read, message):
        folder = self.adapter(tmp_path / "adapter", base, saved, task="CAUSAL_LM" if saved is LM else "TOKEN_CLS")
        with pytest.raises(ValueError, match=message) as error:
            load_reward_model(str(folder), read)
        assert "\n" not in str(error.value)

    def test_a_base_with_a_part_of_the_layers(self, tmp_path, base):
        folder = self.adapter(tmp_path / "adapter", base)
        edit(base, lambda w: [w.pop(name) for name in last_layer(w)])
        for load in (load_reward_model, check_checkpoint):
            with pytest.raises(ValueError, match=r"base: .*missing `model.layers.1"):
                load(str(folder), CLASSIFICATION)

    def test_a_report_on_the_body_of_the_base_is_shown(self, tmp_path, base, caplog):
        folder = self.adapter(tmp_path / "adapter", base)
        edit(base, lambda w: w.update({n.replace(".1.", ".2.", 1): w[n].clone() for n in last_layer(w)}))
        caplog.clear()
        load_reward_model(str(folder), CLASSIFICATION)
        assert "LOAD REPORT" in caplog.text

    def test_other_loads_still_report(self, tmp_path, base, caplog):
        load_reward_model(str(self.adapter(tmp_path / "adapter", base)), CLASSIFICATION)
        caplog.clear()
        AutoModelForTokenClassification.from_pretrained(base)
        assert "newly initialized" in caplog.text


class TestHub:
    """A checkpoint in the Hub cache, or only on the Hub."""

    @pytest.fixture
    def snapshot(self, tmp_path, monkeypatch):
        """Cache the checkpoint `me/prm`."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
        folder = tmp_path / "models--me--prm" / "snapshots" / ("0" * 40)
        save(folder, tiny_model())
        refs = tmp_path / "models--me--prm" / "refs"
        refs.mkdir()
        (refs / "main").write_text("0" * 40)
        return folder

    def test_in_the_cache(self, snapshot):
        assert check_checkpoint("me/prm", CLASSIFICATION)
        edit(snapshot, two_layer_head)
        with pytest.raises(ValueError, match="me/prm: .*unexpected `score.0.bias`"):
            check_checkpoint("me/prm", CLASSIFICATION)

    def test_published_heads(self, snapshot):
        (snapshot / "step_format.json").unlink()
        edit(snapshot, two_layer_head)
        assert read_step_format("me/prm") == StepFormat.published("qwen2.5-math-prm")

    def test_only_on_the_hub(self, snapshot, tmp_path, monkeypatch):
        """Only headers are read from the Hub. No weights are downloaded."""
        from huggingface_hub import get_local_safetensors_metadata

        edit(snapshot, two_layer_head)
        metadata = get_local_safetensors_metadata(snapshot)
        (snapshot / "model.safetensors").unlink()
        assert not check_checkpoint("me/prm", CLASSIFICATION)  # offline
        asked = []
        monkeypatch.setattr(
            "trl_hrm.loading.get_safetensors_metadata",
            lambda repo, revision: asked.append((repo, revision)) or metadata,
        )
        with pytest.raises(ValueError, match="me/prm: .*unexpected `score.0.bias`"):
            check_checkpoint("me/prm", CLASSIFICATION)
        assert asked == [("me/prm", None)]


def test_checks_under_zero_3(tmp_path, monkeypatch):
    """transformers sharded the model that is only created to compare its weights with the files, and DeepSpeed failed."""
    tiny_model(HEADS["lm"]).save_pretrained(tmp_path / "policy")
    save(tmp_path / "reward", tiny_model())
    config = type("Config", (), {"is_zero3": lambda self: True, "config": {}})()
    monkeypatch.setattr(transformers_deepspeed, "_hf_deepspeed_config_weak_ref", None)
    transformers_deepspeed.set_hf_deepspeed_config(config)
    assert check_policy(str(tmp_path / "policy")) and check_checkpoint(str(tmp_path / "reward"), StepFormat())
    assert transformers_deepspeed.is_deepspeed_zero3_enabled()


def test_a_copy_has_the_same_scores(tmp_path):
    """The check must not change the loaded weights."""
    folder = save(tmp_path / "a", tiny_model())
    shutil.copytree(folder, tmp_path / "b")
    scores = [
        StepScorer.from_pretrained(str(tmp_path / name)).score(["1+2?"], [[["= 3", "so x"]]]) for name in ("a", "b")
    ]
    assert (
        scores[0]
        == scores[1]
        == StepScorer(tiny_model(), tiny_tokenizer(), StepFormat()).score(["1+2?"], [[["= 3", "so x"]]])
    )
