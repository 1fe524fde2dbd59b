"""
Run commands on mutated inputs. Every command must end with a result whose invariants hold, or with a clean error.

    python -m tests.fuzz --num 2000
    python -m tests.fuzz --seed 17
"""

import argparse
import contextlib
import faulthandler
import io
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import yaml

import trl_hrm
from trl_hrm.cli import COMMANDS, TRAINING, main
from trl_hrm.errors import MAX_LENGTH
from trl_hrm.scripts.training import run_script

from .mutators import VALUES, mutate
from .targets import SETTINGS, Target, make_inputs, targets, words


MAX_SECONDS = 20  # of this process
MAX_WAIT = 180  # also counts the time that other processes take on a busy machine
MAX_BYTES = 1 << 30
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]")


class Outcome(NamedTuple):
    """What a command did: `kind` is `"ok"`, `"error"`, or the kind of failure."""

    kind: str
    details: str = ""


class Hang(BaseException):
    """Raised in a command that runs for too long."""


def run_seed(seed: int, inputs: Path) -> tuple[Target, Outcome]:
    """Draw a target and a mutation, and run it in a new working directory with links to the inputs."""
    rng = random.Random(seed)
    known = targets()
    [target] = rng.choices(known, [one.weight for one in known])
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        needed = " ".join((target.file, target.command, SETTINGS.get(target.command.split()[0], "")))
        if "implicit" in needed:
            needed += " policy"  # its reference
        for path in inputs.iterdir():
            if path.name in needed:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, work / path.name)
        if target.file:
            files = sorted(path for path in work.glob(target.file) if path.is_file())
            file = rng.choice(files)
            file.write_bytes(mutate(file.read_bytes(), file.name, rng))
            names, more = [file.name, target.about or file.name], []
            if target.command.split()[0] in TRAINING:
                names.append("train_dataset")  # what the trainers call it
            if file.suffix == ".yaml":  # the name of an option is its place
                names += [*settings_names(target), "arguments are required", "file not found"]
        else:
            names, more = mutated_option(target, work, rng)
            names = [*names, "file not found"]  # the name may be blank
        return target, run_command(target, [*words(target.command), *more], names, work)


def settings_names(target: Target) -> list[str]:
    """Return the names of the options of a command."""
    config = getattr(trl_hrm, COMMANDS[target.command.split()[0]].config)
    return [field.name for field in fields(config) if field.init]


def mutated_option(target: Target, work: Path, rng: random.Random) -> tuple[list[str], list[str]]:
    """Change an option in the file of settings, or on the command line. Return its name, and words for the command line."""
    command = target.command.split()[0]
    outputs = {"output_dir", "output", "html"}  # results are expected there
    name = rng.choice([name for name in settings_names(target) if name not in outputs])
    big = "--print_config" in target.command
    values = [value for value in VALUES if big or not isinstance(value, int | float) or value <= 2]
    value = rng.choice(values)
    shown = [str(one) for one in (value if isinstance(value, list) else [value])]
    if rng.random() < 0.5:
        path = work / f"{command}.yaml"
        settings = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(settings | {name: value}, allow_unicode=True))
        return [name, path.name, *filter(None, shown)], []
    return [name, *filter(None, shown)], [f"--{name}", *(word.replace("\0", "") for word in shown)]


def run_command(target: Target, argv: list[str], names: list[str], work: Path) -> Outcome:
    """Run a command in this process, with limits of time and memory."""
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with limits() as peak, contextlib.chdir(work):
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                try:
                    code = (train if argv[0] in TRAINING else main)(argv)
                except SystemExit as stop:
                    code = stop.code or 0
    except Hang:
        return Outcome("hang", traceback.format_exc())
    except BaseException as error:  # noqa: B036 (also KeyboardInterrupt and GeneratorExit)
        return Outcome(f"traceback: {type(error).__name__}", traceback.format_exc())
    printed = re.sub(r"[^\n]*\r", "", stderr.getvalue())
    if peak() > MAX_BYTES:
        return Outcome("memory", f"{peak() / 2**20:.0f} MiB")
    if "Traceback (most recent call last)" in printed + stdout.getvalue():
        return Outcome("printed traceback", printed)
    if CONTROL.search(printed + stdout.getvalue()):
        return Outcome("control character", printed + stdout.getvalue())
    if code == 0:
        try:
            target.check(work, stdout.getvalue())
        except Exception as error:
            return Outcome(f"wrong result: {type(error).__name__}", traceback.format_exc())
        return Outcome("ok", stdout.getvalue())
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if re.match(r"(error|.*: error): ", line)]
    if code not in (1, 2) or len(errors) != 1:
        return Outcome("no clean error", f"exit code {code}\n{printed}")
    message = lines[errors[0]]
    if errors[0] < len(lines) - (1 if code == 1 else 2):
        return Outcome("several lines", printed)
    if "bug in trl_hrm" in message:
        return Outcome("package fault", printed)
    if len(message) > MAX_LENGTH + 300:  # with the words around it
        return Outcome("long error", message[:3000])
    if not any(one in message for name in names for one in (name[:100], repr(name)[1:-1])):
        return Outcome("unnamed", printed)
    return Outcome("error", message)


def train(argv: list[str]) -> int:
    """Run a training script in this process, without `accelerate launch`."""
    script = import_module(f"trl_hrm.scripts.{argv[0].replace('-', '_')}")
    run_script(script.main, script.make_parser(), argv[1:])
    return 0


@contextlib.contextmanager
def limits() -> Iterator:
    """Raise [`Hang`] after `MAX_SECONDS` or `MAX_WAIT`, and `MemoryError` at 4 GB. Yield a function that returns the growth of the memory."""

    def stop(*_):
        raise Hang

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    limit = resource.getrlimit(resource.RLIMIT_AS)
    timers = {signal.SIGVTALRM: (signal.ITIMER_VIRTUAL, MAX_SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, MAX_WAIT)}
    previous = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    faulthandler.dump_traceback_later(2 * MAX_WAIT, exit=True)  # in case the signal is not handled
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 4 * MAX_BYTES, limit[1]))
    try:
        yield lambda: memory("VmHWM") - before
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, previous[number])
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limit)


def memory(name: str) -> int:
    """Return a field of `/proc/self/status` in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) << 10


def run() -> None:
    """Run many inputs, and print the failures and their number by target and kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", help="folder with the inputs, which is created if it does not exist")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(options.inputs or folder)
        if not inputs.exists() or not any(inputs.iterdir()):
            inputs.mkdir(exist_ok=True)
            make_inputs(inputs)
        counts, seconds = Counter(), Counter()
        for seed in range(options.seed, options.seed + options.num):
            start = time.perf_counter()
            target, outcome = run_seed(seed, inputs)
            seconds[target.name] += time.perf_counter() - start
            counts[target.name, outcome.kind] += 1
            if outcome.kind not in ("ok", "error") or options.num == 1:
                print(f"--- seed {seed}: {target.command} [{target.file}]: {outcome.kind}\n{outcome.details[-1500:]}")
                sys.stdout.flush()
    for (name, kind), count in sorted(counts.items()):
        print(f"{name:60} {kind:40} {count:5}")
    for kind in dict.fromkeys(kind for _, kind in counts):
        print(f"{'total':60} {kind:40} {sum(n for (_, k), n in counts.items() if k == kind):5}")
    for name, spent in seconds.most_common(8):
        print(f"{name:60} {spent / sum(n for (t, _), n in counts.items() if t == name):8.2f} s each")
