"""
Check that a step reward model gives the same scores with StepScorer, the transformers pipeline and `vllm serve`.

    python recipes/serve_and_score.py --model me/my-hrm --input solutions.jsonl

Without `--url`, the script starts `vllm serve` if vLLM is installed, and stops it at the end. Options after `--` are passed to that
server, for example `-- --max-model-len 4096`. Exits with 1 if two scores of a step differ by more than `--tolerance`.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trl_hrm import StepFormat, StepTree


def main(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from trl_hrm import StepScorer
    from trl_hrm.scoring.http_scorer import ServerScorer
    from trl_hrm.scoring.tree_scorer import read_text_contract

    if args.url is not None and args.server_args:
        raise ValueError(
            f"{args.server_args} are options for starting a server, but --url uses a running server. Remove one of them."
        )
    if args.url is None and args.served_model_name is not None:
        raise ValueError("--served_model_name has no effect without --url.")
    logging.disable_progress_bar()
    chains = read_chains(args.input)
    tokenizer, step_format = read_text_contract(args.model, None, None, False)
    columns = {"StepScorer": StepScorer.from_pretrained(args.model).score_trees(chains)}
    if step_format.head != "classification" or step_format.tokenization != "pieces":
        print(
            f"pipeline: skipped, because it supports only the head 'classification' (found {step_format.head!r}) and the "
            f"tokenization 'pieces' (found {step_format.tokenization!r})."
        )
    else:
        columns["pipeline"] = pipeline_scores(args.model, tokenizer, step_format, chains)
    if args.url is not None:
        scorer = ServerScorer.from_pretrained(args.model, args.url, served_model_name=args.served_model_name)
        columns["vllm serve"] = scorer.score_trees(chains)
    elif find_spec("vllm") is None:
        print('vllm serve: skipped, because vLLM is not installed. Run `pip install "trl-hrm[vllm]"`, or set --url.')
    else:
        with vllm_server(args.model, args.server_args, step_format.head) as url:
            columns["vllm serve"] = ServerScorer.from_pretrained(args.model, url).score_trees(chains)

    if len(columns) == 1:
        raise ValueError("There is nothing to compare the scores of StepScorer with. Install vLLM, or set --url.")
    print(format_table(chains, columns))
    differences = largest_differences(columns)
    print("\nLargest difference from StepScorer: " + ", ".join(f"{n} {d:.1e}" for n, d in differences.items()))
    if not all(difference <= args.tolerance for difference in differences.values()):  # also fails for NaN
        raise ValueError(
            f"Scores differ by more than {args.tolerance:g} (--tolerance). Check that dtype, revision and checkpoint are the same."
        )


def read_chains(path: str) -> "list[StepTree]":
    """Return all solutions in a JSON Lines file. A row with `parents` is a tree with several solutions."""
    from trl_hrm import StepTree
    from trl_hrm.data.sources import JsonLines

    rows = JsonLines([path])
    chains = []
    for chunk in rows.chunks():
        for where, _, row in rows.read(chunk):
            chains += StepTree.from_row({"labels": [None] * len(row.get("completions", ())), **row}, where).chains()
    if not chains:
        raise ValueError(f"{path} has no solutions. Expected JSON Lines with `prompt` and `completions`.")
    return chains


def pipeline_scores(
    model: str, tokenizer: "PreTrainedTokenizerBase", step_format: "StepFormat", chains: "Sequence[StepTree]"
) -> list[list[float]]:
    """
    Return the step scores from `pipeline("token-classification")`.

    Raises:
        `ValueError`: If the pipeline encodes a solution differently than training did.
    """
    import torch
    from transformers import pipeline

    classifier = pipeline("token-classification", model, tokenizer=tokenizer, dtype=torch.float32)
    right = classifier.model.config.id2label[1]
    scores = []
    for chain in chains:
        ids, step_ids = step_format.encode(tokenizer, chain.prompt, chain.completions)
        places = []
        for more in step_ids:
            ids += more
            places.append(len(ids) - 1)
        words = words_of(tokenizer, step_format, chain.prompt, chain.completions)
        if tokenizer(words, is_split_into_words=True, truncation=True)["input_ids"][: len(ids)] != ids:
            raise ValueError(
                f"{model}: the pipeline encodes a solution differently than training did, or truncates it to "
                f"{tokenizer.model_max_length} tokens. Call the model with token ids, as shown in "
                "docs/scoring_without_trl_hrm.md."
            )
        [tokens] = classifier([words], is_split_into_words=True)
        found = {token["index"]: token for token in tokens}
        scores.append([_probability(found[place], right) for place in places])
    return scores


def words_of(
    tokenizer: "PreTrainedTokenizerBase", step_format: "StepFormat", prompt: str, steps: Sequence[str]
) -> list[str]:
    """Return a solution as words. The pipeline encodes each word separately, as training did with prompt, steps and separators."""
    adds_bos = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    prompt = step_format.prompt_template.replace("{problem}", prompt)
    if step_format.prompt_style == "chat":
        system = (
            [] if step_format.system_prompt is None else [{"role": "system", "content": step_format.system_prompt}]
        )
        messages = [*system, {"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        words = [text.removeprefix(tokenizer.bos_token) if adds_bos else text]
    else:
        words = [prompt] if adds_bos or tokenizer.bos_token is None else [tokenizer.bos_token, prompt]
    for number, step in enumerate(steps, start=1):
        prefix = step_format.step_prefix.replace("{number}", str(number))
        text = step if step.startswith(prefix) else prefix + step
        words += [text, step_format.step_separator, step_format.step_suffix]
    return [word for word in words if word]


def _probability(token: dict, right: str) -> float:
    """Return the probability of label `right`. The pipeline only returns the more probable label and its probability."""
    return float(token["score"] if token["entity"] == right else 1 - token["score"])


@contextmanager
def vllm_server(model: str, server_args: Sequence[str], head: str = "classification") -> Iterator[str]:
    """
    Run `vllm serve MODEL` with the options for the head until the end of the block.

    Args:
        model (`str`):
            Path or Hub id of the reward model.
        server_args (`Sequence[str]`):
            Additional options of `vllm serve`.
        head (`str`, *optional*, defaults to `"classification"`):
            Head of the step format.

    Yields:
        `str`: The address of the server, once it responds.

    Raises:
        `OSError`: If the server exits before it responds. The message has the end of its log.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    if head != "lm":
        command += ["--runner", "pooling", "--pooler-config", '{"pooling_type": "ALL"}']
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), *server_args]
    with tempfile.NamedTemporaryFile(prefix="vllm-serve-", suffix=".log") as log:
        environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            print(f"Starting vLLM. Its log is in {log.name}.", flush=True)
            while not _answers(f"{url}/health"):
                if process.poll() is not None:
                    with open(log.name, encoding="utf-8", errors="replace") as text:
                        end = text.read()[-3000:]
                    raise OSError(f"`vllm serve` exited with code {process.returncode}. End of its log:\n{end}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):  # also stop its child processes
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return response.status == 200
    return False


def format_table(chains: "Sequence[StepTree]", columns: dict[str, list[list[float]]]) -> str:
    """Return a table of prompts and their steps, with one column of scores per name."""
    lines = []
    for i, chain in enumerate(chains):
        lines += [chain.prompt, "  " + "".join(f"{name:>12}" for name in columns) + "  step"]
        for j, text in enumerate(chain.completions):
            lines.append("  " + "".join(f"{s[i][j]:>12.6f}" for s in columns.values()) + f"  {' '.join(text.split())}")
    return "\n".join(lines)


def largest_differences(columns: dict[str, list[list[float]]]) -> dict[str, float]:
    """Return the largest absolute difference between each column and the first one."""
    import numpy as np

    first, *others = (np.concatenate(column) for column in columns.values())
    return {name: float(np.abs(values - first).max()) for name, values in zip(list(columns)[1:], others, strict=True)}


def make_parser() -> argparse.ArgumentParser:
    from trl_hrm.command_parser import HelpFormatter

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the reward model (required)")
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="JSON Lines file of solutions with `prompt`, `completions` and optional `parents`, as for `trl-hrm score` "
        "(required)",
    )
    parser.add_argument(
        "--url", help="address of a running `vllm serve MODEL --dtype float32` with the options for the head"
    )
    parser.add_argument("--served_model_name", metavar="NAME", help="name of the model on the server at --url")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="maximum difference between two scores of a step"
    )
    parser.add_argument("server_args", nargs="*", metavar="-- ...", help="options for the `vllm serve` to start")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    try:
        main(make_parser().parse_args())
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
