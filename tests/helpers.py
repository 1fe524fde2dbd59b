"""What many tests share: a tokenizer, tiny models with every head, random trees, the slow plain reference, and the code of docs and recipes."""

import copy
import random
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib import util
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2MoeConfig,
    set_seed,
)

from trl_hrm import HRMRewardConfig, HRMRewardTrainer, StepFormat, StepTree
from trl_hrm.heads import model_class
from trl_hrm.tiny_model import make_tokenizer
from trl_hrm.tree_attention import TREE_SDPA, use_tree_attention


ROOT = Path(__file__).resolve().parents[1]
WORDS = ["add", "sub", "sum", "so", "then", "thus", "x", "y", "= 3", "= 7"]
HEADS = {
    "classification": StepFormat(),
    "regression": StepFormat(head="regression"),
    "regression-bce": StepFormat(head="regression", regression_loss="bce"),
    "lm": StepFormat(head="lm"),
}
# The heads that published models also have
ALL_HEADS = HEADS | {
    "mlp": StepFormat(head="mlp"),
    "value": StepFormat(head="value"),
    "value-bce": StepFormat(head="value", regression_loss="bce"),
    "lm_mean": StepFormat(head="lm_mean", regression_loss="bce"),
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large, so that differences in the visible tokens show in the logits
    "tie_word_embeddings": False,
}
ARCHITECTURES = {
    "qwen2": lambda **sizes: Qwen2Config(**sizes),
    "qwen2-sliding": lambda **sizes: Qwen2Config(
        use_sliding_window=True, sliding_window=6, layer_types=["full_attention", "sliding_attention"], **sizes
    ),
    "mistral": lambda **sizes: MistralConfig(sliding_window=6, **sizes),
    "llama": lambda **sizes: LlamaConfig(**sizes),
    # its attention layers ignore the window: only the mask applies it
    "qwen2-moe-sliding": lambda **sizes: Qwen2MoeConfig(
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        **sizes,
    ),
}


def save_checkpoint(folder: Path, **config) -> str:
    """Save a tiny classifier with random weights, its tokenizer and step format. `config` changes its configuration."""
    tiny_model(**config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    StepFormat().save(folder)
    return str(folder)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Return a new byte-level BPE tokenizer of about 300 tokens. Callers may add tokens to it."""
    return copy.deepcopy(_trained_tokenizer())


@cache
def _trained_tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer([" ".join(WORDS) + "\n\n1+2=3.\n"] * 3, vocab_size=300)


def tiny_model(
    step_format: StepFormat = HEADS["classification"],
    architecture: str = "qwen2",
    attention: str = "sdpa",
    seed: int = 0,
    **config,
) -> PreTrainedModel:
    """Return a model of two layers with random weights and the outputs of the head, in fp32 and evaluation mode."""
    tokenizer = tiny_tokenizer()
    sizes = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": 0} | config
    model_config = ARCHITECTURES[architecture](
        num_labels=step_format.num_labels, bos_token_id=None, dtype="float32", **sizes
    )
    set_seed(seed)
    cls = model_class(step_format, model_config)
    make = getattr(cls, "from_config", None) or cls._from_config
    tree = attention == TREE_SDPA  # trainer and scorer replace "sdpa" by it on a CPU
    model = make(model_config, attn_implementation="sdpa" if tree else attention).eval()
    if tree:
        use_tree_attention(model, torch.device("cpu"))
    return model


def random_tree(rng: random.Random, name: str = "p", max_steps: int = 8) -> StepTree:
    """Return a tree whose siblings begin with the same words but differ. Every step is labelled 0 or 1."""
    size = rng.randint(1, max_steps)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 3)) + [str(i)]) for i in range(size)]
    parents = [rng.randint(-1, i - 1) for i in range(size)]
    return StepTree(f"{name} 1+2?", texts, [float(rng.random() < 0.5) for _ in range(size)], parents)


def dataset_of(trees: Iterable[StepTree]) -> Dataset:
    return Dataset.from_list([tree.to_row() for tree in trees])


def path_logits(
    model: PreTrainedModel, step_format: StepFormat, tree: StepTree, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[int, torch.Tensor]:
    """
    The slow reference: the prompt and path of each labelled step go through the model alone as a plain sequence, without a
    mask. Return the logits of the last token.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    found = {}
    for step, label in enumerate(tree.labels):
        if label is not None:
            prompt_ids, step_ids = step_format.encode(
                tokenizer, tree.prompt, [tree.completions[i] for i in tree.path(step)]
            )
            ids = prompt_ids + [token for ids in step_ids for token in ids]
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            if step_format.head == "lm":
                logits = logits[step_format.label_token_ids(tokenizer)]
            found[step] = logits.mean(0, keepdim=True) if step_format.head == "lm_mean" else logits
    return found


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_gradients_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Check that gradients differ by at most 1e-5 of the model's largest gradient."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-3  # otherwise there is nothing to compare
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5 * max(largest, 1), err_msg=name)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def make_trainer(
    output_dir,
    train: list[StepTree] | Dataset,
    model: PreTrainedModel | str | None = None,
    evaluation: list[StepTree] | None = None,
    trainer_class: type[HRMRewardTrainer] = HRMRewardTrainer,
    peft_config=None,
    data_collator=None,
    compute_metrics=None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config_class: type[HRMRewardConfig] = HRMRewardConfig,
    **args,
) -> HRMRewardTrainer:
    """Return a trainer on CPU in fp32: plain SGD without clipping, one tree per row, logging every step, saving nothing."""
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "packing": False,
    }
    config = config_class(**(defaults | args))
    return trainer_class(
        model=tiny_model(config.make_step_format()) if model is None else model,
        args=config,
        train_dataset=train if isinstance(train, Dataset) else dataset_of(train),
        eval_dataset=dataset_of(evaluation) if isinstance(evaluation, list) else evaluation,
        processing_class=tokenizer or tiny_tokenizer(),
        peft_config=peft_config,
        data_collator=data_collator,
        compute_metrics=compute_metrics,
    )


def code_block(page: str, marker: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    found = [block for block in blocks if marker in block]
    assert len(found) == 1, f"{page} has {len(found)} code blocks with {marker!r}"
    return found[0]


def load_recipe(name: str):
    spec = util.spec_from_file_location(Path(name).stem, ROOT / "recipes" / name)
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
