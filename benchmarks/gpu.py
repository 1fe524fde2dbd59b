"""
All measurements on one GPU, each in at most 8 minutes: training, scoring, KL training, exactness in bf16, generation and scoring with vLLM.

    python benchmarks/gpu.py --output outputs/gpu
    python benchmarks/gpu.py --output outputs/gpu --parts exactness vllm

Parts, which run in processes of their own and are stopped after `--limit` seconds:

- `training`: `tree_training.py --gpu`, trees compared with TRL 1.13's PRMTrainer, with labelled steps and tokens per second, memory and the share of
  the card's peak FLOPs (6·N·T per second for N parameters without input embeddings and T tokens).
- `scoring`: `scoring.py --gpu`, a forest compared with one sequence per prefix and per candidate (2·N·T).
- `scaling`: `tree_scaling.py --gpu`, trees of 8,000 and 32,000 tokens, and over N, depth and branching.
- `kl`: `kl_memory.py --gpu`, the KL term of self-training compared with SFTTrainer.
- `exactness`: logits and gradients of one tree with flex attention in bf16, and of one sequence per path in bf16, both compared with one sequence per
  path in float32. The difference between tree and paths should not exceed the difference between bf16 and float32.
- `vllm`: tokens per second of vLLM as policy; candidates per second of vLLM and of StepScorer with the same reward model.

Models have random weights and the shape of Qwen2.5-Math-1.5B, or are given with `--policy` and `--reward_model`. `report.md` and `results.json` in the
output folder have the card, driver, versions and date. With `--cpu`, all parts run at tiny size without TRL 1.13, and with the engine of transformers instead of
vLLM, to test this script.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import SHAPES, describe_shape, make_model, now, peak, reset_peak, where_and_when


PARTS = ["training", "scoring", "scaling", "kl", "exactness", "vllm"]
WORKERS = ["exactness", "generation", "vllm scorer", "forest scorer"]
SCRIPTS = {"training": "tree_training", "scoring": "scoring", "scaling": "tree_scaling", "kl": "kl_memory"}
GPU_OPTIONS = {
    "training": "--gpu --records 16 --rounds 1",
    "scoring": "--gpu --rounds 3",
    "scaling": "--gpu --rounds 3 --path_limit 200000",
    "kl": "--gpu --rounds 1",
}
CPU_OPTIONS = {
    "training": "--hidden_size 64 --num_layers 1 --records 1 --rounds 1 --systems 'prm tree' 'prm ceiling'",
    "scoring": "--hidden_size 64 --num_layers 1 --num_candidates 4 --rounds 1 --least_seconds 0 --workloads 'shared prompt'",
    "scaling": "--hidden_size 64 --num_layers 1 --cases 'best of 4' 'search, depth 4'",
    "kl": "--parts memory --vocab_size 512 --hidden_size 64 --loss_tokens 8 --rounds 1",
}
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "vllm")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for report.md and results.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument(
        "--limit", type=float, default=480, help="seconds after which a part is stopped (default: 480)"
    )
    parser.add_argument("--shape", choices=SHAPES, help="shape of the models (default: qwen2.5-math-1.5b)")
    parser.add_argument("--data", help="PRM800K file (default: see tree_training.py)")
    parser.add_argument(
        "--trl_1_13", help="folder with TRL 1.13, for a machine without network (see tree_training.py)"
    )
    parser.add_argument("--policy", help="path or Hub id of the policy (default: random weights)")
    parser.add_argument("--reward_model", help="path or Hub id of the reward model (default: random weights)")
    parser.add_argument(
        "--peak_tflops", type=float, help="peak of the card in bf16 (default: by the name of the card)"
    )
    parser.add_argument("--num_prompts", type=int, default=16, help="problems to generate for (default: 16)")
    parser.add_argument("--num_samples", type=int, default=16, help="samples per problem (default: 16)")
    parser.add_argument("--max_tokens", type=int, default=512, help="tokens per sample (default: 512)")
    parser.add_argument("--num_candidates", type=int, default=64, help="candidates to score (default: 64)")
    parser.add_argument("--cpu", action="store_true", help="tiny models on a CPU, to test this script")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser


# Exactness of a tree in bf16


def measure_exactness(args: argparse.Namespace) -> dict:
    """Return the differences of logits and gradients between trees and paths in bf16, and paths in float32."""
    import torch
    from tree_scaling import VOCABULARY, make_tree, rows_of_paths, score, train

    from trl_hrm.tree_attention import use_tree_attention

    tree = make_tree("search, depth 4" if args.cpu else "search, depth 16")
    rows, paths = [[tree]], rows_of_paths(tree, 4096)
    device = torch.device("cpu" if args.cpu else "cuda")

    def run(dtype: torch.dtype, is_tree: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
        model = make_model(args.shape, VOCABULARY, hidden_size=64, num_layers=2, wide_init=True).to(dtype).to(device)
        model.gradient_checkpointing_enable()
        if is_tree and not args.cpu:
            model.set_attn_implementation("flex_attention" if dtype == torch.bfloat16 else "sdpa")
        if is_tree:
            use_tree_attention(model, device)
        batches = rows if is_tree else paths
        logits = score(model, batches, is_tree)
        train(model, batches, is_tree)
        gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters()}
        model.zero_grad()
        before, start = reset_peak(not args.cpu), now(not args.cpu)
        train(model, batches, is_tree)
        speed = {"seconds": now(not args.cpu) - start, "memory": (peak(not args.cpu) - before) / 2**20}
        return logits, gradients, speed | {"model": describe_shape(args.shape, model)}

    bf16, fp32 = torch.bfloat16, torch.float32
    found = {
        "one sequence per path, float32": run(fp32, False),
        "tree, float32": run(fp32, True),
        "one sequence per path, bf16": run(bf16, False),
        "tree, bf16": run(bf16, True),
    }
    comparisons = []
    for first, second in (
        ("tree, float32", "one sequence per path, float32"),
        ("one sequence per path, bf16", "one sequence per path, float32"),
        ("tree, bf16", "one sequence per path, float32"),
        ("tree, bf16", "one sequence per path, bf16"),
    ):
        logits = [found[name][0] for name in (first, second)]
        comparisons.append(
            {"systems": [first, second]} | differences(*logits, *(found[n][1] for n in (first, second)))
        )
    speed = {name: result[2] for name, result in found.items()}
    return {"labels": len(tree.steps), "tokens": len(tree), "comparisons": comparisons, "speed": speed}


def differences(logits, other_logits, gradients: dict, other_gradients: dict) -> dict[str, float]:
    """
    Return the largest and mean absolute difference of logits, and the norm and largest element of the difference of all gradients,
    relative to the norm and largest element of the other gradients.
    """
    gap = (logits - other_logits).abs()
    squares, other_squares, largest, other_largest = 0.0, 0.0, 0.0, 0.0
    for name, other in other_gradients.items():
        difference, other = gradients[name].float() - other.float(), other.float()
        squares += difference.double().square().sum().item()
        other_squares += other.double().square().sum().item()
        largest = max(largest, difference.abs().max().item())
        other_largest = max(other_largest, other.abs().max().item())
    return {
        "logits, max": gap.max().item(),
        "logits, mean": gap.mean().item(),
        "standard deviation of logits": other_logits.std().item(),
        "gradients, relative norm": (squares / other_squares) ** 0.5,
        "gradients, relative max": largest / other_largest,
    }


def exactness_table(result: dict) -> str:
    model = next(iter(result["speed"].values()))["model"]
    deviation = result["comparisons"][0]["standard deviation of logits"]
    lines = [
        f"{model}. One tree of {result['tokens']:,} tokens with {result['labels']} labelled steps. Logits have a standard deviation of "
        f"{deviation:.2f}. Differences of gradients are relative to all gradients of the second system.",
        "",
        "| systems | logits: max | mean | gradients: norm | max |",
        "|---|---|---|---|---|",
    ]
    for one in result["comparisons"]:
        values = [
            one[name]
            for name in ("logits, max", "logits, mean", "gradients, relative norm", "gradients, relative max")
        ]
        lines.append(f"| {' − '.join(one['systems'])} | " + " | ".join(f"{value:.1e}" for value in values) + " |")
    lines += ["", "| system | seconds of a training step | peak memory, MiB |", "|---|---|---|"]
    lines += [f"| {name} | {one['seconds']:.2f} | {one['memory']:,.0f} |" for name, one in result["speed"].items()]
    return "\n".join(lines)


# Generation and scoring with vLLM


def save_models(args: argparse.Namespace, work: Path) -> None:
    """Save a policy and a reward model with random weights to `work`, where none are given."""
    import torch
    from scoring import WORDS

    from trl_hrm import StepFormat
    from trl_hrm.tiny_model import make_tokenizer

    tokenizer = make_tokenizer([" ".join(WORDS) + "\n\n" + " ".join(reversed(WORDS))] * 3, 400)
    for name, kind, given in (("policy", "causal", args.policy), ("reward_model", "token", args.reward_model)):
        if given:
            continue
        model = make_model(
            args.shape, len(tokenizer), kind, hidden_size=64, num_layers=2, wide_init=True, own_vocabulary=False
        )
        model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        if kind == "causal":
            model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.to(torch.float32 if args.cpu else torch.bfloat16).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
        if kind == "token":
            StepFormat().save(work / name)


def scoring_problem(args: argparse.Namespace, tokenizer) -> tuple[str, list[list[str]]]:
    from scoring import make_candidates

    sizes = argparse.Namespace(prompt_tokens=200, step_tokens=30, num_candidates=args.num_candidates)
    return make_candidates(tokenizer, sizes, num_steps=9, shared=6)


def measure_generation(args: argparse.Namespace, work: Path) -> dict:
    """Return tokens per second of the policy for several problems at once."""
    import importlib

    module = importlib.import_module(f"trl_hrm.search.engines.{'transformers' if args.cpu else 'vllm'}")
    make_engine = module.TransformersEngine if args.cpu else module.VLLMEngine
    options = {} if args.cpu else {"gpu_memory_utilization": 0.8}

    async def sample() -> dict:
        engine = make_engine.from_pretrained(args.policy or str(work / "policy"), **options)
        prefixes = [
            engine.tokenizer.encode(f"let {i} be the sum of all x and y. divide by 2. ")
            for i in range(args.num_prompts)
        ]
        try:
            await engine.sample(prefixes[0], 1, [], 8, seed=0)  # warm-up
            start = time.perf_counter()
            found = await asyncio.gather(
                *(
                    engine.sample(ids, args.num_samples, [], args.max_tokens, seed=1000 * i)
                    for i, ids in enumerate(prefixes)
                )
            )
            seconds = time.perf_counter() - start
        finally:
            await engine.close()
        return {"tokens": sum(len(one.token_ids) for samples in found for one in samples), "seconds": seconds}

    return asyncio.run(sample())


def measure_scorer(args: argparse.Namespace, work: Path, vllm: bool) -> dict:
    """Return the seconds to score all candidates, and the scores."""
    import torch

    path = args.reward_model or str(work / "reward_model")
    if vllm:
        from trl_hrm.scoring.vllm_scorer import VLLMScorer

        scorer = VLLMScorer.from_pretrained(path, dtype="bfloat16", gpu_memory_utilization=0.8)
    else:
        from trl_hrm import StepScorer

        options = {} if args.cpu else {"attn_implementation": "flex_attention", "dtype": "bfloat16"}
        scorer = StepScorer.from_pretrained(path, **options)
        if not args.cpu:
            scorer.model.to(torch.device("cuda"))
    problem, candidates = scoring_problem(args, scorer.tokenizer)
    scorer.score([problem], [candidates])  # warm-up
    start = time.perf_counter()
    scores = scorer.score([problem], [candidates])[0]
    return {"seconds": time.perf_counter() - start, "scores": [[float(one) for one in steps] for steps in scores]}


def engine_table(args: argparse.Namespace, results: dict[str, dict]) -> str:
    generation, forest = results["generation"], results["forest scorer"]
    engine = "transformers engine" if args.cpu else "vLLM"
    lines = [
        f"{args.num_prompts} problems, {args.num_samples} samples each, at most {args.max_tokens} tokens, from "
        f"{args.policy or 'a policy with random weights'}: {generation['tokens']:,} tokens in {generation['seconds']:.1f} s, "
        f"{generation['tokens'] / generation['seconds']:,.0f} tokens/s ({engine}).",
        "",
        f"{args.num_candidates} candidates of 9 steps, 6 of them shared, and {args.reward_model or 'a reward model with random weights'}:",
        "",
        "| scorer | seconds | candidates/s | largest difference of scores |",
        "|---|---|---|---|",
        f"| StepScorer | {forest['seconds']:.2f} | {args.num_candidates / forest['seconds']:,.0f} |  |",
    ]
    if "vllm scorer" in results:
        other = results["vllm scorer"]
        gap = max(
            abs(a - b)
            for x, y in zip(forest["scores"], other["scores"], strict=True)
            for a, b in zip(x, y, strict=True)
        )
        lines.append(
            f"| VLLMScorer | {other['seconds']:.2f} | {args.num_candidates / other['seconds']:,.0f} | {gap:.1e} |"
        )
    return "\n".join(lines)


# All parts


def run_script(name: str, words: list[str], left: float) -> tuple[str, dict]:
    """Run one script of this folder within the seconds that are left. Return its output, and its last line of JSON, if any."""
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=max(left, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # also its workers, which would keep the GPU
        process.communicate()
        raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{errors[-4000:]}")
    found = [line for line in output.splitlines() if line.startswith("{")]
    return output.strip(), json.loads(found[-1]) if found else {}


def run_part(part: str, args: argparse.Namespace, work: Path) -> tuple[str, dict]:
    """Return the Markdown and the results of one part."""
    start = time.perf_counter()

    def left() -> float:
        return args.limit - (time.perf_counter() - start)

    if part in SCRIPTS:
        words = shlex.split((CPU_OPTIONS if args.cpu else GPU_OPTIONS)[part])
        if part != "kl":
            words += [f"--shape={args.shape}", f"--json={work / part}.json"]
        if part in ("training", "scoring") and args.peak_tflops:
            words.append(f"--peak_tflops={args.peak_tflops}")
        if part == "training":
            words += [f"--{name}={value}" for name in ("data", "trl_1_13") if (value := getattr(args, name))]
        text, _ = run_script(SCRIPTS[part], words, left())
        file = work / f"{part}.json"
        return text, json.loads(file.read_text()) if file.exists() else {}
    skipped = ("worker", "work", "parts", "output", "cpu", "limit")
    words = [f"--{name}={value}" for name, value in vars(args).items() if name not in skipped and value is not None]
    words += [f"--output={args.output}", f"--work={work}"] + ["--cpu"] * args.cpu
    if part == "exactness":
        _, result = run_script("gpu", [*words, "--worker=exactness"], left())
        return exactness_table(result), result
    save_models(args, work)
    workers = ["generation", "forest scorer"] + ["vllm scorer"] * (not args.cpu)
    results = {name: run_script("gpu", [*words, f"--worker={name}"], left())[1] for name in workers}
    return engine_table(args, results), results


def main() -> int:
    args = make_parser().parse_args()
    args.shape = args.shape or ("tiny" if args.cpu else "qwen2.5-math-1.5b")
    if args.worker:
        if args.cpu:
            import torch

            torch.set_num_threads(1)
        work = Path(args.work)
        result = {
            "exactness": lambda: measure_exactness(args),
            "generation": lambda: measure_generation(args, work),
            "vllm scorer": lambda: measure_scorer(args, work, vllm=True),
            "forest scorer": lambda: measure_scorer(args, work, vllm=False),
        }[args.worker]()
        print("\n" + json.dumps(result))
        return 0
    import torch

    if not args.cpu and not torch.cuda.is_available():
        print(
            "gpu.py: no GPU found. Run it on a machine with a GPU, or use --cpu to test the script.", file=sys.stderr
        )
        return 1
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    line = where_and_when(PACKAGES, gpu=not args.cpu)
    sections, results, failed = [f"# {'CPU, to test the script' if args.cpu else 'GPU'}\n\n{line}"], {"line": line}, []
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            start = time.perf_counter()
            try:
                text, results[part] = run_part(part, args, Path(folder))
            except subprocess.TimeoutExpired:
                text, results[part] = f"Not measured: stopped after {args.limit:.0f} s.", {}
                failed.append(part)
            except RuntimeError as error:
                text, results[part] = f"Not measured: it failed.\n\n```\n{error}\n```", {}
                failed.append(part)
            print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            sections.append(f"## {part}\n\n{text}")
            # after each part, so that a lost machine does not lose the parts before
            (output / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
            (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(sections))
    if failed:
        print(f"gpu.py: {', '.join(failed)} not measured. The reasons are in {output / 'report.md'}.", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
