"""Malformed input by the thousand: never a traceback, a hang, a write or more than 1 GB of memory."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
from fuzz_inputs import MODULES, adapter_tensors, base_tensors
from fuzz_mutations import LARGE, LARGE_EVERY, MUTATIONS, spoil_bytes, spoilt_file
from fuzz_mutations import safetensors as plain_file

from ray_merge.errors import CheckpointError
from ray_merge.storage.headers import parse_header

CASES = 2200
BATCH = Path(__file__).with_name("fuzz_batch.py")


def run_batch() -> list[dict[str, Any]]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, str(BATCH), "0", str(CASES)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([*lines, done.stderr])[-4000:]
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.own_process(work=run_batch)
def test_malformed_input_is_refused_in_one_sentence_and_nothing_is_written(record_property, answer):
    *findings, last = answer
    record_property("fuzz", last)
    print({key: value for key, value in last.items() if key != "reasons"})
    assert findings == [], f"{len(findings)} findings; again: python {BATCH} SEED 1 --show"
    assert last["grown_bytes"] < 10**9

    # The fuzzer itself: it must go on reaching what it reached when it was written.
    outcomes = last["outcomes"]
    assert last["distinct"] >= 2000
    assert outcomes["refused"] + outcomes["merged"] + outcomes.get("not finite", 0) == CASES
    assert outcomes["merged"] >= 150
    assert outcomes.get("not finite", 0) <= 10
    assert outcomes["command line"] >= 50
    assert len(last["reasons"]) >= 100
    refused = {key.split()[0] for key in last["by_mutation"] if key.endswith("refused")}
    assert refused == {mutation.__name__ for mutation, _ in MUTATIONS} | {"large"}
    assert len(LARGE) <= CASES // LARGE_EVERY


@pytest.mark.parametrize("seed", range(8))
def test_a_header_that_is_accepted_here_is_accepted_by_the_library_with_the_same_tensors(seed):
    rng = random.Random(seed)
    accepted = 0
    for _ in range(500):
        tensors = rng.choice([adapter_tensors(MODULES[0]), base_tensors()])
        if rng.random() < 0.5:
            content = spoilt_file(tensors, rng)
        else:
            content = plain_file(tensors)
            content = spoil_bytes(content, rng, upto=8 + int.from_bytes(content[:8], "little"))
        length = int.from_bytes(content[:8], "little")
        if 8 + length > len(content):
            continue
        try:
            header = parse_header(content[8 : 8 + length], file="f", file_bytes=len(content), where="f")
        except CheckpointError:
            continue
        accepted += 1
        found = {
            name: (value["dtype"], tuple(value["shape"])) for name, value in safetensors.deserialize(content)
        }
        assert found == {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    assert accepted >= 20
