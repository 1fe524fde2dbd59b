"""Models of a given shape, clocks, peak memory, versions and sections of pages, for several benchmarks."""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


# Sizes of published models. "tiny" has the options --hidden_size and --num_layers, and the vocabulary of its tokenizer
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"architecture": "qwen2"},
    "smollm2": {  # SmolLM2-135M
        "architecture": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    },
    "qwen2.5-math-1.5b": {
        "architecture": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    },
}
# Dense bfloat16 FLOPs per second with 32-bit sums, from the data sheets, by the start of `torch.cuda.get_device_name()`
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def make_model(
    shape: str,
    vocab_size: int,
    kind: str = "token",
    hidden_size: int = 384,
    num_layers: int = 4,
    num_positions: int = 8192,
    wide_init: bool = False,
    own_vocabulary: bool = True,
    seed: int = 0,
):
    """
    Return a model with random weights in float32.

    Args:
        shape (`str`):
            Key of `SHAPES`.
        vocab_size (`int`):
            Number of tokens of the tokenizer.
        kind (`str`, *optional*, defaults to `"token"`):
            `"token"`: token classifier with two classes. `"causal"`: language model.
        hidden_size, num_layers (`int`, *optional*):
            Sizes of the shape `"tiny"`.
        num_positions (`int`, *optional*, defaults to `8192`):
            Lower bound of `max_position_embeddings`.
        wide_init (`bool`, *optional*, defaults to `False`):
            Whether to draw weights with the standard deviation hidden_size^-0.5, so that scores differ between inputs.
        own_vocabulary (`bool`, *optional*, defaults to `True`):
            Whether published shapes keep their own larger vocabulary. A policy must only have the tokens of its tokenizer, because it
            would sample others.
        seed (`int`, *optional*, defaults to `0`):
            Seed for the weights.
    """
    import transformers

    options = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 11 // 4,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(1, hidden_size // 64),
        "num_key_value_heads": max(1, hidden_size // 256),
        "max_position_embeddings": 8192,
    } | SHAPES[shape]
    if not own_vocabulary:
        options["vocab_size"] = vocab_size
    name = {"qwen2": "Qwen2", "llama": "Llama"}[options.pop("architecture")]
    if options["vocab_size"] < vocab_size:
        raise ValueError(
            f"The shape {shape} has a vocabulary of {options['vocab_size']} tokens, but the tokenizer has {vocab_size}."
        )
    options["max_position_embeddings"] = max(options["max_position_embeddings"], num_positions)
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": options.pop("rope_theta", 10_000.0)}
    if wide_init:
        options["initializer_range"] = options["hidden_size"] ** -0.5
    config = getattr(transformers, f"{name}Config")(
        **options,
        num_labels=2,
        classifier_dropout=0.0,  # otherwise, the gradients of two systems differ
        use_cache=kind == "causal",
    )
    transformers.set_seed(seed)
    suffix = {"token": "ForTokenClassification", "causal": "ForCausalLM"}[kind]
    return getattr(transformers, f"{name}{suffix}")(config)


def describe_shape(shape: str, model) -> str:
    """Return the architecture and the size of a model in words."""
    config = model.config
    count = sum(weight.numel() for weight in model.parameters())
    return (
        f"{type(model).__name__} with random weights, shape {shape}: hidden size {config.hidden_size}, "
        f"{config.num_hidden_layers} layers, {count / 1e6:,.{int(count < 1e7)}f}M parameters"
    )


def num_compute_parameters(model) -> int:
    """Return the number of parameters without the input embeddings, which are looked up and not multiplied."""
    return sum(weight.numel() for weight in model.parameters()) - model.get_input_embeddings().weight.numel()


def model_flops(num_parameters: int, num_tokens: int, training: bool) -> int:
    """Return 6·N·T for training and 2·N·T for a forward pass. Attention scores are not counted."""
    return (6 if training else 2) * num_parameters * num_tokens


def peak_flops(name: str | None) -> float | None:
    """Return the peak of a card by its name, or `None` if it is not in `PEAK_FLOPS`."""
    known = [start for start in PEAK_FLOPS if name and (name == start or name.startswith((f"{start} ", f"{start}-")))]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model, the GPU and the file of results."""
    parser.add_argument(
        "--shape", choices=SHAPES, help="shape of the model (default: tiny, with --gpu qwen2.5-math-1.5b)"
    )
    parser.add_argument("--hidden_size", type=int, default=384, help="hidden size of the tiny shape (default: 384)")
    parser.add_argument("--num_layers", type=int, default=4, help="number of layers of the tiny shape (default: 4)")
    parser.add_argument("--gpu", action="store_true", help="one GPU, bf16, flex attention")
    parser.add_argument(
        "--peak_tflops", type=float, help="peak of the card in bf16 (default: by the name of the card)"
    )
    parser.add_argument("--json", help="file for the results as JSON")


def card_peak(args: argparse.Namespace) -> float | None:
    """Return the FLOPs per second of `--peak_tflops`, or of the card that is used. `None` on a CPU or an unknown card."""
    return 1e12 * args.peak_tflops if args.peak_tflops else peak_flops(card_name() if args.gpu else None)


class EqualGrader:
    """Grades every answer as right, because grading is not measured."""

    class Right:
        correct = True
        status = "graded"

    async def agrade(self, answer: str, reference: str) -> Right:
        return self.Right()


# Clocks and memory


def now(gpu: bool) -> float:
    """Return the wall time on a GPU, and the CPU time of this process on a CPU, which other programs disturb less. In seconds."""
    if gpu:
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def reset_peak(gpu: bool) -> int:
    """Reset the peak memory, and return the memory in use in bytes."""
    import torch

    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise, freed memory of earlier measurements counts as in use
    Path("/proc/self/clear_refs").write_text("5")
    return peak(gpu)


def peak(gpu: bool) -> int:
    """Return the peak GPU or resident memory of this process since [`reset_peak`], in bytes."""
    import torch

    if gpu:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# Processes and reports


def run_worker(script: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a script in a process of its own, and return the JSON object in the last line of its output."""
    command = [sys.executable, script, *arguments]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def card_name() -> str | None:
    """Return the name of the first GPU, or `None` without a GPU."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def driver_version() -> str | None:
    """Return the version of the GPU driver from `nvidia-smi`, or `None` if it cannot be run."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.splitlines()[0].strip()


def where_and_when(packages: Sequence[str], gpu: bool) -> str:
    """Return the date, the versions of installed packages, and the hardware."""
    import torch

    if gpu:
        hardware = f"{card_name()}, driver {driver_version() or 'unknown'}, CUDA {torch.version.cuda}"
    else:
        hardware = "CPU seconds of one thread"
    return f"{time.strftime('%Y-%m-%d')}; {version_words(packages)}; Python {platform.python_version()}; {hardware}."


def installed_version(package: str) -> str | None:
    """Return the version of a package, or `None` if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_words(versions: Mapping[str, str] | Sequence[str]) -> str:
    """Return versions in words, such as `torch 2.8.0, trl 1.16.0`: those of a mapping, or those of installed packages."""
    if not isinstance(versions, Mapping):
        versions = {name: found for name in versions if (found := installed_version(name))}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that train and evaluate models."""
    names = ("torch", "transformers", "trl", "accelerate", "datasets", "trl-hrm")
    return {"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def find_section(page: str, heading: str) -> str:
    """Return the section of a page with a heading, such as `## Results`, or an empty text."""
    found = re.search(rf"^{re.escape(heading)}\n.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found.group().strip() + "\n" if found else ""


def save_section(folder: Path, section: str, docs: str | None, heading: str) -> None:
    """Print a section, save it as `results.md` in a folder, and replace it in the page `docs`."""
    (folder / "results.md").write_text(section, encoding="utf-8")
    if docs:
        page = Path(docs)
        page.write_text(replace_section(page.read_text(encoding="utf-8"), section, heading), encoding="utf-8")
    print(section)


def replace_section(page: str, section: str, heading: str) -> str:
    """Replace the section of a page. A page without it gets it before its last section."""
    old = find_section(page, heading)
    if old:
        return page.replace(old, section)
    before, mark, last = page.rpartition("\n## ")
    return f"{before}\n{section}{mark}{last}"
