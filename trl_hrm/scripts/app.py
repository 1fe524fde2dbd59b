"""
Try reward models in the browser: paste a problem and a solution, and see its steps coloured by their scores.

```bash
trl-hrm app --reward_model outputs/hrm
trl-hrm app --reward_model outputs/hrm Qwen/Qwen2.5-Math-PRM-7B --spans 1 2
```
"""

import os
import socket
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..data.sources import parse_columns
from ..scoring.reward_model_config import RewardModelConfig, RewardModelsConfig
from ..search.segmentation_config import SegmentationConfig
from ..search.steps import RULES, StepRule, cut_text, regex_rule
from ..terminal import one_line, plain, say


if TYPE_CHECKING:
    import gradio

    from ..scoring.generative_scorer import GenerativeScorer
    from ..scoring.tree_scorer import TreeScorer


MAX_CHARACTERS = 200_000  # of a problem and a solution. Tokenizing millions would block the server for everyone
MAX_STEPS = 1000
MAX_MODELS = 26  # named by a letter
NUM_EXAMPLES = 100
FONTS = [
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "sans-serif",
]  # of the system: none is loaded from another server
SEGMENTATIONS = {
    "blank_line": "blank line",
    "line": "line",
    "step_header": "step header, such as “Step 2:”",
    "sentence": "sentence",
    "formula": "formula that ends a paragraph",
    "thinking": "thinking of a reasoning model",
    "regex": "the regular expression of the command",
}
# The second step is wrong, and the third corrects it, so that `spans=[1, 2]` has something to show
EXAMPLE = (
    "A triangle has sides of length $5$, $12$ and $13$. What is its area?",
    r"""Since $5^2 + 12^2 = 25 + 144 = 169 = 13^2$, the sides of length $5$ and $12$ are perpendicular.

The area is their product, $5 \cdot 12 = 60$.

Wait, a triangle is only half of the rectangle. The area is \[\frac{1}{2} \cdot 5 \cdot 12 = 30.\]

The answer is $\boxed{30}$.""",
)


@dataclass(kw_only=True)
class AppConfig(SegmentationConfig, RewardModelsConfig):
    """
    Configuration of [`app`]. It also has the fields of [`RewardModelsConfig`] and [`SegmentationConfig`].

    Args:
        segmentation (`str`, *optional*, defaults to `"blank_line"`):
            Rule that splits solutions into steps at first. It can be changed in the page. See [`SegmentationConfig`].
        examples (`str`, *optional*):
            JSON Lines file of solutions for the example button, with the columns `prompt` and `completions` (a list of steps) or
            `completion` (a text). By default, it shows one solution of a geometry problem.
        columns (`dict[str, str]`, *optional*):
            Column of `examples` to read for each expected name, such as `{"completions": "steps"}`, or `completions=steps` on the
            command line.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on. `"0.0.0.0"` lets other machines connect. The page has no password.
        port (`int`, *optional*, defaults to `7860`):
            Port to listen on.
        share (`bool`, *optional*, defaults to `False`):
            Whether to create a public link through gradio's servers.

    Raises:
        `ValueError`: If an option is out of range, or has no effect with the other options.
    """

    segmentation: Literal["step_header", "blank_line", "sentence", "formula", "thinking", "regex"] | None = field(
        default=None,
        metadata={
            "help": "Rule that splits solutions into steps at first. It can be changed in the page (default: blank_line)."
        },
    )
    examples: str | None = field(
        default=None,
        metadata={
            "help": "JSON Lines file of solutions for the example button, with the columns `prompt` and `completions` (a list of steps) "
            "or `completion` (a text) (default: one solution of a geometry problem).",
            "metavar": "FILE",
        },
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Column of --examples to read for each expected name, such as prompt=problem completions=steps.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on. 0.0.0.0 lets other machines connect. The page has no password."},
    )
    port: int = field(default=7860, metadata={"help": "Port to listen on.", "range": "[1, 65535]"})
    share: bool = field(default=False, metadata={"help": "Create a public link through gradio's servers."})

    def __post_init__(self):
        if self.columns is not None:
            self.columns = parse_columns(self.columns)
        super().__post_init__()
        if len(self.reward_model) > MAX_MODELS:
            raise ValueError(
                f"`reward_model` has {len(self.reward_model)} models. The page shows at most {MAX_MODELS} next to each other."
            )
        if self.columns is not None and self.examples is None:
            raise ValueError("`columns` has no effect without `examples`. Set `examples`, or remove `columns`.")

    def rule(self, name: str) -> StepRule:
        """Return the rule with a name in `SEGMENTATIONS`."""
        if name == (self.segmentation or "blank_line"):
            return self.step_rule("blank_line")
        return regex_rule(r"\n") if name == "line" else SegmentationConfig(segmentation=name).step_rule()


class LoadedModel(NamedTuple):
    """A reward model, and how it scores steps."""

    config: RewardModelConfig
    scorer: "TreeScorer | GenerativeScorer"


def app(config: AppConfig) -> None:
    """
    Serve a page that shows the scores of the steps of a solution, until the process is stopped.

    The page loads nothing from other servers, and sends no usage statistics.

    Args:
        config ([`AppConfig`]):
            Reward models and address.

    Raises:
        `ModuleNotFoundError`: If gradio is not installed.
        `OSError`: If the port is in use.
        `FileNotFoundError`, `ValueError`: If a reward model cannot be loaded, or `examples` cannot be read.
    """
    from threading import Event

    _import_gradio()
    examples = read_examples(config)
    host = config.host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:  # before the models are loaded, which takes long
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, config.port))
        except OSError as error:
            raise OSError(
                f"Port {config.port} of {config.host} cannot be used ({error}). Choose another `port`."
            ) from error
    models = load_models(config)
    page, options = build_page(config, models, examples)
    try:
        _, local, shared = page.launch(
            server_name=config.host,
            server_port=config.port,
            share=config.share,
            prevent_thread_lock=True,  # gradio's own waiting would turn Ctrl-C into success
            quiet=True,
            **options,
        )
        say(f"Open {shared or local}. Press Ctrl-C to stop.")
        Event().wait()
    finally:
        page.close(verbose=False)


def load_models(config: AppConfig) -> list[LoadedModel]:
    """Load the reward models of a config. All are checked before the first is loaded."""
    configs = config.scoring_configs()
    for one in configs if len(configs) > 1 else ():
        one.check_reward_model()
    models = [LoadedModel(one, one.load_scorer()) for one in configs]
    for one, scorer in models:
        if one.merges:
            scorer.step_format.check_merged(scorer.tokenizer)
    return models


def read_examples(config: AppConfig) -> list[tuple[str, str]]:
    """
    Return problems and solutions for the example button, at most `NUM_EXAMPLES`.

    Raises:
        `ValueError`: If the file is empty, or a row is invalid or a branching tree. The message has the file and line.
    """
    from itertools import islice

    from ..data.sources import JsonLines, all_rows
    from ..step_tree import StepTree

    if config.examples is None:
        return [EXAMPLE]
    found = []
    rule = config.rule(config.segmentation or "blank_line")
    for where, row in islice(all_rows(JsonLines([config.examples], config.columns or {})), NUM_EXAMPLES):
        steps = row.get("completions")
        if steps is None and isinstance(row.get("completion"), str):
            tree = StepTree.from_row(
                {"prompt": row.get("prompt"), "completions": [row["completion"]], "labels": [None]}, where
            )
            found.append((tree.prompt, row["completion"]))
            continue
        if not isinstance(steps, list):
            raise ValueError(
                f"{where}: expected an object with `prompt`, and with a list `completions` or a text `completion`. For other names, use "
                "--columns."
            )
        tree = StepTree.from_row(row | {"labels": [None] * len(steps)}, where)
        if tree.parents != list(range(-1, len(steps) - 1)):
            raise ValueError(
                f"{where}: this tree branches, but an example is one solution. Remove its `parents`, or the row."
            )
        text = "\n\n".join(tree.completions)
        if cut_text(text, rule) != tree.completions:
            raise ValueError(
                f"{where}: the rule {rule.name} splits these steps into others, whose scores would differ. Choose another --segmentation, "
                "remove white space around the steps, or remove the row."
            )
        found.append((tree.prompt, text))
    return found


def build_page(
    config: AppConfig, models: Sequence[LoadedModel], examples: Sequence[tuple[str, str]] = (EXAMPLE,)
) -> "tuple[gradio.Blocks, dict[str, Any]]":
    """
    Build the page.

    Args:
        config ([`AppConfig`]):
            How solutions are split into steps.
        models (`Sequence[LoadedModel]`):
            Reward models.
        examples (`Sequence[tuple[str, str]]`, *optional*):
            Problems and solutions for the example button.

    Returns:
        `tuple[gradio.Blocks, dict[str, Any]]`: The page, and arguments for its method `launch`, such as its style.
    """
    from ..pages.page import render

    gradio = _import_gradio()
    names = {
        name: words
        for name, words in SEGMENTATIONS.items()
        if name in (config.segmentation, *RULES, "line", "thinking")
    }

    def score(problem: str, solution: str, segmentation: str) -> str:
        return solution_html(models, problem, solution, config.rule(segmentation))

    def next_example(number: int) -> tuple[int, str, str]:
        return number + 1, *examples[number % len(examples)]

    with gradio.Blocks(title="trl-hrm", analytics_enabled=False) as page:
        number = gradio.State(0)
        gradio.HTML(render("app.html.jinja", names=model_names(models)), padding=False)
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=5, min_width=320):
                problem = gradio.Textbox(label="Problem", lines=3, max_lines=8, elem_id="problem")
                solution = gradio.Textbox(
                    label="Solution", lines=12, max_lines=24, elem_id="solution", placeholder="One step per paragraph"
                )
                segmentation = gradio.Dropdown(
                    label="A step ends at each",
                    choices=[(words, name) for name, words in names.items()],
                    value=config.segmentation or "blank_line",
                    elem_id="segmentation",
                )
                with gradio.Row():
                    example = gradio.Button("Example", elem_id="example")
                    button = gradio.Button("Score", variant="primary", elem_id="score")
            with gradio.Column(scale=7, min_width=320):
                output = gradio.HTML(render("solution.html.jinja", **_empty()), padding=False, elem_id="scores")
        inputs = [problem, solution, segmentation]
        for event in (button.click, problem.submit, solution.submit, segmentation.input):
            event(
                score,
                inputs,
                output,
                api_name="score",
                api_visibility="public" if event == button.click else "private",
            )
        shown = example.click(next_example, number, [number, problem, solution], api_visibility="private")
        shown.then(score, inputs, output, api_visibility="private")
    return page, {
        "css": render("app.css.jinja"),
        "theme": gradio.themes.Base(
            primary_hue="blue",
            neutral_hue="stone",
            font=FONTS,
            font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
        ).set(
            body_background_fill="var(--page)",
            body_background_fill_dark="var(--page)",
            button_primary_background_fill="var(--high)",
            button_primary_background_fill_dark="var(--high)",
            button_primary_background_fill_hover="var(--accent)",
            button_primary_background_fill_hover_dark="var(--accent)",
        ),
        "footer_links": [],
        "ssr_mode": False,
    }


def solution_html(models: Sequence[LoadedModel], problem: str, solution: str, rule: StepRule) -> str:
    """
    Return a part of a page with the steps of a solution and their scores.

    Args:
        models (`Sequence[LoadedModel]`):
            Reward models.
        problem (`str`):
            The problem.
        solution (`str`):
            The solution, which is split into steps.
        rule ([`~search.steps.StepRule`]):
            Rule that splits it.

    Returns:
        `str`: HTML with all texts escaped. If nothing can be scored, it says why.
    """
    from ..grading import thinking_spans
    from ..pages.page import render
    from ..scoring.aggregate import AGGREGATES, aggregate
    from ..scoring.candidate_scores import path_lengths, score_spans
    from ..scoring.tree_scorer import combined

    page = _empty()
    notices = page["notices"]
    length = len(problem) + len(solution)
    if length > MAX_CHARACTERS:
        notices.append(
            f"The problem and the solution have {length:,} characters. They can have at most {MAX_CHARACTERS:,}."
        )
        return render("solution.html.jinja", **page)
    if any("\ud800" <= character <= "\udfff" for character in problem + solution):  # from other clients than browsers
        notices.append("The text is not valid Unicode. Enter it again.")
        return render("solution.html.jinja", **page)
    steps = cut_text(solution, rule)
    if not problem.strip():
        notices.append("The problem is empty. Enter the problem that the solution is for.")
    if not steps:
        notices.append(
            "The solution has no steps. Enter a solution." if not solution.strip() else "The solution has no steps."
        )
    if len(steps) > MAX_STEPS:
        notices.append(f"The solution has {len(steps):,} steps. It can have at most {MAX_STEPS:,}.")
        return render("solution.html.jinja", **page)
    if not rule.keeps_thinking and thinking_spans(solution):
        notices.append("Thinking is not scored. To score it, split the solution into steps of thinking.")
    if not problem.strip() or not steps:
        return render("solution.html.jinja", **page)
    problem = problem.strip()
    letters = string.ascii_uppercase if len(models) > 1 else [None]
    for (config, scorer), name, letter in zip(models, model_names(models), letters, strict=False):
        try:
            _, longest = path_lengths(scorer, problem, steps, range(-1, len(steps) - 1), config)
            is_too_long = scorer.max_positions is not None and max(longest.values()) > scorer.max_positions
            if is_too_long:
                notices.append(
                    f"{name}: the solution has {max(longest.values()):,} tokens, but the model has {scorer.max_positions:,} positions. "
                    "Shorten the solution."
                )
                continue
            spans = score_spans(scorer, problem, steps, config)
            scores = [None if None in found.values() else combined(list(found.values()), config) for found in spans]
            is_complete = None not in scores
            aggregates = [aggregate(scores, kind) if is_complete else None for kind in AGGREGATES]
        except (ValueError, OSError, RuntimeError) as error:
            # such as a step with a control token of the model, a server that is down, or a solution that does not fit into memory
            notices.append(f"{name}: {one_line(str(error))}")
            continue
        page["models"].append(
            {
                "name": name,
                "letter": letter,
                "scores": scores,
                "spans": spans if config.merges else [{} for _ in spans],
                "aggregates": aggregates,
                "first_low": next((i for i, score in enumerate(scores, 1) if score is not None and score < 0.5), None),
            }
        )
        if not is_complete:
            notices.append(f"{name}: the judge gave no readable verdict on {scores.count(None)} steps.")
    if page["models"]:
        page |= {"problem": problem, "steps": steps, "aggregates": AGGREGATES}
    return render("solution.html.jinja", **page)


def model_names(models: Sequence[LoadedModel]) -> list[str]:
    """Return the names of the models: Hub ids, or the last folder of paths, or the whole paths if several are the same."""
    paths = [one.config.reward_model for one in models]
    names = [Path(path).resolve().name if os.path.isdir(path) else path for path in paths]
    return [plain(path if names.count(name) > 1 else name) for path, name in zip(paths, names, strict=True)]


def _empty() -> dict[str, Any]:
    """Return the variables of the template of a solution that is not scored yet."""
    return {"notices": [], "problem": "", "steps": [], "models": [], "aggregates": ()}


def _import_gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # is read when gradio is imported
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ModuleNotFoundError(
            'The app needs gradio, which is not installed. Install it with pip install "trl-hrm[app]".', name="gradio"
        ) from None
    return gradio
