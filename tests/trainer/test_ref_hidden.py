"""Precomputed hidden states of a reference: same training as with the reference, computed once, rejected if they do not fit."""

import copy
import gc
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.helpers import tiny_model
from tests.trainer.kl_training import (
    LM,
    assert_logs_equal,
    assert_trained,
    assert_weights_equal,
    logs_of,
    make_kl_trainer,
    moved,
    random_rows,
)
from trl_hrm.trainer import reference
from trl_hrm.trainer.reference import REF_STATES, FrozenReference, PrecomputedReference


class InBfloat16:
    """A reference whose states are rounded like the stored states."""

    def __init__(self, reference: FrozenReference):
        self.reference = reference

    def __call__(self, *args):
        states, head = self.reference(*args)
        return states.bfloat16().to(states.dtype), head


def test_precomputed_states_train_as_the_frozen_copy(tmp_path):
    """States of the wrong sequence or in another order raise no error: checks packed, padded and shuffled batches."""
    rows = random_rows(16)
    for number, options in enumerate(({}, {"packing": True, "max_length": 64, "per_device_train_batch_size": 2})):
        options |= {"num_train_epochs": 2, "learning_rate": 0.1, "train_sampling_strategy": "random"}
        expected = make_kl_trainer(tmp_path / "copy", rows, ref_model=moved(tiny_model(LM)), **options)
        expected.reference = InBfloat16(expected.reference)
        expected.train()
        found = make_kl_trainer(
            tmp_path / f"states{number}", rows, ref_model=moved(tiny_model(LM)), precompute_ref_hidden=True, **options
        )
        found.train()
        assert isinstance(found.reference, PrecomputedReference)
        assert_trained(expected)
        assert_logs_equal(found, expected, rel=1e-3)
        assert_weights_equal(found.model, expected.model, atol=1e-3)


def test_precomputed_states_equal_the_reference_in_bfloat16(tmp_path):
    """Positions that are off by one would raise no error."""
    reference = moved(tiny_model(LM))
    trainer = make_kl_trainer(
        tmp_path, random_rows(5), ref_model=copy.deepcopy(reference), precompute_ref_hidden=True, max_length=None
    )
    example = trainer.train_dataset[3]
    batch = trainer.data_collator([trainer.train_dataset[1], example])
    start = example["labels"].index(next(label for label in example["labels"] if label != -100))
    with torch.no_grad():
        states = reference.base_model(input_ids=torch.tensor([example["input_ids"]])).last_hidden_state[0]
    torch.testing.assert_close(
        batch[REF_STATES][-(len(states) - start) :].float(), states[start - 1 : -1], rtol=8e-3, atol=1e-2
    )
    assert batch[REF_STATES].dtype == torch.bfloat16
    assert len(batch[REF_STATES]) == (batch["labels"] != -100).sum()


def test_precomputing_resumes(tmp_path, monkeypatch):
    """Repeating work after a kill costs hours for a real model, and a partial file must not be used."""
    rows = random_rows(12)
    options = {"precompute_ref_hidden": True, "per_device_eval_batch_size": 2, "max_length": None}
    whole = make_kl_trainer(tmp_path / "whole", rows, **options)
    monkeypatch.setattr(reference, "SHARD_BYTES", 0)  # one file per batch
    written = []
    write = reference.RefHiddenStore.write

    def write_three(store, states):
        if len(written) == 3:
            (store.folder / ".states-half.safetensors.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(set(states))
        write(store, states)

    monkeypatch.setattr(reference.RefHiddenStore, "write", write_three)
    with pytest.raises(KeyboardInterrupt):
        make_kl_trainer(tmp_path / "cut", rows, **options)
    assert len(list((tmp_path / "cut" / "_ref_hidden").glob("states-*.safetensors"))) == 3

    again = []
    monkeypatch.setattr(
        reference.RefHiddenStore, "write", lambda store, states: (again.append(set(states)), write(store, states))
    )
    trainer = make_kl_trainer(tmp_path / "cut", rows, **options)
    assert not set.union(*written) & set.union(*again)
    batches = [made.data_collator(list(made.train_dataset)) for made in (whole, trainer)]
    torch.testing.assert_close(batches[0][REF_STATES], batches[1][REF_STATES])


def test_states_of_another_reference_or_of_other_data_are_refused(tmp_path):
    """They have the right shape, but would train towards a different model."""
    rows = random_rows(6)
    options = {"precompute_ref_hidden": True, "ref_hidden_dir": str(tmp_path / "states")}
    make_kl_trainer(tmp_path, rows, **options)
    with pytest.raises(ValueError, match="another reference model.*Delete the folder"):
        make_kl_trainer(tmp_path, rows, ref_model=moved(tiny_model(LM), 1e-4), **options)
    with pytest.raises(ValueError, match="another data or tokenizer.*Delete the folder"):
        make_kl_trainer(tmp_path, [*rows[:-1], {"prompt": "x", "completion": " y"}], **options)
    with pytest.raises(ValueError, match="another data or tokenizer"):
        make_kl_trainer(tmp_path, rows, completion_only_loss=False, **options)
    trainer = make_kl_trainer(tmp_path, rows, **options)
    with pytest.raises(ValueError, match="no hidden states"):
        trainer.evaluate(Dataset.from_list(random_rows(3, seed=5)))
    (tmp_path / "states" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json"):
        make_kl_trainer(tmp_path, rows, **options)


def test_states_do_not_depend_on_the_adapter(tmp_path):
    """A restart initializes the adapter with other weights. The states of its base model must stay valid."""
    rows = random_rows(6)
    options = {"precompute_ref_hidden": True, "ref_hidden_dir": str(tmp_path / "states"), "max_length": None}
    for seed in (0, 1):
        peft_config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        trainer = make_kl_trainer(tmp_path, rows, seed=seed, trainer_args={"peft_config": peft_config}, **options)
    plain = make_kl_trainer(tmp_path, rows, precompute_ref_hidden=True, ref_hidden_dir=str(tmp_path / "p"))
    states = [made.data_collator(list(made.train_dataset))[REF_STATES] for made in (trainer, plain)]
    assert torch.equal(*states)


def test_damaged_files_and_rows_without_training_tokens(tmp_path):
    """The error must say where and what to do, since computing the folder takes hours."""
    rows, states = random_rows(6), tmp_path / "states"
    options = {"precompute_ref_hidden": True, "ref_hidden_dir": str(states)}
    make_kl_trainer(tmp_path, rows, **options)
    shard = next(states.glob("states-*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shard.name}: .*damaged.* Delete it"):
        make_kl_trainer(tmp_path, rows, **options)
    shard.unlink()
    make_kl_trainer(tmp_path, rows, **options)
    assert next(states.glob("states-*.safetensors")).read_bytes() == whole
    (states / "manifest.json").write_text('{"version": 1, "refer')
    with pytest.raises(ValueError, match="manifest.json: not valid JSON .* Delete the folder"):
        make_kl_trainer(tmp_path, rows, **options)
    prompts = [{"prompt": "1 + 2 " * 20, "completion": " 3"}]
    with pytest.raises(ValueError, match="none of 1 rows"):
        make_kl_trainer(tmp_path, prompts, max_length=8, precompute_ref_hidden=True)


def test_a_collator_that_changes_what_is_trained_on(tmp_path):
    """The stored states of other tokens would give the KL of one token against another."""
    trainer = make_kl_trainer(tmp_path, random_rows(6), precompute_ref_hidden=True)
    plain = trainer.data_collator.collator
    trainer.data_collator.collator = lambda rows: {name: value[:, :6] for name, value in plain(rows).items()}
    with pytest.raises(ValueError, match="data collator"):
        trainer.train()


def test_rows_of_token_ids_alone(tmp_path):
    """TRL's collator uses the ids as labels if a row has no labels."""
    rows = [{"input_ids": [3, 9, 27, 5, 11][: 3 + i % 3]} for i in range(8)]
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "ref_model": moved(tiny_model(LM))}
    logs = []
    for precompute in (False, True):
        trainer = make_kl_trainer(tmp_path / str(precompute), rows, precompute_ref_hidden=precompute, **options)
        trainer.train()
        logs.append(logs_of(trainer)[0]["kl"])
    assert logs[1] == pytest.approx(logs[0], rel=0.02) and logs[0] > 0.1


def test_states_are_not_pushed_to_the_hub(tmp_path):
    """They are large and derived from the training data. Trainer skips names that begin with an underscore."""
    make_kl_trainer(tmp_path, random_rows(4), precompute_ref_hidden=True)
    assert [path.name for path in tmp_path.iterdir() if any(path.rglob("*.safetensors"))] == ["_ref_hidden"]


def test_the_reference_leaves_memory(tmp_path, paths, monkeypatch):
    """Only its head is kept. A reference cycle would keep billions of weights until Python collects cycles."""
    loaded = []
    load = reference.load_reference

    def load_and_watch(*args, **kwargs):
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(reference, "load_reference", load_and_watch)
    gc.disable()
    try:
        trainer = make_kl_trainer(tmp_path, random_rows(4), ref_model=paths[1], precompute_ref_hidden=True)
    finally:
        gc.enable()
    assert [model() for model in loaded] == [None]
    assert len(trainer.reference.head.weight) == trainer.model.config.vocab_size
