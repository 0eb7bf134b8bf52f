"""What is done to a run of the local engine, by kind of scenario. Each returns how its drivers ended."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from processes import Driver, Ended, proxy_process, start_command, start_driver
from recipes import settings_of
from scenarios import Scenario

from random_faults import WAITING, RandomFaults, be_impatient
from s3_server import S3Server, run_server


class OwnServer:
    """A server that may be killed and started again with the same data and ports."""

    def __init__(self, folder: Path, weed: str, first: int) -> None:
        self._folder, self._weed, self._first = folder, weed, first
        self._stack = ExitStack()
        self.server: S3Server | None = None

    def start(self) -> S3Server:
        self.server = self._stack.enter_context(run_server(self._folder, self._weed, self._first))
        return self.server

    def kill(self) -> None:
        """SIGKILL, as `run_server` ends it; what it acknowledged is in its files."""
        self._stack.close()


@dataclass
class Stage:
    """Where one scenario plays.

    Args:
        scenario: what is to be done.
        folder: its own scratch folder.
        recipe: the recipe's file.
        output: where its merges go.
        seconds: of an undisturbed run of it.
        n_objects: that an undisturbed run leaves.
        n_state: of these, in the store beside the merges.
        count: how many objects there are now.
        environment: for drivers, with the address of the real server.
        own: a server that may be killed; None where none is needed.
        limits: called before the rerun to take away what limited the run.
        notes: what was done, for the report.
        rng: one draw after the other of the scenario's seed.
    """

    scenario: Scenario
    folder: Path
    recipe: Path
    output: str
    seconds: float
    n_objects: int
    n_state: int
    count: Callable[[], int]
    environment: dict[str, str]
    own: OwnServer | None = None
    limits: list[Callable[[], object]] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = self.scenario.rng

    @property
    def cache(self) -> Path:
        """Of the first driver and of the rerun; on the small disk where that is what is limited."""
        return self.folder / ("disk/cache" if self.scenario.kind == "disk-full" else "cache")

    def start(
        self,
        log: str = "run",
        cache: Path | None = None,
        before: Callable[[], None] = lambda: None,
        environment: Mapping[str, str] | None = None,
    ) -> Driver:
        """A driver of this recipe; by default with the first one's cache, and as things are now."""

        def prepare() -> None:
            settings_of(self.scenario.recipe)()
            before()

        path = self.folder / f"{log}.log"
        return start_driver(self.recipe, cache or self.cache, path, environment or self.environment, prepare)


def storage_faults(stage: Stage) -> list[Ended]:
    """A share of the requests fails on the way."""
    scenario = stage.scenario
    rule = RandomFaults(scenario.faults, scenario.rate, scenario.seed)
    with proxy_process(stage.environment["AWS_ENDPOINT_URL"], rule) as (address, counts):
        stage.environment = {**stage.environment, "AWS_ENDPOINT_URL": address}
        before = be_impatient if set(scenario.faults) & set(WAITING) else lambda: None
        ended = [stage.start(before=before).wait()]
    stage.notes.update(counts)
    return ended


def kill_driver(stage: Stage) -> list[Ended]:
    """kill -9 at a random moment: before the first object, or when a random number of them is there, and a bit.

    Of a recipe with state: while that is made, or as much later.
    """
    n_objects = stage.rng.randrange(2 * stage.n_state or stage.n_objects)
    later = stage.rng.random() * (0.03 if n_objects else 0.4 * stage.seconds)
    driver = stage.start()
    alive = True
    while alive and n_objects and stage.count() < n_objects:
        alive = driver.is_alive()
    time.sleep(later)
    stage.notes.update(killed=driver.is_alive(), n_objects=n_objects)
    driver.kill()
    return [driver.wait()]


def preempt(stage: Stage) -> list[Ended]:
    """SIGTERM at a random moment, and after half a second or so SIGKILL, if it is there still."""
    moment = stage.rng.random() * stage.seconds
    grace = stage.rng.choice([0.05, 0.5, 30.0])
    driver = stage.start()
    if driver.alive_after(moment):
        driver.kill(signal.SIGTERM)
        if driver.alive_after(moment + grace):
            driver.kill()
    return [driver.wait()]


def kill_server(stage: Stage) -> list[Ended]:
    """The store dies at a random moment of the run and comes back after up to 3 s."""
    assert stage.own is not None
    moment, away = stage.rng.random() * stage.seconds, stage.rng.random() * 3
    driver = stage.start()
    stage.notes["killed"] = driver.alive_after(moment)
    stage.own.kill()
    time.sleep(away)
    stage.own.start()
    return [driver.wait()]


def fill_disk(stage: Stage) -> list[Ended]:
    """The disk of the cache (and of a local output) is full after a random number of bytes: a small tmpfs."""
    kilobytes = stage.rng.randint(4, 600 if stage.scenario.store == "disk" else 200)
    stage.notes["kilobytes"] = kilobytes
    mount = stage.folder / "disk"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(mount)], check=True)
    again = ["mount", "-o", "remount,size=100m", str(mount)]
    stage.limits.append(lambda: subprocess.run(again, check=True))
    return [stage.start().wait()]


def limit_memory(stage: Stage) -> list[Ended]:
    """Address space for only a few megabytes more than after the imports: allocations and threads fail."""
    room = stage.rng.randint(1, 160) * 2**20
    stage.notes["room_bytes"] = room

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        now = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + room, now + room))

    return [stage.start(before=limit).wait()]


def two_drivers(stage: Stage) -> list[Ended]:
    """Two drivers on one recipe, the second a little later, on one node (one cache) or on two."""
    later = stage.rng.random() * stage.seconds * 0.5
    caches = (stage.cache, stage.cache if stage.rng.random() < 0.5 else stage.folder / "cache2")
    first = stage.start("run")
    first.alive_after(later)
    second = stage.start("second", caches[1])
    return [first.wait(), second.wait()]


def collect_beside(stage: Stage) -> list[Ended]:
    """kill -9, and then `gc` takes whatever has no manifest at some moment of the same recipe's next run."""
    ended = kill_driver(stage)
    moment = stage.rng.random() * stage.seconds
    driver = stage.start("second")
    stage.notes["beside"] = driver.alive_after(moment)
    command = ["gc", stage.output, "--remove", "--older-than", "0s"]
    collected = start_command(command, stage.folder / "gc.log", stage.environment).wait()
    stage.notes["gc"] = collected.code
    stage.notes["gc_said"] = collected.last
    return [*ended, driver.wait()]


def shift_clock(stage: Stage) -> list[Ended]:
    """A driver whose clock is wrong, beside one whose clock is right."""
    shift = stage.rng.choice([-86400.0, -3600.0, -300.0, -5.0, 5.0, 300.0, 3600.0, 86400.0])
    stage.notes["shift_seconds"] = shift
    wrong = stage.start("run", before=lambda: _shift(shift))
    if stage.rng.random() < 0.5:
        return [wrong.wait()]
    right = stage.start("second", stage.folder / "cache2")
    return [wrong.wait(), right.wait()]


def _shift(seconds: float) -> None:
    """Every clock that Python code asks for the date, in this process; file times stay those of the kernel."""
    now, now_ns, real = time.time, time.time_ns, datetime.datetime
    step = datetime.timedelta(seconds=seconds)

    class Like(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

    class Shifted(real, metaclass=Like):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.now(tz) + step

        @classmethod
        def utcnow(cls) -> datetime.datetime:
            return real.now(datetime.UTC).replace(tzinfo=None) + step

    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)
    datetime.datetime = Shifted


DISTURB: dict[str, Callable[[Stage], list[Ended]]] = {
    "kill-driver-s3": kill_driver,
    "kill-driver-disk": kill_driver,
    "kill-server": kill_server,
    "preempted": preempt,
    "disk-full": fill_disk,
    "memory-limit": limit_memory,
    "two-drivers": two_drivers,
    "clock": shift_clock,
    "gc": collect_beside,
}


def disturb(stage: Stage) -> list[Ended]:
    """Do what the scenario says."""
    return DISTURB.get(stage.scenario.kind, storage_faults)(stage)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder of one scenario with an empty `disk` in it, gone afterwards, whatever is mounted there."""
    (folder / "disk").mkdir(parents=True)
    try:
        yield folder
    finally:
        if os.path.ismount(folder / "disk"):
            subprocess.run(["umount", "-l", str(folder / "disk")], check=True)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
