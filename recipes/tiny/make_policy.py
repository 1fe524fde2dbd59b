"""
Train a tiny policy from scratch on the arithmetic world, in about a minute on CPU, and write problems for it to solve.

```bash
python recipes/tiny/make_policy.py --output_dir outputs/tiny-policy --problems problems.jsonl
```

Its solutions have the layout of the prompt `steps`, and it slips and corrects itself as often as the world does, so that its
trees have right and wrong branches. It knows the world's problems and nothing else.
"""

import argparse
import json
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/tiny-policy", help="folder of the policy")
    parser.add_argument("--problems", default="problems.jsonl", help="file of problems and answers to write")
    parser.add_argument("--num_problems", type=int, default=20, help="problems to write; none of them is trained on")
    parser.add_argument("--max_steps", type=int, default=1200, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=42, help="seed of the problems and the training")
    args = parser.parse_args()

    from datasets import Dataset
    from transformers.utils import logging
    from trl import SFTConfig, SFTTrainer

    from trl_hrm.demo.tiny_model import make_tiny_model, texts_of

    logging.set_verbosity_error()
    rng = random.Random(args.seed)
    held_out = make_problems(rng, args.num_problems)
    texts = {problem.text() for problem in held_out}
    rows = [row(problem, rng) for problem in make_problems(rng, min(64 * args.max_steps, 6000)) if problem.text() not in texts]
    start = Path(args.output_dir, "random-model")
    make_tiny_model(texts_of(rows[:2000]), start, kind="causal", vocab_size=320, seed=args.seed)
    trainer = SFTTrainer(
        str(start),
        SFTConfig(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=args.seed,
            save_strategy="no",
            logging_steps=200,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model()
    with open(args.problems, "w", encoding="utf-8") as file:
        for problem in held_out:
            file.write(json.dumps({"problem": problem.text(), "answer": str(problem.values()[-1])}) + "\n")
    print(f"Policy: {args.output_dir}. {len(held_out)} problems: {args.problems}.")


def make_problems(rng: random.Random, number: int) -> list:
    """Different problems."""
    from trl_hrm.demo.world import make_problem

    found: dict = {}
    while len(found) < number:
        found[make_problem(rng)] = None
    return list(found)


def row(problem, rng: random.Random) -> dict[str, str]:
    """A problem and one solution, in the layout that the prompt `steps` asks for."""
    from trl_hrm.demo.world import solve

    *steps, answer = solve(problem, rng)[0]
    headed = [f"# Step {k}\n{step}\n\n" for k, step in enumerate(steps, start=1)]
    return {"prompt": f"{problem.text()}\n\n", "completion": "".join(headed) + f"{answer}\n# END!"}


if __name__ == "__main__":
    main()
