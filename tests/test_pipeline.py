"""Annotating and exporting as steps of datatrove give the rows of the commands, also after tasks were killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_hrm import annotate, export


datatrove = pytest.importorskip("datatrove", reason='needs `pip install "trl-hrm[cluster]"`')

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor  # noqa: E402

from trl_hrm import pipeline  # noqa: E402
from trl_hrm.pipeline import AnnotateStep, ExportStep  # noqa: E402
from trl_hrm.search.engines.base import EngineError  # noqa: E402
from trl_hrm.search.engines.transformers import TransformersEngine  # noqa: E402

from .pipeline_program import NUM_SHARDS, annotate_config, export_config  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder, as the current one. Restores the environment, in which datatrove sets variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return tmp_path


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory, policy) -> dict[str, pa.Table]:
    """Rows of a run without shards, by split."""
    folder = tmp_path_factory.mktemp("unsharded")
    annotate(annotate_config(policy, folder, problems=str(folder / "problems.jsonl"), output_dir=str(folder / "run")))
    export(export_config(inputs=str(folder / "run"), output_dir=str(folder / "data")))
    rows = rows_of(folder / "data")
    assert sum(table.num_rows for table in rows.values()) == 9
    return rows


def rows_of(folder: Path) -> dict[str, pa.Table]:
    """Return the rows of each split of a dataset, sorted by problem: the rows of a sharded run are grouped by shard."""
    files = sorted((folder / "data").glob("*.parquet"))
    return {file.name.partition("-")[0]: pq.read_table(file).sort_by("problem_id") for file in files}


def test_only_a_task_that_failed_is_started_again(folder, policy, unsharded, monkeypatch):
    """A task with failed requests has not completed, and the export waits for it. Otherwise problems would be missing for ever."""
    sample, started = TransformersEngine.sample, []

    async def failing(self, prefix_ids, *args, **options):
        if "2 + 1, 2" in self.tokenizer.decode(prefix_ids):
            raise EngineError("the server answered 500.")
        return await sample(self, prefix_ids, *args, **options)

    monkeypatch.setattr(pipeline, "annotate", lambda config: started.append(config.shard) or annotate(config))
    step, last = AnnotateStep(annotate_config(policy, folder)), ExportStep(export_config())
    monkeypatch.chdir("/")  # of a worker on another machine
    first = [LocalPipelineExecutor([step], tasks=2, workers=1, logging_dir=str(folder / "logs")) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "sample", failing)
        with pytest.raises(ValueError, match=r"run: 1 problems of shard 1/2 have failed requests"):
            first[0].run()
    assert os.listdir(folder / "logs" / "completions") == ["00000"]
    log = folder / "run" / "log-00001-of-00002.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-1])  # as if the task was stopped while it wrote
    with pytest.raises(ValueError, match="run: shards 1 have not finished"):
        last.run()
    log.write_bytes(whole)

    stats = LocalPipelineExecutor([last], workers=1, logging_dir=str(folder / "export"), depends=first[1]).run()
    assert started == ["0/2", "1/2", "1/2"]
    assert rows_of(folder / "data") == unsharded
    assert {name: count.total for name, count in stats.stats[0].stats.items() if name.startswith("rows")} == {
        f"rows {split}": len(rows) for split, rows in unsharded.items()
    }


def test_wrong_pipelines_are_errors(folder, policy):
    config = annotate_config(policy, folder)
    for options in ({"shard": "0/2"}, {"dry_run": True}):
        with pytest.raises(ValueError, match="The step sets the shard of each task"):
            AnnotateStep(replace(config, **options))
    with pytest.raises(ValueError, match="Make it the first step"):
        AnnotateStep(config).run(iter(()))
    with pytest.raises(ValueError, match="reads the folders in"):
        ExportStep(export_config()).run(iter(()))
    with pytest.raises(ValueError, match="has 3 tasks, but ExportStep builds one dataset"):
        ExportStep(export_config()).run(None, 0, 3)


def test_slurm_script(folder, policy, monkeypatch):
    """The array has one job per shard that has not completed. `sbatch` is a program that keeps its arguments and the script."""
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text(
        '#!/bin/sh\nn=$(ls jobs | wc -l)\necho "$@" > jobs/$n.args\nfor last; do :; done\ncp "$last" jobs/$n.sh\n'
        'echo "Submitted batch job 10$n"\n'
    )
    (folder / "bin" / "sbatch").chmod(0o755)
    (folder / "jobs").mkdir()
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (folder / "logs" / "annotate" / "completions").mkdir(parents=True)
    (folder / "logs" / "annotate" / "completions" / "00002").touch()
    options = {"time": "20:00:00", "partition": "gpu", "venv_path": "venv/bin/activate"}
    first = SlurmPipelineExecutor(
        [AnnotateStep(annotate_config(policy, folder))],
        tasks=16,
        gpus_per_task=1,
        cpus_per_task=8,
        job_name="annotate",
        logging_dir=str(folder / "logs" / "annotate"),
        **options,
    )
    last = SlurmPipelineExecutor(
        [ExportStep(export_config())],
        tasks=1,
        job_name="export",
        logging_dir=str(folder / "logs" / "export"),
        depends=first,
        **options,
    )
    last.run()
    scripts = {path.name: path.read_text().splitlines() for path in sorted((folder / "jobs").iterdir())}
    annotating, exporting = scripts["0.sh"], scripts["4.sh"]
    assert {"#SBATCH --array=0-14", "#SBATCH --gpus=1", "#SBATCH --cpus-per-task=8", "#SBATCH --requeue"} <= set(
        annotating
    )
    assert any(
        line.endswith(f"launch_pickled_pipeline {folder / 'logs' / 'annotate' / 'executor.pik'}")
        for line in annotating
    )
    assert "#SBATCH --array=0-0" in exporting and "#SBATCH --job-name=export" in exporting
    [exported] = scripts["4.args"]
    assert "--dependency=afterok:100 " in exported

    # what each job runs: the task of its index, from the saved pipeline
    import dill

    with open(folder / "logs" / "annotate" / "executor.pik", "rb") as file:
        saved = dill.load(file)
    assert saved.world_size == 16 and saved.pipeline[0].config == first.pipeline[0].config


def start(kind: str, policy: str, folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "output.txt", "a") as output:
        command = [sys.executable, "-m", "tests.pipeline_program", kind, policy, str(folder)]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT)


def wait_for_task(program: subprocess.Popen, folder: Path, shard: int = 1) -> psutil.Process:
    """Return the process that searches a shard, once it has sampled something."""
    log = folder / "run" / f"log-{shard:05d}-of-{NUM_SHARDS:05d}.jsonl"
    while not log.exists() or log.stat().st_size < 3000:
        assert program.poll() is None, (folder / "output.txt").read_text()[-4000:]
        time.sleep(0.02)
    for process in psutil.Process(program.pid).children(recursive=True):
        if str(log) in {file.path for file in process.open_files()}:
            return process
    raise AssertionError(f"no process has opened {log}")


@pytest.mark.slow  # starts many processes
class TestKilled:
    def test_a_killed_task_of_the_local_executor(self, tmp_path, policy, unsharded):
        """It is an error, and the next start resumes the shard."""
        program = start("local", policy, tmp_path)
        wait_for_task(program, tmp_path).kill()
        assert program.wait(600) == 1
        assert "A worker process was killed" in (tmp_path / "output.txt").read_text()
        assert not (tmp_path / "logs" / "annotate" / "completions" / "00001").exists()
        assert start("local", policy, tmp_path).wait(600) == 0
        assert rows_of(tmp_path / "data") == unsharded

    def test_a_killed_executor_leaves_no_task(self, tmp_path, policy, unsharded):
        """A task that continued would hold the lock of its shard."""
        program = start("local", policy, tmp_path)
        task = wait_for_task(program, tmp_path)
        others = psutil.Process(program.pid).children(recursive=True)
        program.kill()
        program.wait()
        task.wait(120)
        for process in others:  # datatrove's manager process does not end with the executor
            if process.is_running():
                process.kill()
        assert start("local", policy, tmp_path).wait(600) == 0
        assert rows_of(tmp_path / "data") == unsharded

    @pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
    def test_ray_starts_a_killed_task_again(self, tmp_path, policy, unsharded):
        program = start("ray", policy, tmp_path)
        task = wait_for_task(program, tmp_path)
        actor = task.parent().parent()  # of the worker of a pool
        assert "RankWorker" in " ".join(actor.cmdline())
        os.kill(actor.pid, signal.SIGKILL)
        assert program.wait(600) == 0, (tmp_path / "output.txt").read_text()[-4000:]
        assert "failed with RayActorError" in (tmp_path / "output.txt").read_text()
        assert rows_of(tmp_path / "data") == unsharded
