"""The TARA and NSC repositories as they are imported here, and the configuration objects that they read.

What they import and a run on these models never needs has stand-ins: debugger, logging, image files, plots,
configuration files, the fine-tuning of LLaVA. Everything else is theirs, from a commit, in a temporary folder.

Their layers are built as in PEFT up to 0.18 (they pin 0.15.2). Where a newer one is installed:

    pip install --no-deps --target FOLDER peft==0.18.1; export PYTHONPATH=FOLDER
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
from clip_school import BATCH, INIT, RATE, School
from peer import relative_error
from torch import Tensor

STAND_INS: Mapping[str, tuple[str, ...]] = {
    "ipdb": (),
    "wandb": ("log",),
    "omegaconf": ("OmegaConf", "DictConfig"),
    "PIL": ("Image",),
    "matplotlib": (),
    "matplotlib.pyplot": (),
    "trl": (),
    "trl.trainer": (),
    "trl.trainer.sft_config": ("SFTConfig",),
    "trl.trainer.sft_trainer": ("SFTTrainer",),
}
"""Module -> the names that are imported from it or called in it."""


class Unused:
    """Stands for a class or a function that does nothing here."""

    def __init__(self, *given: Any, **more: Any) -> None:
        pass


class Config(dict[str, Any]):
    """A configuration as theirs are used: by attribute, by `get` and by `in`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


@contextlib.contextmanager
def checked_out(repo: Path, commit: str) -> Iterator[Path]:
    """`src` of the repository at the commit, importable as their scripts import it."""
    if tuple(map(int, peft.__version__.split(".")[:2])) > (0, 18):
        raise SystemExit(f"their layers need PEFT up to 0.18, this is {peft.__version__}; see {__file__}")
    packed = subprocess.run(
        ["git", "-C", str(repo), "archive", commit, "src"], check=True, capture_output=True
    )
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
        files.extractall(folder, filter="data")
        sys.path[:0] = [f"{folder}/src", folder]
        for name, members in STAND_INS.items():
            module = ModuleType(name)
            for member in members:
                setattr(module, member, Unused)
            sys.modules[name] = module
        warnings.filterwarnings("ignore", category=FutureWarning)  # their torch.cuda.amp
        warnings.filterwarnings("ignore", message=".*CUDA is not available")
        try:
            yield Path(folder)
        finally:
            del sys.path[:2]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Their prints and progress bars go nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def configs(school: School) -> list[Config]:
    """One for each task, of their CLIP classification."""
    return [
        Config(
            data=Config(name=task, cliphead_name=f"{task}_head.pt"),
            task=Config(name="classification"),
            model=Config(name="clip_vit", id=str(school.base), cliphead_dir=str(school.folder)),
        )
        for task in school.tasks
    ]


def their_learning(
    train: Callable[..., Any],
    school: School,
    baselines: Sequence[Mapping[str, float]] | None,
    *,
    steps: int = 50,
    batch_size: int = BATCH,
    learning_rate: float = RATE,
    **options: Any,
) -> Any:
    """What their `train_merged_model` returns for the batches that ours draws.

    Args:
        train: the function.
        school: to learn from.
        baselines: "entropy" of each single adapter, where it takes them.
        steps: of AdamW.
        batch_size: images of each task in a step.
        learning_rate: of AdamW.
        **options: of their command line.
    """
    count = len(school.tasks)
    given = Config(lambda_reg=0.0, lamda=INIT * count, learning_rate=learning_rate, **options)
    loaders = [[{"image": one} for one in school.batches(task, steps, batch_size)] for task in school.tasks]
    with quiet():
        return train(
            args=given,
            cfgs=configs(school),
            val_loaders=loaders,
            model_dirs=[str(school.folder)] * count,
            lora_dicts={f"{task}-classification": str(school.adapter(task)) for task in school.tasks},
            preference=torch.full((count,), 1 / count),
            device="cpu",
            baselines_val=baselines,
        )


def coefficients(model: Any) -> dict[str, Tensor]:
    """Site -> phi of one of their merge models, one number per coefficient."""
    return {
        name: module.lora_A[model.scaled_name][1].logit.detach()
        for name, module in model.vit.model.named_modules()
        if type(module).__name__ == "LinearTrainable"
    }


def compare(title: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Print how far apart two phi are, and how far they went."""
    assert sorted(theirs) == sorted(ours), "other sites"
    want, got = (torch.cat([one[site].flatten() for site in sorted(theirs)]) for one in (theirs, ours))
    print(
        f"{title}: {len(want)} phi of {len(theirs)} sites, moved by up to {float((want - INIT).abs().max()):.4f}: "
        f"max |theirs - ours| {float((want - got).abs().max()):.1e}, of the way gone "
        f"{relative_error(got - INIT, want - INIT):.1e}"
    )


def outcome(call: Callable[[], Any]) -> str:
    """What a call gives, or how it fails, in one line."""
    try:
        result = call()
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return f"{float(result):.6g}"


def listed(values: Sequence[float]) -> str:
    """Numbers with nine digits."""
    return ", ".join(f"{value:.9g}" for value in values)
