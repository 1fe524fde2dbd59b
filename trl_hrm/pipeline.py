"""
Pipeline steps for [datatrove](https://github.com/huggingface/datatrove), to annotate problems on many machines and to export the
result. datatrove starts the tasks (on this machine, with Slurm or with Ray), keeps a log of each, and starts only those again that have
not completed.
"""

import os
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

from .data.export import export
from .data.export_config import ExportConfig
from .processes import Workers, end_with_parent
from .scripts.annotate import AnnotateConfig, annotate
from .search.run_folder import unfinished_shards


try:
    import multiprocess  # whose pools datatrove uses
    from datatrove.pipeline.base import PipelineStep
    from datatrove.utils.logging import logger
except ImportError as error:
    raise ImportError(
        f'The pipeline steps require datatrove, which cannot be imported ({error}). Run `pip install "trl-hrm[cluster]"`.'
    ) from error


class AnnotateStep(PipelineStep):
    """
    Step of a datatrove pipeline that runs [`annotate`]. The task of rank `i` of `n` searches shard `i/n` of the problems. All tasks write
    to the same `output_dir`, which must be on a file system that all machines share.

    A task that is started again resumes its shard. datatrove does not start a completed task again, even if the problems or the settings
    have changed. Use another `output_dir` and another `logging_dir` then.

    The counts of problems by status, and of sampled sequences and tokens, are added to datatrove's statistics. Sequences and tokens are
    counted since the last start of a task.

    Args:
        config ([`AnnotateConfig`]):
            Configuration of the run. Relative paths are relative to the current folder of the process that creates the step.

    Raises:
        `ValueError`: If `config` has a `shard` or `dry_run`, if another step comes before this one, or, at the end of a task, if problems
            have failed requests. The task is then not completed, and the next start retries them.

    Example:

    ```python
    from datatrove.executor import LocalPipelineExecutor
    from trl_hrm import AnnotateConfig
    from trl_hrm.pipeline import AnnotateStep

    config = AnnotateConfig(problems="train.jsonl", policy="Qwen/Qwen2.5-Math-7B-Instruct", output_dir="runs/mcts")
    LocalPipelineExecutor([AnnotateStep(config)], tasks=4, workers=1, logging_dir="runs/mcts-logs").run()
    ```
    """

    name = "annotate"
    type = "trl_hrm"

    def __init__(self, config: AnnotateConfig):
        super().__init__()
        if config.shard != "0/1" or config.dry_run:
            raise ValueError(
                f"`shard` is {config.shard} and `dry_run` is {config.dry_run}. The step sets the shard of each task, and samples. Remove "
                "both options."
            )
        self.config = config
        self.folder = os.getcwd()

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Search one shard."""
        if data is not None:
            raise ValueError(
                "AnnotateStep reads its problems from `config.problems`. Make it the first step of the pipeline."
            )
        config = replace(self.config, shard=f"{rank}/{world_size}")
        with chdir(self.folder), self.track_time("task"):
            text, counts = _run_task(_annotate, config, "Start the pipeline again to resume.")
        logger.info(text)
        for name, count in counts.items():
            self.stat_update(name, value=count, unit="task")
        failed = counts.get("problems error", 0)
        if failed:
            raise ValueError(
                f"{config.output_dir}: {failed:,} problems of shard {config.shard} have failed requests. Start the pipeline again to retry "
                "them, or run `trl-hrm export` to export the other problems."
            )


class ExportStep(PipelineStep):
    """
    Step of a datatrove pipeline that runs [`export`], as one task. Give it an executor of its own, with `tasks=1` and the executor of
    the [`AnnotateStep`] as `depends`.

    Args:
        config ([`ExportConfig`]):
            Configuration of the export. Relative paths are relative to the current folder of the process that creates the step.

    Raises:
        `ValueError`: If the pipeline has several tasks, or some shards of an input have not finished.
    """

    name = "export"
    type = "trl_hrm"

    def __init__(self, config: ExportConfig):
        super().__init__()
        self.config = config
        self.folder = os.getcwd()

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Build the dataset."""
        if data is not None:
            raise ValueError("ExportStep reads the folders in `config.inputs`. Remove the steps that come before it.")
        if world_size != 1:
            raise ValueError(
                f"The pipeline has {world_size} tasks, but ExportStep builds one dataset. Give it an executor of its own, with tasks=1 "
                "and the executor of the AnnotateStep as `depends`."
            )
        with chdir(self.folder):
            for name in self.config.inputs if self.config.format == "run" else ():
                if Path(name).is_dir() and (shards := unfinished_shards(name)):
                    raise ValueError(
                        f"{name}: shards {', '.join(map(str, shards))} have not finished. Run the pipeline of the AnnotateStep "
                        "until all of its tasks are completed."
                    )
            with self.track_time("task"):
                text, counts = _run_task(_export, self.config, "Start the pipeline again.")
        logger.info(text)
        for name, count in counts.items():
            self.stat_update(name, value=count, unit="task")


def _annotate(config: AnnotateConfig) -> tuple[str, dict[str, int]]:
    run = annotate(config)
    problems = {f"problems {status}": count for status, count in run.summary["problems"].items()}
    sampled = {"sampled sequences": run.progress.num_sequences, "sampled tokens": run.progress.generated_tokens}
    return str(run), problems | sampled


def _export(config: ExportConfig) -> tuple[str, dict[str, int]]:
    report = export(config)
    return str(report), {f"rows {split}": count for split, count in report["rows"].items()}


def _run_task(function: Callable[[Any], tuple], config: Any, remedy: str) -> tuple[str, dict[str, int]]:
    """
    Call a function of a config, in a process of its own if this process is the worker of a pool, as with Ray and with several workers of
    the local executor. A pool waits forever for a worker that was killed, for example because the memory is used up.
    """
    if multiprocess.parent_process() is None:
        return function(config)
    # Otherwise it would continue, and a task that is started again could not write to its shard
    end_with_parent(os.getppid())
    with Workers(1, "spawn", remedy) as workers:
        return workers.submit(function, config).result()
