"""The driver is killed with SIGKILL in mid-learning and run again: the same phi, to the last bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ray_merge
from lessons import lesson, make_school

SCRIPT = """
import json, sys
import ray_merge

def slowly(event):
    if event.kind == "learn":
        print(event.units[0], flush=True)

ray_merge.run(json.loads(sys.argv[1]), engine="local", workers=1, cache_dir=sys.argv[2], progress=slowly)
"""


def test_phi_after_a_kill_of_the_driver_is_that_of_an_undisturbed_run(tmp_path):

    names = ("two", "three")
    parameters = {"steps": 24, "batch_size": 4, "commit_every": 3, "samples": 0}
    school = make_school(tmp_path / "school")
    recipe = lesson(school, tmp_path / "out", "tara_a", names, stages=2, parameters=parameters)
    command = [sys.executable, "-c", SCRIPT, json.dumps(recipe), str(tmp_path / "cache")]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    for line in driver.stdout:
        if int(line) >= 5:
            os.kill(driver.pid, signal.SIGKILL)
            break
    driver.wait()
    assert driver.returncode == -signal.SIGKILL
    states = sorted((tmp_path / "out" / ".ray_merge" / "learn").rglob("*.safetensors"))
    committed = int(states[-1].stem.removeprefix("step-"))
    assert 3 <= committed < 24
    assert not (tmp_path / "out" / "m").exists()
    steps = []

    def note(event):
        if event.kind == "learn":
            steps.append(event.units[0])

    ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache", progress=note)
    assert [step for step in steps if step > committed] == list(range(committed + 1, 25))
    assert min(steps) >= committed
    ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache", output=str(tmp_path / "whole"))
    one, two = (
        Path(tmp_path / name / "m" / "ray_merge" / "phi.safetensors").read_bytes()
        for name in ("whole", "out")
    )
    assert one == two
