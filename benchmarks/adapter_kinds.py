"""What ray-merge, PEFT and mergekit make of every kind of adapter that PEFT saves: the table in README.

    python benchmarks/adapter_kinds.py [--mergekit PYTHON] [--only GLOB]

Every row is one of the parity table's (tests/parity/rows.py): a tiny random model, one adapter trained in PEFT with
every trainable tensor moved, saved by PEFT. Printed is the relative error of the merged and reloaded model's logits
against the live, unmerged PeftModel in float32, or how the tool refused. PEFT runs here (`from_pretrained`,
`merge_and_unload`, `save_pretrained`); mergekit in the environment whose python is given (`linear`, one model
`base+adapter`, weight 1).
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

TESTS = Path(__file__).parent.parent / "tests" / "parity"

KINDS = {
    "llama/plain": "Linear",
    "llama/rslora": "rsLoRA",
    "llama/patterns": "rank_pattern, alpha_pattern",
    "gpt2/plain": "HF Conv1D",
    "llama/embed": "embedding",
    "vit/patches": "Conv2d",
    "wav2vec2/plain": "Conv1d",
    "videomae/plain": "Conv3d",
    "siglip/attention_pool": "nn.MultiheadAttention",
    "llama_tied/lm_head": "tied lm_head, tied: untie",
    "llama_tied/embed": "tied embedding, tied: untie",
    "llama_tied/embed_ensure_tying": "ensure_weight_tying",
    "llama/dora": "DoRA, Linear",
    "llama/embed_dora": "DoRA, embedding",
    "llama_biased/lora_bias": "lora_bias",
    "llama_biased/bias_all": "bias: all",
    "llama_biased/bias_lora_only": "bias: lora_only",
    "llama/bdlora": "BD-LoRA",
    "llama/tokens": "trainable tokens",
    "llama/resized": "resized embeddings",
    "llama/save_lm_head": "modules_to_save",
    "llama/pissa_converted": "PiSSA, converted by PEFT",
    "llama/pissa_niter_4_initial": "PiSSA niter, not converted, with its initial adapter",
    "llama/olora_initial": "OLoRA, not converted, with its initial adapter",
    "qwen3_moe/both": "fused experts (Qwen3-MoE), per expert on disk",
    "qwen3_moe/per_expert_rslora": "per-expert rsLoRA of transformers 4",
    "mixtral/both": "fused experts (Mixtral)",
    "gpt_oss/both": "fused experts (gpt-oss)",
    "qwen3_moe/peft_0_18": "fused experts, saved by PEFT 0.18",
    "qwen3_moe/grouped_by_expert": "fused experts, Unsloth's packing",
    "llava/language_and_vision": "vision-language, both towers",
    "llava/names_of_transformers_4": "vision-language, names of transformers 4",
    "t5/plain": "encoder-decoder",
}
"""Row id -> what README calls it; ids that the table lost are an error."""


def main() -> None:
    """Print one line per kind of adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", metavar="PYTHON", help="python of an environment that has mergekit")
    parser.add_argument("--only", metavar="GLOB", default="*", help="row ids")
    options = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    from rows import rows
    from test_parity_table import Bench
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    known = {row.id: row for row in rows()}
    missing = sorted(set(KINDS) - set(known))
    if missing:
        parser.error(f"the parity table has no row {', '.join(missing)}; it has {', '.join(known)}")
    peers: dict[str, Callable[..., float]] = {"ray-merge": ours, "PEFT": peft}
    if options.mergekit:
        peers["mergekit"] = lambda *given: mergekit(options.mergekit, *given)
    print(f"| adapter | {' | '.join(peers)} |\n|---|{'---|' * len(peers)}")
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        for name in fnmatch.filter(KINDS, options.only):
            cells = [
                attempt(peer, bench, known[name], Path(home) / "out" / label) for label, peer in peers.items()
            ]
            print(f"| {KINDS[name]} | {' | '.join(cells)} |", flush=True)


def attempt(peer: Callable[..., float], bench: Any, row: Any, output: Path) -> str:
    """A peer's relative error on one row, or the first words of what it raised."""
    try:
        error = peer(bench, row, output / row.id.replace("/", "_"))
    except (Exception, SystemExit) as refused:  # noqa: BLE001  (a peer may fail in any way; that is the figure)
        reason = " ".join(str(refused).split())
        return f"{type(refused).__name__}: {reason[:60]}".replace("|", "/")
    return f"{error:.1e}" if error < 1e-4 else f"**{error:.2g}**"


def error_of(bench: Any, row: Any, model: Any) -> float:
    """Relative error of a merged model's logits against the live, unmerged PeftModel."""
    from test_parity_table import relative_error

    from models import MODELS

    got, want = MODELS[row.model].logits(model), bench.reference(row)
    return relative_error(got, want) if got.shape == want.shape else float("inf")


def ours(bench: Any, row: Any, output: Path) -> float:
    """ray-merge, local engine."""
    import ray_merge
    from models import MODELS

    ray_merge.run(bench.recipe(row, output), engine="local", cache_dir=output / "cache")
    model = MODELS[row.model].load(output / "m")
    for head in sorted((output / "m").glob("heads/*.safetensors")):
        model = ray_merge.load_head(model, head)
    return error_of(bench, row, model)


def peft(bench: Any, row: Any, output: Path) -> float:
    """PEFT's own merge, saved and loaded again."""
    from peft import PeftModel
    from variants import quiet

    from models import MODELS

    tiny, folder = MODELS[row.model], bench.adapters(row)[0][0]
    with quiet():
        merged = PeftModel.from_pretrained(tiny.load(bench.base(row.model)), folder).merge_and_unload()
        merged.save_pretrained(output)
        return error_of(bench, row, tiny.load(output))


def mergekit(python: str, bench: Any, row: Any, output: Path) -> float:
    """mergekit-yaml on `base+adapter`, loaded by transformers."""
    from models import MODELS

    output.mkdir(parents=True)
    model = f"{bench.base(row.model)}+{bench.adapters(row)[0][0]}"
    config = {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {"weight": 1.0}}],
        "dtype": "float32",
    }
    recipe = output / "mergekit.yaml"
    recipe.write_text(yaml.safe_dump(config))
    command = [
        python,
        "-m",
        "mergekit.scripts.run_yaml",
        str(recipe),
        str(output / "m"),
        "--no-copy-tokenizer",
    ]
    command += ["--lora-merge-cache", str(output / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    return error_of(bench, row, MODELS[row.model].load(output / "m"))


if __name__ == "__main__":
    main()
