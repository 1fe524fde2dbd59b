"""Damaged checkpoints of reward models, policies, tokenizers and adapters: each is one line that names the checkpoint and what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from trl_hrm import HRMRewardConfig, HRMRewardTrainer, KLSelfConfig, KLSelfTrainer, StepScorer
from trl_hrm.identity import checkpoint_identity
from trl_hrm.loading import check_checkpoint, check_policy, load_policy, load_tokenizer
from trl_hrm.search.engines.transformers import TransformersEngine

from .checkpoints import drop, edit, save
from .helpers import HEADS, random_tree, tiny_model


CLASSIFICATION, LM = HEADS["classification"], HEADS["lm"]
UP = "model.layers.1.mlp.up_proj.weight"
ARGS = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def write(name: str, content: bytes | str):
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def change(name: str, **values):
    def apply(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | values))

    return apply


def fill(value: float):
    return lambda folder: edit(folder, lambda weights: weights[UP].view(-1)[7:8].fill_(value))


def without(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def binary(content: bytes):
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return apply


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123\n"
DAMAGES = {  # damage, and words of the message
    "a layer": (
        lambda folder: edit(folder, lambda w: [w.pop(name) for name in list(w) if ".1." in name]),
        "missing `model.layers.1.",
    ),
    "a weight": (lambda folder: edit(folder, drop(UP)), f"missing `{UP}`"),
    "more layers": (change("config.json", num_hidden_layers=3, layer_types=None), "missing `model.layers.2."),
    "fewer layers": (change("config.json", num_hidden_layers=1, layer_types=None), "unexpected `model.layers.1."),
    "another size": (change("config.json", intermediate_size=32), "with a different shape `model.layers.0.mlp"),
    "cut": (cut(WEIGHTS), f"{WEIGHTS}: the weights file is damaged"),
    "empty": (write(WEIGHTS, b""), f"{WEIGHTS}: the weights file is damaged"),
    "zeros": (write(WEIGHTS, bytes(1000)), f"{WEIGHTS}: the weights file is damaged"),
    "a pointer": (write(WEIGHTS, POINTER), "a pointer of Git LFS, not the file itself. Run `git lfs pull`"),
    "no file": (without(WEIGHTS), "no file named model.safetensors"),
    "NaN": (fill(float("nan")), f"`{UP}` contains NaN or infinite values"),
    "infinite": (fill(float("-inf")), f"`{UP}` contains NaN or infinite values"),
    "binary text": (binary(b"hello"), "the model cannot be loaded"),
    "binary empty": (binary(b""), "the model cannot be loaded (EOFError)"),
    "config of text": (write("config.json", "hello"), "config.json: not valid JSON"),
    "config of bytes": (write("config.json", b"\xff\xfe\x00"), "config.json: not valid JSON"),
    "config is a list": (write("config.json", "[]"), "config.json: found [], expected a JSON object"),
    "config is nested": (write("config.json", "[" * 100_000), "config.json: not valid JSON"),
    "config without type": (write("config.json", "{}"), "Should have a `model_type` key"),
    "unknown type": (change("config.json", model_type="mystery"), "model type `mystery`"),
    "layers of text": (change("config.json", num_hidden_layers="two"), "'num_hidden_layers' expected int"),
    "no heads": (change("config.json", num_attention_heads=0), "ZeroDivisionError"),
    "generation config": (write("generation_config.json", "{"), "generation_config.json: not valid JSON"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "the tokenizer has no tokens"),
    "tokenizer cut": (cut("tokenizer.json"), "the tokenizer cannot be loaded (JSONDecodeError"),
    "tokenizer empty": (write("tokenizer.json", "{}"), "the tokenizer cannot be loaded (KeyError: 'added_tokens')"),
    "tokenizer config": (write("tokenizer_config.json", "[]"), "the tokenizer cannot be loaded"),
}
SHARDED = {
    "shard missing": (without("model-00002-of-00013.safetensors"), "model-00002-of-00013.safetensors is missing"),
    "shard cut": (
        cut("model-00013-of-00013.safetensors"),
        "model-00013-of-00013.safetensors: the weights file is damaged",
    ),
    "index of text": (write(INDEX, "hello"), f"{INDEX}: not valid JSON"),
    "index is empty": (write(INDEX, "{}"), f"{INDEX}: found None, expected `weight_map`"),
    "index is a list": (write(INDEX, '{"weight_map": [1]}'), f"{INDEX}: found [1], expected `weight_map`"),
    "index leaves the folder": (write(INDEX, '{"weight_map": {"a": "../x"}}'), "expected `weight_map` with the file"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A reward model and a policy, each whole and in shards of the same number of files."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, step_format in (("reward", CLASSIFICATION), ("policy", LM)):
        model = tiny_model(step_format, tie_word_embeddings=name == "policy")
        save(root / name, model, step_format)
        shutil.copytree(root / name, root / f"{name}-sharded")
        (root / f"{name}-sharded" / WEIGHTS).unlink()
        model.save_pretrained(root / f"{name}-sharded", max_shard_size="20KB")
    return root


def train(folder: str, output_dir: Path) -> None:
    import random

    rows = Dataset.from_list([random_tree(random.Random(0)).to_row()])
    args = HRMRewardConfig(output_dir=str(output_dir), step_separator="\n", merge_separator=" ", **ARGS)
    HRMRewardTrainer(folder, args=args, train_dataset=rows)


def self_train(folder: str, output_dir: Path, **kwargs) -> None:
    rows = Dataset.from_list([{"prompt": "add", "completion": "sum"}])
    args = KLSelfConfig(output_dir=str(output_dir), eos_token=None, **ARGS)
    KLSelfTrainer(folder, args=args, train_dataset=rows, **kwargs)


LOADERS = {
    "scorer": ("reward", lambda folder, output: StepScorer.from_pretrained(folder)),
    "training": ("reward", train),
    "engine": ("policy", lambda folder, output: TransformersEngine.from_pretrained(folder)),
    "self-training": ("policy", self_train),
    "without a KL term": (
        "policy",
        lambda folder, output: KLSelfTrainer(
            folder,
            args=KLSelfConfig(output_dir=str(output), kl_coef=0, eos_token=None, **ARGS),
            train_dataset=Dataset.from_list([{"prompt": "add", "completion": "sum"}]),
        ),
    ),
}


def assert_refused(load, folder: Path, output: Path, words: str, capfd) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        load(str(folder), output)
    message = str(error.value)
    assert words in message and str(folder) in message and "\n" not in message and len(message) < 700
    printed = capfd.readouterr()
    assert "LOAD REPORT" not in printed.out + printed.err


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_damaged_checkpoint(tmp_path, checkpoints, capfd, loader, damage):
    """A policy with a missing layer wrote random text, and a cut file was a `SafetensorError` without a file name."""
    kind, load = LOADERS[loader]
    shutil.copytree(checkpoints / kind, tmp_path / "model")
    if damage == "generation config" and kind == "reward":
        pytest.skip("token classifiers do not generate")
    apply, words = DAMAGES[damage]
    apply(tmp_path / "model")
    assert_refused(load, tmp_path / "model", tmp_path / "out", words, capfd)


@pytest.mark.parametrize("damage", SHARDED)
@pytest.mark.parametrize("loader", ["scorer", "engine"])
def test_damaged_shards(tmp_path, checkpoints, capfd, loader, damage):
    kind, load = LOADERS[loader]
    shutil.copytree(checkpoints / f"{kind}-sharded", tmp_path / "model")
    apply, words = SHARDED[damage]
    apply(tmp_path / "model")
    assert_refused(load, tmp_path / "model", tmp_path / "out", words, capfd)
    check = check_policy if kind == "policy" else lambda path: check_checkpoint(path, CLASSIFICATION)
    with pytest.raises((ValueError, OSError), match="model"):
        check(str(tmp_path / "model"))


def test_a_damaged_reference(tmp_path, checkpoints, capfd):
    shutil.copytree(checkpoints / "policy", tmp_path / "reference")
    edit(tmp_path / "reference", drop(UP))
    assert_refused(
        lambda folder, output: self_train(str(checkpoints / "policy"), output, ref_model=folder),
        tmp_path / "reference",
        tmp_path / "out",
        f"missing `{UP}`",
        capfd,
    )


@pytest.mark.parametrize("damage", ["cut", "NaN", "config"])
def test_a_damaged_adapter(tmp_path, checkpoints, capfd, damage):
    model = get_peft_model(
        tiny_model().from_pretrained(checkpoints / "reward"),
        LoraConfig(task_type="TOKEN_CLS", target_modules=["q_proj"]),
    )
    model.peft_config["default"].base_model_name_or_path = str(checkpoints / "reward")
    folder = save(tmp_path / "adapter", model)
    StepScorer.from_pretrained(str(folder))
    capfd.readouterr()
    file = "adapter_model.safetensors"
    if damage == "cut":
        cut(file)(folder)
    elif damage == "NaN":
        edit(folder, lambda weights: next(iter(weights.values())).fill_(float("nan")), file)
    else:
        write("adapter_config.json", "[]")(folder)
    words = {"cut": "the adapter cannot be loaded", "NaN": "contains NaN", "config": "the adapter cannot be loaded"}
    assert_refused(LOADERS["scorer"][1], folder, tmp_path / "out", words[damage], capfd)


class TestStillLoads:
    """Checkpoints that lack a weight or have others for a good reason."""

    def test_tied_embeddings(self, checkpoints):
        assert "lm_head.weight" not in load_file(checkpoints / "policy" / WEIGHTS)
        model = load_policy(str(checkpoints / "policy"))
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        assert check_policy(str(checkpoints / "policy"))

    @pytest.mark.parametrize("kind", ["reward", "policy"])
    def test_shards(self, checkpoints, kind):
        load = {"reward": StepScorer.from_pretrained, "policy": load_policy}[kind]
        models = [getattr(load(str(checkpoints / name)), "model", None) for name in (kind, f"{kind}-sharded")]
        for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
            assert torch.equal(a, b)

    def test_a_value_head_of_a_policy(self, tmp_path, checkpoints):
        """As TRL's PPO saves it. It is not used for sampling."""
        shutil.copytree(checkpoints / "policy", tmp_path / "model")
        edit(tmp_path / "model", lambda weights: weights.update({"v_head.summary.weight": torch.zeros(1, 64)}))
        load_policy(str(tmp_path / "model"))
        assert check_policy(str(tmp_path / "model"))

    def test_an_older_format(self, tmp_path, checkpoints):
        shutil.copytree(checkpoints / "policy", tmp_path / "model")
        weights = load_file(tmp_path / "model" / WEIGHTS)
        (tmp_path / "model" / WEIGHTS).unlink()
        torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
        load_policy(str(tmp_path / "model"))
        assert not check_policy(str(tmp_path / "model"))
        torch.save(
            {name: weight for name, weight in weights.items() if name != UP}, tmp_path / "model" / "pytorch_model.bin"
        )
        with pytest.raises(ValueError, match="missing"):
            load_policy(str(tmp_path / "model"))

    def test_an_index_that_names_more(self, tmp_path, checkpoints):
        """Only weights that the model needs must be there."""
        shutil.copytree(checkpoints / "policy-sharded", tmp_path / "model")
        index = json.loads((tmp_path / "model" / INDEX).read_text())
        index["weight_map"]["lm_head.bias"] = next(iter(index["weight_map"].values()))
        (tmp_path / "model" / INDEX).write_text(json.dumps(index))
        load_policy(str(tmp_path / "model"))
        assert check_policy(str(tmp_path / "model"))

    def test_infinity_in_the_configuration(self, tmp_path, checkpoints):
        """Some published configurations contain `Infinity`, which is not JSON."""
        shutil.copytree(checkpoints / "policy", tmp_path / "model")
        change("config.json", time_step_limit=[0.0, float("inf")])(tmp_path / "model")
        load_policy(str(tmp_path / "model"))

    def test_the_tokenizer(self, checkpoints):
        expected = AutoTokenizer.from_pretrained(checkpoints / "policy")
        assert load_tokenizer(str(checkpoints / "policy")).get_vocab() == expected.get_vocab()


@pytest.mark.parametrize("loader", ["scorer", "engine"])
def test_a_missing_config(tmp_path, checkpoints, capfd, loader):
    kind, load = LOADERS[loader]
    shutil.copytree(checkpoints / kind, tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    words = "config.json is missing. Download or save it again."
    assert_refused(load, tmp_path / "model", tmp_path / "out", words, capfd)


def test_missing_weights_of_an_adapter(tmp_path):
    """PEFT asked the Hub for them."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "missing"}')
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: adapter_model.safetensors is missing. Download or"):
        check_checkpoint(str(tmp_path), CLASSIFICATION)


@pytest.mark.parametrize("base", [None, 7, "itself"])
def test_identity_of_an_adapter_without_a_base_model(tmp_path, base):
    """`null` was a `TypeError`, and the folder itself a `RecursionError`."""
    base = str(tmp_path) if base == "itself" else base
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(
        ValueError, match="adapter_config.json: `base_model_name_or_path` is .* path or Hub id of the base"
    ):
        checkpoint_identity(str(tmp_path))
