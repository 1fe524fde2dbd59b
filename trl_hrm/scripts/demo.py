"""Train a small hierarchical reward model from scratch on a world of arithmetic, and use it. Needs no network."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default="outputs/demo", help="folder for the checkpoint and its metrics")
    parser.add_argument("--num_problems", type=int, default=1500, help="training problems")
    parser.add_argument("--num_solutions", type=int, default=8, help="solutions of each problem")
    parser.add_argument("--max_steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=42, help="seed of the data and of the training")


def run(args: argparse.Namespace) -> None:
    import warnings
    from pathlib import Path

    from datasets import Dataset
    from transformers.utils import logging

    from ..data.hierarchy import hrm_view
    from ..demo.tiny_model import make_tiny_model, texts_of
    from ..demo.world import step_trees
    from ..scoring.scorer import StepScorer
    from ..trainer.hrm_reward_config import HRMRewardConfig
    from ..trainer.hrm_reward_trainer import HRMRewardTrainer

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's defaults use a name that transformers renames
    held_out = 200
    trees = step_trees(args.num_problems + held_out, args.num_solutions, args.seed)
    rows = [hrm_view(tree).to_row() for tree in trees]
    train, test = Dataset.from_list(rows[held_out:]), Dataset.from_list(rows[:held_out])
    print(f"World: {len(train):,} problems to train on, {len(test)} held out.")

    start = Path(args.output_dir) / "random-model"
    make_tiny_model((text for row in rows for text in texts_of(row)), start, vocab_size=320, seed=args.seed)
    trainer = HRMRewardTrainer(
        model=str(start),
        args=HRMRewardConfig(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_length=512,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=args.seed,
            save_strategy="no",
            logging_steps=100,
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=test,
    )
    print(f"Training rows: {trainer.reports['train_dataset']}")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="demo-hrm")
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    print(format_metrics(metrics))

    scorer = StepScorer.from_pretrained(args.output_dir)
    tree = _with_correction(trees[:held_out])
    print("\nA held-out solution, each step judged alone, and with the pair that it ends (highest):")
    alone, pairs = (scorer.score_trees([tree], spans=spans)[0] for spans in ((1,), (1, 2)))
    print(f"  {tree.prompt}\n  {'label':>6}{'alone':>8}{'pair':>8}  step")
    for text, label, one, two in zip(tree.completions, tree.labels, alone, pairs, strict=True):
        print(f"  {label:>6.0f}{one:>8.3f}{two:>8.3f}  {' '.join(text.split())}")
    print(
        f"\nCheckpoint: {args.output_dir}. Score your own solutions: trl-hrm score --model {args.output_dir} --input FILE"
    )


def format_metrics(metrics: dict[str, float]) -> str:
    """Held-out metrics as a table: all, single and merged steps."""
    lines = [f"\n{'held-out steps':<16}{'steps':>8}{'accuracy':>10}{'error F1':>10}{'AUROC':>8}"]
    for name, prefix in (("all", "eval_"), ("single", "eval_single_"), ("merged", "eval_merged_")):
        values = [metrics[prefix + key] for key in ("num_steps", "accuracy", "error_f1", "auroc")]
        lines.append("{:<16}{:>8,}{:>10.3f}{:>10.3f}{:>8.3f}".format(name, *values))
    return "\n".join(lines)


def _with_correction(trees):
    """The first solution that slips and takes it back."""
    for tree in trees:
        for chain in tree.chains():
            if any(text.startswith("Wait") for text in chain.completions) and chain.labels[-1] == 1:
                return chain
    raise ValueError("No held-out solution corrects a slip; raise --num_solutions.")
