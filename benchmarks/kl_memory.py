"""
Memory and time of the KL term of KLSelfTrainer, with the vocabulary of Qwen2.5 (151,936 tokens).

    python benchmarks/kl_memory.py
    python benchmarks/kl_memory.py --loss_tokens 1024 --step_tokens 256 --rounds 1

Memory: memory added by the forward and backward pass of a loss over `--loss_tokens` tokens, in a process that already holds hidden states
and heads. LM is the language-model loss of TRL's fused head.

- `LM + KL, full logits`: all logits of policy and reference, in plain torch.
- `KL, TRL's tiles` and `LM, TRL's tiles`: tiles of 4,096 tokens x 32,768 logits.
- `KL, trl_hrm`, `LM, trl_hrm`, `LM + KL, trl_hrm`: the narrow tiles that KLSelfTrainer uses without Triton.

Time: training steps of `--step_tokens` tokens with a randomly initialized Qwen2 whose body has ten times the parameters of its head.
Compares SFTTrainer with KLSelfTrainer with a frozen copy and with precomputed states, and both trainers with LoRA, where the reference is
the policy with its adapter disabled. KLSelfTrainer also uses narrow tiles for the language-model loss. `SFT, narrow tiles` shows the effect
of this alone. Every measurement runs in a separate process, and the systems alternate. The first step is not measured.

Times are CPU seconds of one thread. With `--gpu`: wall time, bfloat16 on one GPU, GPU memory, and a larger model.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable

from common import now, peak, reset_peak, run_worker, where_and_when


LOSSES = [
    "LM + KL, full logits",
    "LM, TRL's tiles",
    "KL, TRL's tiles",
    "LM, trl_hrm",
    "KL, trl_hrm",
    "LM + KL, trl_hrm",
]
STEPS = [
    "SFT",
    "SFT, narrow tiles",
    "KL, frozen copy",
    "KL, precomputed states",
    "LoRA: SFT",
    "LoRA: KL, adapter off",
]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss_tokens", type=int, default=4096, help="number of tokens in the loss (default: 4096)")
    parser.add_argument(
        "--step_tokens", type=int, default=512, help="number of tokens per training step (default: 512)"
    )
    parser.add_argument("--hidden_size", type=int, default=512, help="hidden size of heads and model (default: 512)")
    parser.add_argument(
        "--vocab_size", type=int, default=151_936, help="size of the vocabulary (default: %(default)s)"
    )
    parser.add_argument("--num_steps", type=int, default=2, help="training steps per run (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs per system (default: 3)")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["memory", "time"],
        default=["memory", "time"],
        help="parts to run (default: both)",
    )
    parser.add_argument("--gpu", action="store_true", help="bfloat16 on one GPU")
    parser.add_argument("--worker", choices=LOSSES + STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser


# Memory of a loss


def measure_loss(args: argparse.Namespace) -> dict:
    import torch

    import trl_hrm.kl  # noqa: F401

    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if args.gpu else ("cpu", torch.float32)
    options = {"device": device, "dtype": dtype}
    weight = torch.randn(args.vocab_size, args.hidden_size, **options) * args.hidden_size**-0.5
    hidden = torch.randn(args.loss_tokens, args.hidden_size, **options)
    ref_weight, ref_hidden = weight + 0.01, hidden + 0.05 * torch.randn_like(hidden)
    targets = torch.randint(0, args.vocab_size, (args.loss_tokens,), device=device)
    for leaf in (weight, hidden):
        leaf.requires_grad_()
        leaf.grad = torch.zeros_like(leaf)  # as if accumulated from an earlier micro-batch
    loss = {
        "LM + KL, full logits": full_loss,
        "LM, TRL's tiles": lambda *inputs: lm_loss(*inputs, tile=32_768),
        "KL, TRL's tiles": lambda *inputs: kl_loss(*inputs, tile=32_768),
        "LM, trl_hrm": lm_loss,
        "KL, trl_hrm": kl_loss,
        "LM + KL, trl_hrm": lambda *inputs: lm_loss(*inputs) + kl_loss(*inputs),
    }[args.worker]
    before = reset_peak(args.gpu)
    start = now(args.gpu)
    loss(hidden, weight, ref_hidden, ref_weight, targets).backward()
    return {"seconds": now(args.gpu) - start, "bytes": peak(args.gpu) - before}


def full_loss(hidden, weight, ref_hidden, ref_weight, targets):
    import torch

    with torch.no_grad():
        reference = (ref_hidden @ ref_weight.T).float().log_softmax(-1)
    policy = (hidden @ weight.T).float().log_softmax(-1)
    kl = (reference.exp() * (reference - policy)).sum()
    return 0.5 * torch.log1p(kl) - policy.gather(1, targets[:, None]).mean()


def kl_loss(hidden, weight, ref_hidden, ref_weight, targets, tile: int | None = None):
    from trl_hrm import kl

    if tile is not None:
        kl.LOGITS_PER_TILE = tile
    divergence = kl.token_kl(hidden, kl.LMHead(weight), ref_hidden, kl.LMHead(ref_weight))
    return 0.5 * kl.scaled_kl(divergence.sum())


def lm_loss(hidden, weight, ref_hidden, ref_weight, targets, tile: int | None = None):
    from trl.kernels import ChunkedLogProbFunction

    from trl_hrm.kl import LOGITS_PER_TILE

    # Same call as in TRL's fused head for SFTTrainer. On a GPU with Triton, KLSelfTrainer keeps TRL's tiles
    tile = tile or (32_768 if hidden.is_cuda else LOGITS_PER_TILE)
    outputs = ("log_probs", "entropy", "is_top1")
    log_probs, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, tile, None, 1.0, outputs)
    return -log_probs.mean()


# Time of a step


def measure_steps(args: argparse.Namespace) -> dict:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.utils import logging
    from trl import SFTConfig, SFTTrainer

    from trl_hrm import KLSelfConfig, KLSelfTrainer
    from trl_hrm._compat import trainer_utils
    from trl_hrm.kl import LOGITS_PER_TILE
    from trl_hrm.tiny_model import make_tokenizer

    logging.set_verbosity_error()
    model = make_model(args)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    head = sizes["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, args.vocab_size, (args.num_steps + 1, args.step_tokens), generator=generator).tolist()
    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *unused, **kwargs):
            self.start = now(args.gpu)

        def on_step_end(self, *unused, **kwargs):  # since the last step, to include loading the batch
            end = now(args.gpu)
            times.append(end - self.start)
            self.start = end

    settings = {
        "output_dir": args.work,
        "use_cpu": not args.gpu,
        "bf16": args.gpu,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    kwargs = {
        "train_dataset": Dataset.from_dict({"input_ids": rows, "labels": rows}),
        "processing_class": make_tokenizer(["0 1 2 3"] * 3, 300),
        "callbacks": [Clock()],
    }
    if args.worker.startswith("LoRA"):
        from peft import LoraConfig

        kwargs["peft_config"] = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    if "SFT" in args.worker:
        trainer = SFTTrainer(model, SFTConfig(**settings), **kwargs)
        if "narrow" in args.worker:
            trainer_utils._CHUNKED_LOGPROB_CHUNK_SIZE = LOGITS_PER_TILE
    else:
        config = KLSelfConfig(**settings, precompute_ref_hidden="precomputed" in args.worker)
        trainer = KLSelfTrainer(model, config, **kwargs)
    reset_peak(args.gpu)
    trainer.train()
    seconds = statistics.median(times[1:])
    return {"seconds": seconds, "bytes": peak(args.gpu), "body": sum(sizes.values()) - head, "head": head}


def make_model(args: argparse.Namespace):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    width = args.hidden_size
    num_layers = 24 if args.gpu else 10
    # one layer has 10 / num_layers times the parameters of the head, including attention
    intermediate = round((10 * args.vocab_size / num_layers - 2.5 * width) / 3 / 64) * 64
    config = Qwen2Config(
        vocab_size=args.vocab_size,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 256, 1),
        tie_word_embeddings=True,
    )
    set_seed(0)
    return Qwen2ForCausalLM(config).to(torch.bfloat16 if args.gpu else torch.float32)


# All measurements


def run_system(system: str, args: argparse.Namespace) -> dict:
    options = {
        name: value for name, value in vars(args).items() if name not in ("parts", "gpu", "worker", "work", "json")
    }
    words = [f"--{name}={value}" for name, value in options.items()] + ["--gpu"] * args.gpu
    with tempfile.TemporaryDirectory() as work:
        return run_worker(__file__, [*words, f"--worker={system}", f"--work={work}"])


def main() -> None:
    args = make_parser().parse_args()
    if args.worker:
        if not args.gpu:
            import torch

            torch.set_num_threads(1)
        print(json.dumps(measure_loss(args) if args.worker in LOSSES else measure_steps(args)))
        return
    systems = (LOSSES if "memory" in args.parts else []) + (STEPS if "time" in args.parts else [])
    results = {system: [] for system in systems}
    for number in range(args.rounds):
        for system in results:
            results[system].append(run_system(system, args))
            run = results[system][-1]
            print(
                f"round {number + 1}/{args.rounds}  {system:<24} {run['seconds']:7.1f} s  {run['bytes'] / 1e9:6.2f} GB",
                file=sys.stderr,
                flush=True,
            )
    print(report(args, results))


def report(args: argparse.Namespace, results: dict[str, list[dict]]) -> str:
    def median(system: str, what: str) -> float:
        return statistics.median(run[what] for run in results[system])

    lines = memory_table(args, median) if "memory" in args.parts else []
    lines += time_table(args, results, median) if "time" in args.parts else []
    return "\n".join([*lines, where_and_when(("torch", "transformers", "trl", "accelerate", "peft"), args.gpu)])


def memory_table(args: argparse.Namespace, median: Callable[[str, str], float]) -> list[str]:
    full = median(LOSSES[0], "bytes")
    lines = [
        f"Loss of {args.loss_tokens:,} tokens, vocabulary {args.vocab_size:,}, hidden size {args.hidden_size}:",
        "",
        "| loss | added memory, GB | relative to full logits | seconds (median) |",
        "|---|---|---|---|",
    ]
    for system in LOSSES:
        added = median(system, "bytes")
        lines.append(f"| {system} | {added / 1e9:.2f} | 1/{full / added:.1f} | {median(system, 'seconds'):.1f} |")
    return [*lines, ""]


def time_table(
    args: argparse.Namespace, results: dict[str, list[dict]], median: Callable[[str, str], float]
) -> list[str]:
    sizes = results["SFT"][0]
    lines = [
        f"Training steps of {args.step_tokens} tokens, head of {sizes['head'] / 1e6:.0f}M parameters, body of "
        f"{sizes['body'] / 1e6:.0f}M ({sizes['body'] / sizes['head']:.1f} to 1), {args.rounds} runs:",
        "",
        "| step | seconds (median; all) | relative to SFT | peak memory, GB |",
        "|---|---|---|---|",
    ]
    for system in STEPS:
        base = median("LoRA: SFT" if system.startswith("LoRA") else "SFT", "seconds")
        every = ", ".join(f"{run['seconds']:.2f}" for run in results[system])
        seconds = median(system, "seconds")
        memory = median(system, "bytes") / 1e9
        lines.append(f"| {system} | {seconds:.2f} ({every}) | {seconds / base:.2f}× | {memory:.2f} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
