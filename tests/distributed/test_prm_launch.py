"""`PRMTrainer` in one process and in two."""

import json
import random

import pytest

from ..helpers import tiny_model, tiny_tokenizer
from ..prm_training import FORMAT, random_chain
from .launching import ROOT, Run, largest_difference, launch


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """
    Ranks hold different numbers of labels: a mean per rank gives another loss and other gradients. The sampler repeats one
    of the five evaluation rows to fill the last batch of two ranks, and it must not count twice. After an evaluation before
    training, transformers 5.23 with Accelerate 1.15 silently trains each rank alone.
    """
    rng = random.Random(0)
    tiny_model(FORMAT, initializer_range=0.05).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    chains = [random_chain(rng, f"{i} 1+2?", (0.0, 0.4, 1.0)) for i in range(21)]
    for split, part in (("train", chains[:16]), ("test", chains[16:])):
        rows = [{"prompt": row.prompt, "completions": row.completions, "labels": row.labels} for row in part]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    runs = {}
    for name, config, batch_size in (("single", None, "4"), ("double", "cpu_2proc.yaml", "2")):
        args = [str(tmp_path), str(tmp_path / name), batch_size]
        launch(ROOT / "tests" / "distributed" / "prm_probe.py", args, tmp_path / f"{name}.log", config)
        runs[name] = Run(tmp_path / name)
    facts = runs["double"].facts(rank=1)
    assert (facts["num_processes"], facts["wrapper"]) == (2, "DistributedDataParallel")
    assert runs["single"].facts()["num_processes"] == 1
    for name in ("loss", "grad_norm", "accuracy", "num_labels", "eval_loss", "eval_accuracy"):
        assert runs["double"].logged(name) == pytest.approx(runs["single"].logged(name), rel=1e-4), name
    assert len(runs["single"].logged("loss")) == 2 and len(runs["single"].logged("eval_loss")) == 1
    assert largest_difference(runs["double"].weights(), runs["single"].weights()) < 1e-5
