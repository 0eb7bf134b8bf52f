"""The transformers class that an adapter was trained in, built on the meta device: names and shapes, no weights.

Owns: which class, and building it quickly, quietly and offline. Remote code is never run.
transformers and torch are imported when a function runs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, cast

from ray_merge.errors import AdapterError, CheckpointError, RayMergeError

if TYPE_CHECKING:
    from torch import nn

AUTO_CLASSES: Mapping[str, str] = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types -> what its users load for them."""

_BUILDING = RLock()
"""Building changes what belongs to the process (verbosity, offline, torch's hooks and random state)."""

WAY_OUT = "name the base tensor of each adapted module with `key_mapping` in the recipe"


def class_candidates(
    config: Mapping[str, Any], *, class_name: str | None = None, task_type: str | None = None
) -> tuple[str, ...]:
    """Names of transformers classes that can read the base, best guess first; empty if there is none.

    Args:
        config: the parsed config.json of the base.
        class_name: the class that the adapter's `auto_mapping.base_model_class` names.
        task_type: the adapter's `task_type`.
    """
    saved = (config.get("architectures") or [None])[0]
    found: list[str] = []
    with quiet_and_offline():
        if class_name is not None and _model_class(class_name) is not None:
            found.append(class_name)
        if auto := AUTO_CLASSES.get(task_type or ""):
            found += _auto_class(auto, config)
        if saved is not None and _model_class(saved) is not None:
            found.append(saved)
        if saved is None:  # a class of its own that transformers lacks is not what AutoModel would build
            found += _auto_class("AutoModel", config)
    return tuple(dict.fromkeys(found))


def auto_class(config: Mapping[str, Any], task_type: str) -> str | None:
    """The class that a task type's Auto class loads for the base, None where transformers has none.

    Args:
        config: the parsed config.json of the base.
        task_type: one of AUTO_CLASSES.
    """
    with quiet_and_offline():
        return next(iter(_auto_class(AUTO_CLASSES[task_type], config)), None)


def meta_model(config: Mapping[str, Any], name: str, n_tensors: int) -> nn.Module:
    """A model of that class for that config, without weights and with its tied parameters tied.

    Args:
        config: the parsed config.json of the base.
        name: of the class.
        n_tensors: how many the checkpoint holds.

    Raises:
        AdapterError: the class belongs to another kind of model.
        CheckpointError: the class cannot be built from this config.
    """
    import torch

    def eager(own_config: Any) -> None:
        own_config._attn_implementation = "eager"  # the others ask for packages and devices

    return build_model(config, name, n_tensors, place=lambda: torch.device("meta"), adjust=eager)


def build_model(
    config: Mapping[str, Any],
    name: str,
    n_tensors: int,
    *,
    place: Callable[[], AbstractContextManager[Any]],
    adjust: Callable[[Any], None],
) -> nn.Module:
    """A model of that class for that config, uninitialised and with its tied parameters tied.

    Args:
        config: the parsed config.json of the base.
        name: of the class.
        n_tensors: how many the checkpoint holds.
        place: the context to build in; decides where tensors live.
        adjust: changes the config object of transformers before the model is built.

    Raises:
        AdapterError: the class belongs to another kind of model.
        CheckpointError: the class cannot be built from this config.
    """
    import torch
    import transformers
    from transformers import modeling_utils

    # Version 4 initialises on the meta device too: 26 s instead of 11 s for 37 000 Linears (measured).
    skip_init = getattr(modeling_utils, "no_init_weights", nullcontext)
    model_class = _model_class(name)
    with _BUILDING, quiet_and_offline(), torch.random.fork_rng(devices=[]):
        try:
            own_config = _config_for(model_class, config)
            adjust(own_config)
            with place(), skip_init(), _at_most(4 * n_tensors + 5000):
                model: Any = model_class(own_config)
            model.tie_weights()  # version 4 does it only where it initialises
        except RayMergeError:  # ours, or a signal's
            raise
        except Exception as error:  # a class, its config and its validators raise whatever they like
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot build {name} from the base's config.json "
                f"(model_type {config.get('model_type')!r}): {why}; {WAY_OUT}"
            ) from error
    return cast("nn.Module", model)


class _Quiet:
    """transformers' notices and Python's warnings off, the Hub out of reach, for as long as anyone wants it.

    The settings belong to the process and stages are built on several threads: the first one in saves them, the last
    one out restores them.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._undo = ExitStack()

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._silence()

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()

    def _silence(self) -> None:
        from huggingface_hub import constants
        from transformers.utils import logging as untyped

        logging: Any = untyped
        self._undo.callback(logging.set_verbosity, logging.get_verbosity())
        self._undo.callback(setattr, constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
        self._undo.enter_context(warnings.catch_warnings())
        logging.set_verbosity(logging.CRITICAL)
        constants.HF_HUB_OFFLINE = True
        warnings.simplefilter("ignore")


_QUIET = _Quiet()


@contextmanager
def quiet_and_offline() -> Iterator[None]:
    """No notice of transformers on the terminal, no request to the Hub; restores both."""
    _QUIET.enter()
    try:
        yield
    finally:
        _QUIET.leave()


@contextmanager
def _at_most(n_parameters: int) -> Iterator[None]:
    """Stop when a model gets more parameters: `num_hidden_layers` of 10^6 in a config.json would take hours."""
    from torch.nn.modules.module import register_module_parameter_registration_hook as register

    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > n_parameters:
            raise CheckpointError(
                f"the base's config.json describes a model of more than {n_parameters} parameters, which its "
                "checkpoint does not hold; is it another model's?"
            )

    hook = register(note)
    try:
        yield
    finally:
        hook.remove()


def _model_class(name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.config_class:
        return found
    return None


def _auto_class(auto: str, config: Mapping[str, Any]) -> list[str]:
    """What that Auto class loads for the config's model type: the one that saved the base if it is among them."""
    import transformers

    model_type = config.get("model_type") or ""
    if model_type not in transformers.CONFIG_MAPPING:
        return []
    classes = getattr(transformers, auto)._model_mapping.get(transformers.CONFIG_MAPPING[model_type], None)
    if classes is None:
        return []
    names = [one.__name__ for one in (classes if isinstance(classes, tuple) else (classes,))]
    saved = config.get("architectures") or []
    return [next((name for name in names if name in saved), names[0])]


def _config_for(model_class: Any, config: Mapping[str, Any]) -> Any:
    """The config object that transformers makes of config.json for that class: a text model takes its part."""
    import transformers

    values = {key: value for key, value in copy.deepcopy(dict(config)).items() if key not in _NOT_BUILT}
    model_type, wanted = values.get("model_type") or "", model_class.config_class
    if model_type in transformers.CONFIG_MAPPING:
        own = transformers.CONFIG_MAPPING[model_type]
        if own is not wanted and (issubclass(own, wanted) or _is_auto_class(model_class, own)):
            return own.from_dict(values)
    values = values.get(wanted.base_config_key) or values
    if values.get("model_type", wanted.model_type) != wanted.model_type:
        parts = [value for value in values.values() if isinstance(value, dict)]
        values = next((part for part in parts if part.get("model_type") == wanted.model_type), values)
    saved_by_it = model_class.__name__ in (config.get("architectures") or [])
    if not saved_by_it and values.get("model_type", wanted.model_type) != wanted.model_type:
        raise AdapterError(
            f"the adapter was trained in {model_class.__name__} ({wanted.model_type}), but the base's config.json "
            f"says model_type {model_type!r}; it was trained on another model, or else {WAY_OUT}"
        )
    return wanted.from_dict(values)


def _is_auto_class(model_class: Any, own: Any) -> bool:
    """Whether some Auto class builds this class from that config: `exaone` is read by Llama's classes."""
    from transformers.models.auto import modeling_auto

    for mapping in vars(modeling_auto).values():
        if type(mapping).__name__ == "_LazyAutoMapping":
            classes = mapping.get(own, ())
            if model_class in (classes if isinstance(classes, tuple) else (classes,)):
                return True
    return False


_NOT_BUILT = (
    "_attn_implementation", "attn_implementation", "quantization_config", "auto_map", "use_pretrained_backbone",
)  # fmt: skip
"""Keys of config.json that change how weights are fetched, packed or run, not what the parameters are."""
