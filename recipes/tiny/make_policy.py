"""
Train a tiny policy from scratch on synthetic arithmetic problems, in about a minute on CPU, and write problems for it to solve.

    python recipes/tiny/make_policy.py --output_dir outputs/tiny-policy --problems problems.jsonl

Its solutions have `# Step k` headers, `# Answer` and `# END!`. It makes mistakes and corrects some of them, so that its trees have
correct and wrong branches. It can only solve this kind of problem.
"""

import argparse
import json
import random


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", default="outputs/tiny-policy", help="output folder of the policy")
    parser.add_argument("--problems", default="problems.jsonl", help="output file for problems and answers")
    parser.add_argument(
        "--test_problems", help="output file for the same number of test problems (default: none are written)"
    )
    parser.add_argument(
        "--num_problems", type=int, default=20, help="number of problems to write, which are not trained on"
    )
    parser.add_argument(
        "--max_steps",
        type=int,
        default=700,
        help="number of optimizer steps: the first 4/7 on solutions without mistakes, the others with mistakes",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the problems and the training")
    return parser


def main(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from transformers.utils import logging

    from trl_hrm.tiny_model import make_tiny_model, texts_of

    logging.set_verbosity_error()
    rng = random.Random(args.seed)
    held_out = different_problems(rng, args.num_problems)
    problems = [problem for problem in different_problems(rng, 6000) if problem not in held_out]
    test = problems[: args.num_problems] if args.test_problems else []
    problems = problems[len(test) :]
    sample = [solution(problem, rng, 0.25) for problem in problems[:1000]]
    make_tiny_model(texts_of(sample), args.output_dir, kind="causal", vocab_size=320, seed=args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    # First train without mistakes: with mistakes from the start, arithmetic is learned several times slower.
    for slip_rate, steps in ((0.0, args.max_steps * 4 // 7), (0.2, args.max_steps - args.max_steps * 4 // 7)):
        rows = [tokenize(tokenizer, *solution(rng.choice(problems), rng, slip_rate)) for _ in range(32 * steps)]
        settings = TrainingArguments(
            output_dir=args.output_dir,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3 if slip_rate == 0 else 1e-3,
            warmup_steps=50,
            use_cpu=True,
            seed=args.seed,
            save_strategy="no",
            logging_steps=100,
            report_to="none",
        )
        collator = DataCollatorForSeq2Seq(tokenizer)
        Trainer(model, settings, train_dataset=rows, data_collator=collator, processing_class=tokenizer).train()
    model.save_pretrained(args.output_dir)
    print(f"Policy saved to {args.output_dir}.")
    write_problems(held_out, args.problems)
    if test:
        write_problems(test, args.test_problems)


def different_problems(rng: random.Random, number: int) -> list:
    """Return `number` distinct problems."""
    from trl_hrm.demo.world import make_problem

    found: dict = {}
    while len(found) < number:
        found[make_problem(rng)] = None
    return list(found)


def write_problems(problems: list, path: str) -> None:
    """Write problems and their answers as JSON Lines."""
    with open(path, "w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps({"problem": problem.text(), "answer": str(problem.values()[-1])}) + "\n")
    print(f"Wrote {len(problems)} problems to {path}.")


def solution(problem, rng: random.Random, slip_rate: float) -> tuple[str, str]:
    """Return the text of a problem and of one solution, with headers."""
    from trl_hrm.demo.world import solve, with_headers

    return problem.text(), "\n\n".join(with_headers(solve(problem, rng, slip_rate)[0]))


def tokenize(tokenizer, prompt: str, completion: str) -> dict[str, list[int]]:
    """Return token ids, with labels only on the completion. Prompt and completion are tokenized separately, as in sampling."""
    before, after = tokenizer.encode(prompt), tokenizer.encode(completion) + [tokenizer.eos_token_id]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


if __name__ == "__main__":
    main(make_parser().parse_args())
