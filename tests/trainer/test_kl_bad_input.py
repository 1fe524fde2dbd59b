"""Errors and warnings of KLSelfTrainer, and unusual input that it must accept."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from tests.helpers import tiny_model, tiny_tokenizer
from tests.trainer.kl_training import (
    LM,
    logs_of,
    make_kl_trainer,
    moved,
    random_rows,
)
from trl_hrm import (
    HRMRewardConfig,
    HRMRewardTrainer,
    ImplicitPRMConfig,
    ImplicitPRMTrainer,
    KLSelfConfig,
    KLSelfTrainer,
    StepFormat,
    StepGRPOConfig,
    StepGRPOTrainer,
    StepReward,
    StepScorer,
)
from trl_hrm.prm import PRMConfig, PRMTrainer
from trl_hrm.tiny_model import make_tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": -0.1}, "`kl_coef` is -0.1"),
        ({"kl_coef": float("nan")}, "`kl_coef` is nan"),
        ({"kl_coef": float("inf")}, "`kl_coef` is inf"),
        ({"kl_direction": "backward"}, "`kl_direction` is 'backward'"),
        ({"kl_scaling": "log"}, "`kl_scaling` is 'log'"),
        ({"kl_reduction": "mean"}, "`kl_reduction` is 'mean'"),
        ({"ref_hidden_dir": "states"}, "Set `precompute_ref_hidden=True`"),
        ({"packing": True, "packing_strategy": "wrapped"}, "Use `packing_strategy='bfd'`"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "Use `packing_strategy='bfd'`"),
        ({"eval_packing": True, "packing_strategy": "wrapped"}, "Use `packing_strategy='bfd'`"),
        ({"eval_packing": True}, "`eval_packing`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
    ],
)
def test_options_that_are_refused(tmp_path, options, message):
    """An option that is out of range or would be ignored raises before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        KLSelfConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_an_unused_reference_warns(tmp_path, paths):
    """However the reference is given, the user must learn that `kl_coef=0` ignores it."""
    with pytest.warns(UserWarning, match="`kl_coef` is 0"):
        make_kl_trainer(tmp_path, random_rows(4), ref_model=paths[1], kl_coef=0.0)
    with pytest.warns(UserWarning, match="`kl_coef` is 0"):
        KLSelfConfig(str(tmp_path), use_cpu=True, bf16=False, kl_coef=0.0, ref_model="other")


def test_references_that_are_refused(tmp_path, paths):
    """Each of these would train without an error, towards a meaningless reference or ignoring it."""
    rows = random_rows(4)
    with pytest.raises(ValueError, match="a vocabulary of 270 tokens"):
        make_kl_trainer(tmp_path, rows, ref_model=tiny_model(LM, vocab_size=270))
    with pytest.raises(ValueError, match="Pass it only once"):
        make_kl_trainer(tmp_path, rows, ref_model=paths[1], config_ref_model=paths[1])
    with pytest.raises(ValueError, match="the same object"):
        model = tiny_model(LM)
        make_kl_trainer(tmp_path, rows, model=model, ref_model=model)
    with pytest.raises(ValueError, match="already instantiated"):
        make_kl_trainer(tmp_path, rows, ref_model=tiny_model(LM), ref_model_init_kwargs={"dtype": "float32"})
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="Remove `ref_model`"):
        make_kl_trainer(tmp_path, rows, config_ref_model=paths[1], trainer_args={"peft_config": lora})
    with pytest.raises(ValueError, match="Remove `ref_model`"):
        make_kl_trainer(tmp_path, rows, model=get_peft_model(tiny_model(LM), lora), ref_model=tiny_model(LM))


def test_the_name_of_an_adapter(tmp_path):
    """transformers would load it with all weights frozen, and the training would change nothing."""
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(tiny_model(LM), lora).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="lora is an adapter.*is_trainable=True"):
        make_kl_trainer(tmp_path / "out", random_rows(4), model=str(tmp_path / "lora"))


def test_the_reference_is_not_replaced(tmp_path, paths):
    """A training could not be resumed or repeated, because its reference had become the trained model."""
    for where in ("ref_model", "config_ref_model"):
        with pytest.raises(FileExistsError, match="folder of the reference model.*another `output_dir`"):
            make_kl_trainer(paths[1], random_rows(4), **{where: paths[1]})


@pytest.mark.parametrize(
    ("trainer", "config"),
    [
        (KLSelfTrainer, KLSelfConfig),
        (StepGRPOTrainer, StepGRPOConfig),
        (HRMRewardTrainer, HRMRewardConfig),
        (ImplicitPRMTrainer, ImplicitPRMConfig),
        (PRMTrainer, PRMConfig),
        (StepReward, None),
    ],
)
def test_a_model_at_a_path(tmp_path, trainer, config):
    """A `Path` was taken for a model. The error was that it has no `config`."""
    missing = tmp_path / "missing"
    given = {}
    if config is not None:
        given["args"] = config(str(tmp_path / "out"), use_cpu=True, bf16=False)
        given["train_dataset"] = Dataset.from_list(random_rows(4))
    if trainer is StepGRPOTrainer:
        given["step_reward"] = StepReward(StepScorer(tiny_model(), tiny_tokenizer(), StepFormat()))
    with pytest.raises((OSError, ValueError), match=re.escape(str(missing)[:60])):
        trainer(missing, **given)


def test_a_policy_and_a_reference_at_paths(tmp_path, paths):
    """The reference was taken for a model that is already loaded."""
    trainer = make_kl_trainer(tmp_path, random_rows(4), model=Path(paths[0]), ref_model=Path(paths[1]))
    assert trainer.reference.model.config._name_or_path == paths[1]


def test_arguments_for_loading_a_reference_that_is_not_loaded(tmp_path):
    """An ignored dtype would show only in memory use."""
    options = {"ref_model_init_kwargs": {"dtype": "bfloat16"}}
    with pytest.raises(ValueError, match="the reference is a copy of the model"):
        make_kl_trainer(tmp_path, random_rows(4), **options)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="no reference is loaded"):
        make_kl_trainer(tmp_path, random_rows(4), trainer_args={"peft_config": lora}, **options)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub cache in which `me/other` has the same size as the first model, but a different tokenizer."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--me--other" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    refs = cache / "models--me--other" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    moved(tiny_model(LM)).save_pretrained(snapshot)
    make_tokenizer(["zebra quokka llama 0123456789 plus minus\n\n"] * 3, vocab_size=300).save_pretrained(snapshot)
    for module in (transformers.utils.hub.constants, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    return cache


def test_a_reference_on_the_hub_with_another_tokenizer_is_refused(tmp_path, hub):
    """The weights come from the Hub, so the tokenizer must be looked up there too."""
    options = {"ref_model_init_kwargs": {"cache_dir": str(hub)}}
    with pytest.raises(ValueError, match="me/other: .*tokenizers"):
        make_kl_trainer(tmp_path, random_rows(4), ref_model="me/other", **options)


def test_folders_without_a_tokenizer(tmp_path, paths):
    """Checkpoints of other tools may lack a tokenizer. The trainer is given one, and the reference needs none."""
    bare = [tmp_path / "bare-policy", tmp_path / "bare-other"]
    for folder, model in zip(bare, (tiny_model(LM), moved(tiny_model(LM))), strict=True):
        model.save_pretrained(folder)
    trainer = make_kl_trainer(tmp_path, random_rows(4), model=str(bare[0]), ref_model=str(bare[1]))
    trainer.train()
    assert logs_of(trainer)[0]["kl"] > 0.1


def test_a_copy_of_a_policy_with_added_tokens(tmp_path, paths):
    """The tokenizer saved with the policy lacks the added tokens, so comparing it would reject every reference."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|step|>"]})
    model = AutoModelForCausalLM.from_pretrained(paths[0])
    model.resize_token_embeddings(len(tokenizer))
    trainer = make_kl_trainer(tmp_path, random_rows(4), model, trainer_args={"processing_class": tokenizer})
    trainer.train()
    assert logs_of(trainer)[0]["kl"] == 0


def test_a_reference_with_another_tokenizer_is_refused(tmp_path, paths):
    """With equally many but different tokens, the KL would compare distributions over different things."""
    other = make_tokenizer(["zebra quokka llama 0123456789 plus minus\n\n"] * 3, vocab_size=300)
    assert other.get_vocab() != tiny_tokenizer().get_vocab()
    other.save_pretrained(paths[1])
    with pytest.raises(
        ValueError, match=r"tokenizers .* differ: token .* the id \w+ in the reference and \w+ in the policy"
    ):
        make_kl_trainer(tmp_path, random_rows(4), ref_model=paths[1])
    make_kl_trainer(tmp_path, random_rows(4), ref_model=paths[1], kl_coef=0.0)


def test_what_a_kl_term_cannot_do_is_refused(tmp_path, monkeypatch):
    """TRL would train without the KL term, or without its gradient."""
    rows = random_rows(4)
    with pytest.raises(ValueError, match="`compute_loss_func`"):
        make_kl_trainer(tmp_path, rows, trainer_args={"compute_loss_func": lambda *args, **kwargs: 0})
    with pytest.raises(TypeError, match="`KLSelfConfig`"):
        KLSelfTrainer(tiny_model(LM), SFTConfig(str(tmp_path), use_cpu=True, bf16=False))
    for bias in ("all", "lora_only"):
        lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", bias=bias)
        with pytest.raises(ValueError, match="`bias='none'`"):
            make_kl_trainer(tmp_path, rows, trainer_args={"peft_config": lora})
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="`torch_compile`"):
        make_kl_trainer(tmp_path, rows, torch_compile=True, trainer_args={"peft_config": lora})
    model = tiny_model(LM)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="split over devices"):
        make_kl_trainer(tmp_path, rows, model)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="split over devices"):
        patch.setattr(KLSelfTrainer, "get_tp_size", lambda trainer: 2)
        make_kl_trainer(tmp_path, rows)
    with pytest.raises(TypeError, match="`IterableDataset`"):
        stream = IterableDataset.from_generator(lambda: iter(rows))
        make_kl_trainer(tmp_path, stream, precompute_ref_hidden=True, max_steps=1)
