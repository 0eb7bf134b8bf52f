"""Runs fuzz cases in this process, under a limit of memory and an alarm, and prints one JSON line per finding.

    python tests/fuzz/fuzz_batch.py FIRST COUNT [--show]     --show prints every case

A case is planned and run. It merges, or it is refused with exit code 2 and one sentence; it takes less than 5 s (of
this process, so that a busy machine changes nothing), writes nothing outside of the cache before it is accepted, and
needs less than 1 GB of memory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz_inputs import Inputs, good_inputs, strange_inputs
from fuzz_mutations import case_of

from ray_merge.errors import RayMergeError

MAX_SECONDS = 5.0
"""Of processor time."""

MAX_BLOCKED_SECONDS = 30.0
"""Until what uses no processor time (a pipe without a writer) counts as a hang."""

MAX_BYTES = 10**9
MAX_SENTENCE = 2000
CLI_EVERY = 40

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_WRITES = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime"}
_REMOVES = {"os.remove", "os.rmdir"}


class Hang(BaseException):
    """Not an Exception: nobody may catch it."""


class Watch:
    """Notes every path that Python code writes to, and everything that starts a process or a connection."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & _WRITE_FLAGS:
                self.seen.append(_text(arguments[0]))
        elif event in _REMOVES:
            self.seen += [_text(arguments[0])] if os.path.lexists(arguments[0]) else []
        elif event in _WRITES:
            places = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
            self.seen += [_text(place) for place in places]
        elif event in ("os.system", "os.exec", "subprocess.Popen", "os.posix_spawn", "socket.connect"):
            self.seen.append(f"{event} {arguments[:2]!r}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        self.seen = []
        self.on = True
        try:
            yield self.seen
        finally:
            self.on = False


def _text(place: Any) -> str:
    return os.fsdecode(place) if isinstance(place, str | bytes | os.PathLike) else str(place)


class Batch:
    """Folders and counts of one process."""

    def __init__(self, root: Path) -> None:
        import ray_merge

        self.api = ray_merge
        self.root = root
        self.cache = root / "cache"
        os.environ["XDG_CACHE_HOME"] = str(self.cache)
        self.watch = Watch()
        self.outcomes: Counter[str] = Counter()
        self.by_mutation: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.findings: list[dict[str, Any]] = []
        self.distinct: set[int] = set()
        self.slowest = (0.0, -1)

    def warm_up(self) -> None:
        """Load every library that a merge loads, then allow so much memory more."""
        for inputs in (good_inputs(), strange_inputs()):
            with contextlib.suppress(RayMergeError):
                self.api.run(self._write(inputs), engine="local", cache_dir=self.cache)
            self._clean()
        vm = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert vm is not None
        limit = int(vm[1]) * 1024 + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def case(self, seed: int, *, show: bool = False) -> None:
        mutation, inputs = case_of(seed)
        self.distinct.add(
            hash((repr(inputs.recipe), inputs.recipe_text, *sorted(map(str, inputs.files.items()))))
        )
        recipe = self._write(inputs)
        started = time.process_time()
        outcome, detail = self._checked(recipe)
        if seed % CLI_EVERY == 7 and outcome in ("merged", "refused"):
            shutil.rmtree(self.root / "in" / "out", ignore_errors=True)
            outcome, detail = self._command(recipe, outcome, detail)
        seconds = time.process_time() - started
        self.slowest = max(self.slowest, (round(seconds, 3), seed))
        self._clean()
        if show:
            print(seed, mutation, outcome, f"{seconds:.3f}", detail[:3000], flush=True)
        self.outcomes[outcome] += 1
        self.by_mutation[f"{mutation.partition('+')[0]} {outcome}"] += 1
        if outcome == "refused":
            self.reasons[_reason(detail)] += 1
        elif outcome not in ("merged", "not finite"):
            finding = {"seed": seed, "mutation": mutation, "outcome": outcome, "detail": detail[-3000:]}
            self.findings.append(finding)
            print(json.dumps(finding), flush=True)

    def _checked(self, recipe: Any) -> tuple[str, str]:
        planned = self._once(lambda: self.api.plan(recipe))
        if planned[0] not in ("ok", "refused"):
            return planned
        ran = self._once(lambda: self.api.run(recipe, engine="local", cache_dir=self.cache))
        if ran[0] == "ok":
            return ("merged", "") if planned[0] == "ok" else ("run takes what plan refuses", planned[1])
        return ran

    def _once(self, call: Callable[[], Any]) -> tuple[str, str]:
        try:
            with self.watch.watching() as written, limited_time():
                call()
        except RayMergeError as error:
            return self._refusal(error, written)
        except Hang:
            return "hang", traceback.format_exc()
        except MemoryError:
            return "memory", traceback.format_exc()
        except Exception:  # noqa: BLE001  (whatever it is, it is a finding)
            return "traceback", traceback.format_exc()
        outside = self._outside(written, "cache", "in")
        return ("written", str(outside)) if outside else ("ok", "")

    def _refusal(self, error: Any, written: list[str]) -> tuple[str, str]:
        sentence = str(error)
        if error.exit_code == 1 and "is not finite after the merge" in sentence:
            # DESIGN 6: numbers of a result can only be seen when it is there, and then nothing vouches for it.
            manifests = [*(self.root / "in").rglob("MANIFEST.json")]
            return ("manifest of a failed run", str(manifests)) if manifests else ("not finite", sentence)
        if error.exit_code != 2:
            return (
                f"exit code {error.exit_code}",
                f"{type(error).__name__}: {sentence}\n{traceback.format_exc()}",
            )
        if not sentence.strip() or len(sentence) > MAX_SENTENCE or not sentence.isprintable():
            return "bad sentence", f"{len(sentence)} characters: {sentence[:300]!r}"
        outside = self._outside(written, "cache")
        if outside or (self.root / "in" / "out").exists() or [*(self.root / "in" / "here").iterdir()]:
            return "written", f"{outside}: {sentence}"
        return "refused", sentence

    def _outside(self, written: list[str], *allowed: str) -> list[str]:
        roots = tuple(f"{self.root}/{name}" for name in allowed)
        # A descriptor, or a name relative to one, shows up without its folder. What had no folder was not written.
        return [
            path
            for path in written
            if not path.startswith((*roots, "/dev/null"))
            and not path.isdigit()
            and Path(path).absolute().parent.is_dir()
        ]

    def _command(self, recipe: Any, outcome: str, detail: str) -> tuple[str, str]:
        """The same case through the command line."""
        from ray_merge.cli import main

        path = recipe if isinstance(recipe, str) else str(self.root / "in" / "recipe.yaml")
        if not isinstance(recipe, str):
            with contextlib.suppress(ValueError):
                Path(path).write_text(json.dumps(recipe))
        stdout, stderr = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), limited_time():
                main(["run", path, "--engine", "local", "--cache-dir", str(self.cache)])
        except SystemExit as stop:
            code = stop.code
        except Hang:
            return "hang", traceback.format_exc()
        last = stderr.getvalue().strip().rpartition("\n")[2]
        self.outcomes["command line"] += 1
        if (
            code not in (0, 2)
            or "Traceback" in stderr.getvalue()
            or (code == 2 and not last.startswith("ray-merge: "))
        ):
            return "command line", f"exit code {code}: {stderr.getvalue()}"
        return outcome, detail

    def _write(self, inputs: Inputs) -> Any:
        folder = self.root / "in"
        folder.mkdir()
        (folder / "here").mkdir()
        os.chdir(folder / "here")  # some recipes have relative paths
        return inputs.write(folder)

    def _clean(self) -> None:
        os.chdir(self.root)
        shutil.rmtree(self.root / "in")
        shutil.rmtree(self.cache / "adapters", ignore_errors=True)


def _reason(sentence: str) -> str:
    """What is left of a sentence without its names and numbers."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\[.*\]|\{.*\}|\(.*?\)|[0-9]+", "_", sentence)
    return " ".join(bare.split())[:70]


_armed = False


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Raise `Hang` in the block when it takes too long."""
    global _armed
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MAX_BLOCKED_SECONDS)
    # Blind to signals inside of C: say where, and end.
    faulthandler.dump_traceback_later(3 * MAX_BLOCKED_SECONDS, exit=True, file=sys.__stderr__)
    _armed = True
    try:
        yield
    finally:
        _armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def _hang(_number: int, _frame: FrameType | None) -> None:
    if _armed:
        raise Hang


def _memory_disk() -> str | None:
    """A folder in memory, where there is room: a merge is 50 times on the disk, which takes most of its time."""
    return (
        "/dev/shm" if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 4 * 10**9 else None
    )


def main() -> None:
    """Run the seeds that the command line names."""
    first, count = int(sys.argv[1]), int(sys.argv[2])
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    with tempfile.TemporaryDirectory(dir=_memory_disk()) as folder:
        batch = Batch(Path(folder).resolve())
        batch.warm_up()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.monotonic()
        for seed in range(first, first + count):
            batch.case(seed, show="--show" in sys.argv)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        summary = {
            "outcomes": batch.outcomes,
            "distinct": len(batch.distinct),
            "by_mutation": dict(sorted(batch.by_mutation.items())),
            "reasons": dict(batch.reasons.most_common()),
            "slowest": batch.slowest,
            "grown_bytes": grown * 1024,
            "seconds": round(time.monotonic() - started, 1),
            "findings": len(batch.findings),
        }
        print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
