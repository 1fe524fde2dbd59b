"""From the command line of `trl-hrm annotate` to prompt, search and engine."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..search.full_tree import FullTree
from ..search.prompts import PROMPTS, Prompt
from ..search.puct import PUCT
from ..search.rollouts import Rollouts
from ..search.root_filter import RootFilter
from ..search.shards import Shard, show_own_gpu
from ..search.steps import RULES, StepRule, regex_rule


_BUDGET = ("max_sequences", "max_tokens")
SEARCH_OPTIONS = {
    "full_tree": ("num_children", "max_depth", "max_step_tokens", *_BUDGET),
    "rollouts": ("num_solutions", "num_completions", "max_solution_tokens", *_BUDGET),
    "puct": ("num_completions", "max_selections", "c_puct", "max_solution_tokens", *_BUDGET),
}
ENGINE_OPTIONS = {
    "vllm": ("dtype", "engine_args"),
    "transformers": ("dtype", "batch_size"),
    "openai": ("base_urls", "api", "tokenizer", "request_timeout", "max_retries"),
}


def make_prompt(args: argparse.Namespace) -> tuple[Prompt, StepRule]:
    """The prompt and the rule that tells steps apart."""
    if args.prompt in PROMPTS:
        prompt = PROMPTS[args.prompt]
    elif Path(args.prompt).is_file():
        prompt = Prompt(args.prompt, Path(args.prompt).read_text(encoding="utf-8"), rule="blank_line")
    else:
        raise ValueError(
            f"--prompt is {args.prompt!r}, expected {', '.join(PROMPTS)}, or a file with {{question}} in it."
        )
    final_stops = prompt.final_stops if args.final_stops is None else tuple(args.final_stops)
    prompt = replace(
        prompt,
        style=args.prompt_style,
        system_prompt=args.system_prompt,
        final_stops=final_stops,
        chat_template_kwargs=None if args.chat_template_kwargs == {} else args.chat_template_kwargs,
        chat_template_date=args.chat_template_date,
    )
    if (args.segmentation == "regex") != (args.step_pattern is not None):
        raise ValueError("--segmentation regex and --step_pattern go together, and one of them is missing.")
    rule = regex_rule(args.step_pattern) if args.step_pattern else RULES[args.segmentation or prompt.rule]
    return replace(prompt, rule=rule.name), rule


def make_search(args: argparse.Namespace, prompt: Prompt, rule: StepRule) -> Any:
    """The search, behind the root filter if one is asked for."""
    given = _given(args, SEARCH_OPTIONS, "search")
    if args.root_filter is None:
        return _search(args, prompt, rule, given)
    filtered = {"max_solution_tokens": given.pop("max_solution_tokens")} if "max_solution_tokens" in given else {}
    kept = given if args.search == "full_tree" else given | filtered
    return RootFilter(_search(args, prompt, rule, kept), args.root_filter, prompt.final_stops, **filtered)


def _search(args: argparse.Namespace, prompt: Prompt, rule: StepRule, given: dict[str, Any]) -> Any:
    if args.search == "full_tree":
        return FullTree(rule, prompt.final_stops, seed=args.seed, **given)
    if args.search == "rollouts":
        return Rollouts(prompt.final_stops, seed=args.seed, **given)
    return PUCT(prompt.final_stops, **given)


def make_engine(args: argparse.Namespace, shard: Shard) -> Any:
    """The engine, on this process's own GPU when several processes were launched."""
    given = _given(args, ENGINE_OPTIONS, "engine")
    given |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "revision": args.revision}
    if args.engine == "openai":
        from transformers import AutoTokenizer

        from ..search.openai_engine import OpenAIEngine

        if "base_urls" not in given:
            raise ValueError("--engine openai needs the addresses of its servers: --base_urls http://host:8000/v1 ...")
        if "request_timeout" in given:
            given["timeout"] = given.pop("request_timeout")
        tokenizer = AutoTokenizer.from_pretrained(given.pop("tokenizer", args.policy), revision=args.revision)
        return OpenAIEngine(given.pop("base_urls"), args.policy, tokenizer, **given)
    if args.engine == "vllm":
        from ..search.vllm_engine import VLLMEngine

        if shard.local is not None:
            show_own_gpu(shard.local)
        return VLLMEngine.from_pretrained(args.policy, **given.pop("engine_args", {}), **given)
    import torch

    from ..search.transformers_engine import TransformersEngine

    device = None
    if shard.local is not None and torch.accelerator.is_available():
        device = torch.device(torch.accelerator.current_accelerator().type, shard.local)
    return TransformersEngine.from_pretrained(args.policy, device=device, **given)


def _given(args: argparse.Namespace, options: dict[str, tuple[str, ...]], kind: str) -> dict[str, Any]:
    """The options that were given. One that goes with another search or engine is an error: it would do nothing."""
    chosen = getattr(args, kind)
    found = {}
    for name in dict.fromkeys(name for names in options.values() for name in names):
        value = getattr(args, name)
        if value is None:
            continue
        used = name in options[chosen] or (name == "max_solution_tokens" and args.root_filter is not None)
        if not used:
            others = " and ".join(key for key, names in options.items() if name in names)
            raise ValueError(f"--{name} goes with --{kind} {others}, and --{kind} is {chosen}. Leave it out.")
        found[name] = value
    return found
