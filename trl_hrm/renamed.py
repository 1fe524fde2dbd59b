"""Names of version 0.1 that were renamed or moved in 0.2. Using one is an error that states the new name."""

import importlib.abc
from typing import Any


# The options of reward models, which five commands share
_REWARD_MODEL = {
    "scorer": "`--reward_model_engine`",
    "batch_size": "`--reward_model_batch_size`",
    "max_length": "`--reward_model_max_length`",
    "dtype": "`--reward_model_dtype`",
    "scorer_args": "`--reward_model_args`",
    "revision": "`--reward_model_revision`",
}
_POLICY = {
    "base_urls": "`--policy_urls`",
    "api": "`--policy_api`",
    "tokenizer": "`--policy_tokenizer`",
    "request_timeout": """`--engine_args '{"timeout": SECONDS}'`""",
    "max_retries": """`--engine_args '{"max_retries": NUMBER}'`""",
}
_BATCH_SIZE = """`--engine_args '{"batch_size": NUMBER}'`"""
_STEP_SEARCH = "an option of `trl-hrm step-search`"

# New name of each option of a command that was renamed or moved
OPTIONS = {
    "build-prm800k": {"files": "`--inputs`"},
    "build-math-shepherd": {"files": "`--inputs`"},
    "annotate": _POLICY | {"revision": "`--policy_revision`", "dtype": "`--policy_dtype`", "batch_size": _BATCH_SIZE},
    "export": {"top_k": "`--max_solutions`"},
    "select-raft": _REWARD_MODEL | {"top_k": "`--max_kept`"},
    "push-dataset": {"folders": "`--inputs`"},
    "best-of-n": _POLICY
    | _REWARD_MODEL
    | {"policy_batch_size": _BATCH_SIZE}
    | dict.fromkeys(("strategy", "prefix_column", "max_depth", "max_step_tokens", "branching"), _STEP_SEARCH),
    "benchmark": _REWARD_MODEL,
    "report": {"results": "`--inputs`"},
    "score": _REWARD_MODEL | {"model": "`--reward_model`"},
}

# New module of the public names of each module that was moved
MODULES = {
    "data.choices": "data.problems",
    "data.dialogues": "data.problems",
    "data.grouping": "data.problems",
    "data.judged_trees": "data.step_labels",
    "data.node_files": "data.tree_files",
    "data.openr": "data.tree_files",
    "data.raft_config": "data.candidates_config",
    "data.report": "data.build_report",
    "data.score_picture": "pages.pictures",
    "data.search_trees": "data.export",
    "demo.tiny_model": "tiny_model",
    "evaluation.benchmarks.judging": "evaluation.benchmarks.run",
    "evaluation.benchmarks.measuring": "evaluation.benchmarks.measures",
    "evaluation.benchmarks.reading": "evaluation.benchmarks.suite",
    "evaluation.cost": "evaluation.best_of_n",
    "evaluation.hacking": "evaluation.reward_hacking",
    "evaluation.intervals": "intervals",
    "evaluation.judged_pool": "evaluation.best_of_n",
    "evaluation.plain_curves": "evaluation.curves",
    "evaluation.pool": "data.candidates",
    "evaluation.report_pictures": "pages.pictures",
    "evaluation.step_search_config": "scripts.step_search",
    "evaluation.step_search_results": "evaluation.step_search",
    "evaluation.step_search_run": "evaluation.step_search",
    "evaluation.tree_scores": "scoring.candidate_scores",
    "grading.judging": "grading.comparison",
    "grading.reading": "grading.parsing",
    "scoring.paths": "scoring.tree_scorer",
    "scripts.build_math_shepherd": "data.math_shepherd",
    "scripts.build_prm800k": "data.prm800k",
    "scripts.build_stepwise": "data.stepwise",
    "scripts.demo": "demo.pipeline",
    "scripts.export": "data.export",
    "scripts.hrm_reward": "scripts.reward",
    "scripts.push_dataset": "data.publish",
    "scripts.recipe_setup": "scripts.training",
    "search.engine": "search.engines.base",
    "search.full_tree": "search.policies",
    "search.http_client": "search.engines.http",
    "search.inspection_html": "search.inspection",
    "search.manifest": "search.run_folder",
    "search.openai_engine": "search.engines.openai",
    "search.prefixes": "search.steps",
    "search.progress": "search.scheduler",
    "search.puct": "search.policies",
    "search.rollouts": "search.policies",
    "search.root_filter": "search.policies",
    "search.sampling": "search.engines.base",
    "search.shards": "search.run_folder",
    "search.transformers_engine": "search.engines.transformers",
    "search.vllm_engine": "search.engines.vllm",
    "trainer.hub_push": "training.hub_push",
    "trainer.ref_hidden": "trainer.reference",
    "trainer.step_reward": "rewards",
}


def renamed_option(command: str, name: str) -> str:
    """
    Return a sentence with the new name of an option of 0.1, and an empty string for other names.

    Args:
        command (`str`):
            Name of the command, such as `"score"`.
        name (`str`):
            Option, with or without hyphens and a value.

    Example:

    ```python
    >>> renamed_option("score", "--model=me/hrm")
    ' In 0.2, it is `--reward_model`.'
    ```
    """
    new = OPTIONS.get(command, {}).get(name.split("=")[0].removeprefix("--").replace("-", "_"))
    return f" In 0.2, it is {new}." if new else ""


class MovedModules(importlib.abc.MetaPathFinder):
    """Finder that raises an error with the new module when a module of 0.1 is imported that does not exist any more."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        name = fullname.removeprefix("trl_hrm.")
        if name != fullname and name in MODULES:
            raise ModuleNotFoundError(
                f"{fullname} was moved in trl_hrm 0.2. Import its names from trl_hrm.{MODULES[name]}, or from trl_hrm.",
                name=fullname,
            )
