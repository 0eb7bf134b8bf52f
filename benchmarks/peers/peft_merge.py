"""PEFT's own way to one merged checkpoint: add_weighted_adapter(cat), merge_and_unload, save_pretrained.

    PYTHON benchmarks/peers/peft_merge.py BASE OUTPUT LAMBDA ADAPTER...

PYTHON is an environment that has peft and transformers; nothing of ray-merge is imported. `cat` with equal weights
is exactly the sum that task_arithmetic makes. The base is loaded in its own dtype.
"""

from __future__ import annotations

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, output: str, weight: float, adapters: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    names = [f"a{index}" for index in range(len(adapters))]
    peft = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        peft.load_adapter(adapter, adapter_name=name)
    peft.add_weighted_adapter(names, [weight] * len(names), "merged", combination_type="cat")
    peft.set_adapter("merged")
    # Without adapter_names the other adapters' layers are dropped, as they should be.
    peft.merge_and_unload(adapter_names=["merged"]).save_pretrained(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4:])
