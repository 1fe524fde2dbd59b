"""What KLSelfTrainer refuses, and what it must not refuse."""

import huggingface_hub
import pytest
import transformers
from datasets import IterableDataset
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
from trl_hrm import KLSelfConfig, KLSelfTrainer
from trl_hrm.tiny_model import make_tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": -0.1}, "`kl_coef` is -0.1"),
        ({"kl_coef": float("nan")}, "`kl_coef` is nan"),
        ({"kl_coef": float("inf")}, "`kl_coef` is inf"),
        ({"kl_direction": "backward"}, "`kl_direction` is 'backward'.* one of forward, reverse"),
        ({"kl_scaling": "log"}, "`kl_scaling` is 'log'.* one of log1p, none"),
        ({"kl_reduction": "mean"}, "`kl_reduction` is 'mean'.* one of sum, token_mean"),
        ({"ref_hidden_dir": "states"}, "Set `precompute_ref_hidden=True`"),
        ({"packing": True, "packing_strategy": "wrapped"}, "Use `packing_strategy='bfd'`"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "Use `packing_strategy='bfd'`"),
        ({"eval_packing": True, "packing_strategy": "wrapped"}, "Use `packing_strategy='bfd'`"),
        ({"eval_packing": True}, "`eval_packing` requires `packing` or `padding_free`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is not supported"),
    ],
)
def test_options_that_are_refused(tmp_path, options, message):
    """An option that is out of range or would be ignored says so before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        KLSelfConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_a_reference_that_is_not_used_is_a_likely_mistake(tmp_path, paths):
    """It says so, whichever way the reference was given."""
    with pytest.warns(UserWarning, match="`kl_coef` is 0"):
        make_kl_trainer(tmp_path, random_rows(4), ref_model=paths[1], kl_coef=0.0)
    with pytest.warns(UserWarning, match="`kl_coef` is 0"):
        KLSelfConfig(str(tmp_path), use_cpu=True, bf16=False, kl_coef=0.0, ref_model="other")


def test_references_that_are_refused(tmp_path, paths):
    """Each trains without an error towards something that means nothing, or is ignored."""
    rows = random_rows(4)
    with pytest.raises(ValueError, match="a vocabulary of 270 tokens.* Use a reference of the same"):
        make_kl_trainer(tmp_path, rows, ref_model=tiny_model(LM, vocab_size=270))
    with pytest.raises(ValueError, match="Pass it only once"):
        make_kl_trainer(tmp_path, rows, ref_model=paths[1], config_ref_model=paths[1])
    with pytest.raises(ValueError, match="the same object"):
        model = tiny_model(LM)
        make_kl_trainer(tmp_path, rows, model=model, ref_model=model)
    with pytest.raises(ValueError, match="already instantiated"):
        make_kl_trainer(tmp_path, rows, ref_model=tiny_model(LM), ref_model_init_kwargs={"dtype": "float32"})
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="the policy has an adapter.* Remove `ref_model`"):
        make_kl_trainer(tmp_path, rows, config_ref_model=paths[1], trainer_args={"peft_config": lora})
    with pytest.raises(ValueError, match="the policy has an adapter.* Remove `ref_model`"):
        make_kl_trainer(tmp_path, rows, model=get_peft_model(tiny_model(LM), lora), ref_model=tiny_model(LM))


def test_arguments_for_loading_a_reference_that_is_not_loaded(tmp_path):
    """A dtype that is ignored shows in memory only."""
    options = {"ref_model_init_kwargs": {"dtype": "bfloat16"}}
    with pytest.raises(ValueError, match="the reference is a copy of the model"):
        make_kl_trainer(tmp_path, random_rows(4), **options)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="no reference is loaded"):
        make_kl_trainer(tmp_path, random_rows(4), trainer_args={"peft_config": lora}, **options)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the Hub in which `me/other` is the second of two models, of the same size with other tokens."""
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
    """Its weights came from there: so must its tokenizer be looked at there."""
    options = {"ref_model_init_kwargs": {"cache_dir": str(hub)}}
    with pytest.raises(ValueError, match="me/other: the tokenizers of the reference and the policy differ"):
        make_kl_trainer(tmp_path, random_rows(4), ref_model="me/other", **options)


def test_folders_without_a_tokenizer(tmp_path, paths):
    """Checkpoints of other tools have none; the trainer is given one, and the reference needs none."""
    bare = [tmp_path / "bare-policy", tmp_path / "bare-other"]
    for folder, model in zip(bare, (tiny_model(LM), moved(tiny_model(LM))), strict=True):
        model.save_pretrained(folder)
    trainer = make_kl_trainer(tmp_path, random_rows(4), model=str(bare[0]), ref_model=str(bare[1]))
    trainer.train()
    assert logs_of(trainer)[0]["kl"] > 0.1


def test_a_copy_of_a_policy_with_added_tokens(tmp_path, paths):
    """The tokenizer in the folder of the policy is the one before they were added: no reference could satisfy a comparison."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|step|>"]})
    model = AutoModelForCausalLM.from_pretrained(paths[0])
    model.resize_token_embeddings(len(tokenizer))
    trainer = make_kl_trainer(tmp_path, random_rows(4), model, trainer_args={"processing_class": tokenizer})
    trainer.train()
    assert logs_of(trainer)[0]["kl"] == 0


def test_a_reference_with_another_tokenizer_is_refused(tmp_path, paths):
    """As many tokens, other words: the KL of distributions over different things."""
    other = make_tokenizer(["zebra quokka llama 0123456789 plus minus\n\n"] * 3, vocab_size=300)
    assert other.get_vocab() != tiny_tokenizer().get_vocab()
    other.save_pretrained(paths[1])
    with pytest.raises(
        ValueError, match=r"tokenizers .* differ: token .* the id \w+ in the reference and \w+ in the policy"
    ):
        make_kl_trainer(tmp_path, random_rows(4), ref_model=paths[1])
    make_kl_trainer(tmp_path, random_rows(4), ref_model=paths[1], kl_coef=0.0)


def test_what_a_kl_term_cannot_do_is_refused(tmp_path, monkeypatch):
    """TRL would go on without the term, or without its gradient."""
    rows = random_rows(4)
    with pytest.raises(ValueError, match="`compute_loss_func` is not supported"):
        make_kl_trainer(tmp_path, rows, trainer_args={"compute_loss_func": lambda *args, **kwargs: 0})
    with pytest.raises(TypeError, match="It must be a `KLSelfConfig`"):
        KLSelfTrainer(tiny_model(LM), SFTConfig(str(tmp_path), use_cpu=True, bf16=False))
    for bias in ("all", "lora_only"):
        lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", bias=bias)
        with pytest.raises(ValueError, match="biases of the base model.* Use `bias='none'`"):
            make_kl_trainer(tmp_path, rows, trainer_args={"peft_config": lora})
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="`torch_compile` is not supported for a policy with an adapter"):
        make_kl_trainer(tmp_path, rows, torch_compile=True, trainer_args={"peft_config": lora})
    model = tiny_model(LM)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="The policy is split over devices"):
        make_kl_trainer(tmp_path, rows, model)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="The policy is split over devices"):
        patch.setattr(KLSelfTrainer, "get_tp_size", lambda trainer: 2)
        make_kl_trainer(tmp_path, rows)
    with pytest.raises(TypeError, match="`datasets.Dataset`, but the dataset is a `IterableDataset`"):
        stream = IterableDataset.from_generator(lambda: iter(rows))
        make_kl_trainer(tmp_path, stream, precompute_ref_hidden=True, max_steps=1)
