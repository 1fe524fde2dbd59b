"""
Annotate and export with datatrove. A program, so that tests can kill it or one of its processes:

    python tests/pipeline_program.py EXECUTOR POLICY FOLDER
"""

import json
import os
import sys
from pathlib import Path

from trl_hrm import AnnotateConfig, ExportConfig


NUM_SHARDS = 3


def annotate_config(policy: str, folder: Path, **options) -> AnnotateConfig:
    """Return a run of 9 problems, in folder `run`. Its policy has memorised similar problems."""
    rows = [{"problem": f"What is {i} + 1, {n} times?\n", "answer": str(i + 1)} for i in range(3) for n in range(3)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return AnnotateConfig(
        **{
            "problems": "problems.jsonl",
            "policy": policy,
            "engine": "transformers",
            "engine_args": {"batch_size": 3},
            "prompt": "question",
            "prompt_style": "plain",
            "segmentation": "step_header",
            "final_stops": ["# END!"],
            "num_children": 3,
            "max_depth": 4,
            "max_step_tokens": 40,
            "max_in_flight": 24,
            "output_dir": "run",
        }
        | options
    )


def export_config(**options) -> ExportConfig:
    return ExportConfig(**{"inputs": "run", "output_dir": "data", "view": "hrm", "truncated": "wrong"} | options)


def main(kind: str, policy: str, folder: str) -> None:
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor

    from trl_hrm.pipeline import AnnotateStep, ExportStep

    os.chdir(folder)
    if kind == "ray":
        import ray

        ray.init(num_cpus=NUM_SHARDS, include_dashboard=False, log_to_driver=False)
        make, options = RayPipelineExecutor, {"mem_per_cpu_gb": 0.1}
    else:
        make, options = LocalPipelineExecutor, {}
    annotating = make(
        [AnnotateStep(annotate_config(policy, Path.cwd()))], tasks=NUM_SHARDS, logging_dir="logs/annotate", **options
    )
    make([ExportStep(export_config())], depends=annotating, logging_dir="logs/export", **options).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
