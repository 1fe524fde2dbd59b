"""The stages of the demo: every command accepts its settings, and a stage reads only files of earlier stages."""

import dataclasses
from pathlib import Path

import pytest

from trl_hrm.config import Config
from trl_hrm.demo.jobs import self_train, train
from trl_hrm.demo.pipeline import run_stages
from trl_hrm.demo.profiles import PROFILES
from trl_hrm.scripts import kl_self, reward

from ..fakes import Recorder


@pytest.fixture(params=PROFILES)
def jobs(request):
    """All jobs. Creating their configs already rejects incompatible settings."""
    recorder = Recorder()
    run_stages(recorder, PROFILES[request.param], Path("demo"), seed=42)
    return recorder.jobs


def values_of(job) -> dict:
    """Return all settings of a job, by name."""
    found = dict(job.keywords)
    for value in job.args:
        if isinstance(value, Config):
            found |= {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        elif isinstance(value, dict):
            found |= value
        else:
            found[str(len(found))] = value
    return found


def test_it_calls_what_users_call(jobs):
    names = {job.func.__name__ for job in jobs.values()}
    assert {"annotate", "export", "build_stepwise", "best_of_n", "step_search", "train", "self_train"} <= names


def test_trainings_take_their_settings(jobs):
    found = [job for job in jobs.values() if job.func is train]
    for job in found[:2]:
        name, settings = job.args
        assert name == "reward"
        _, config, model = reward.make_parser().parse_dict(settings)
        assert config.seed == settings["seed"] and model.model_name_or_path == "demo/policy"
    assert len({job.args[1]["output_dir"] for job in found}) == len(found)
    for job in (job for job in jobs.values() if job.func is self_train):
        [settings] = job.args
        _, config, _ = kl_self.make_parser().parse_dict(settings)
        assert config.kl_coef == settings["kl_coef"] and config.output_dir == settings["output_dir"]


def test_every_input_is_made_before(jobs):
    """A first run needs each stage to come after the stages that it reads from."""
    made: set[str] = set()
    stage, fresh = "", set()
    for (name, _), job in jobs.items():
        if name != stage:
            stage, made, fresh = name, made | fresh, set()
        values = [
            (key, one)
            for key, value in values_of(job).items()
            for one in ([value] if isinstance(value, str) else value if isinstance(value, list) else [])
        ]
        below = [(key, one) for key, one in values if isinstance(one, str) and one.startswith("demo/")]
        assert below, name
        output = [one for key, one in below if key in ("output_dir", "output")] or [below[-1][1]]
        read = {one for _, one in below} - set(output)
        missing = {path for path in read if not any(f"{path}/".startswith(f"{one}/") for one in made)}
        assert not missing, (name, missing)
        fresh |= set(output)
