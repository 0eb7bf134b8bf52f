"""A PEFT adapter folder, known from its headers: every tensor gets a meaning, or the adapter is refused.

Owns: which files make an adapter and how its tensors belong together. What they mean for a base is decided by
`fit/`. Reads no tensor data. Layout: PEFT 0.21 `utils/save_and_load.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_merge.errors import AdapterError, CheckpointError
from ray_merge.spec import SameValues, TensorEntry, View
from ray_merge.storage.adapter_config import Settings, read_settings
from ray_merge.storage.adapter_names import Name, Role
from ray_merge.storage.checkpoint import check_links, read_json
from ray_merge.storage.family import FLOATS, Families, Member, MemberModules, known_name
from ray_merge.storage.headers import fetch_header, parse_header, read_header
from ray_merge.storage.modules import StoredModule
from ray_merge.storage.store import ObjectInfo, Store

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"
MAX_CARD_BYTES = 1_000_000

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip
"""What a trainer saves beside an adapter whose vocabulary grew."""

Pickles = Any
"""A function (store, info) -> path of a local safetensors file with the pickle's tensors; see storage/pickled.py."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A whole parameter that an adapter saved, under its runtime name; `wrapped` if inside an adapted layer."""

    name: str
    entry: TensorEntry
    wrapped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """One adapter folder.

    Args:
        name: the recipe's name of it.
        url: its folder.
        config: the parsed adapter_config.json.
        settings: what it says about the delta.
        modules: adapted modules, sorted.
        saved: whole parameters, sorted.
        tokens: runtime path of an embedding -> its trained rows.
        same: tensors that stand twice and must be equal.
        ignored: tensor names that do not enter a merge -> why.
        file, file_bytes, file_version, pickled: its weights; see `spec.Adapter`.
        unsloth: its card or config mentions Unsloth.
        side_files: tokenizer files beside it.
        initial: the adapter that training started from, if the recipe gives one.
        trained: names that a key_mapping made -> the names in training, which the config's patterns mean.
        member: of a family of plain adapters, where it is one; two with the same family fit a base alike.
    """

    name: str
    url: str
    config: Mapping[str, Any]
    settings: Settings
    modules: Sequence[StoredModule]
    saved: tuple[StoredTensor, ...]
    tokens: Mapping[str, TensorEntry]
    same: tuple[SameValues, ...]
    ignored: Mapping[str, str]
    file: str
    file_bytes: int
    file_version: str
    pickled: bool = False
    unsloth: bool = False
    side_files: tuple[ObjectInfo, ...] = ()
    initial: StoredAdapter | None = None
    trained: Mapping[str, str] = field(default_factory=dict)
    member: Member | None = None

    def in_training(self, name: str) -> str:
        """What a module or parameter was called where the adapter was trained."""
        return self.trained.get(name, name)

    @property
    def where(self) -> str:
        """How messages call its weights."""
        return f"adapter {self.name}: {self.url}/{self.file}"


@dataclass(slots=True)
class _Sorted:
    modules: dict[tuple[str, int], dict[Role, TensorEntry]] = field(default_factory=dict)
    saved: dict[str, StoredTensor] = field(default_factory=dict)
    tokens: dict[str, TensorEntry] = field(default_factory=dict)
    same: list[SameValues] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)

    def sorted_modules(self) -> tuple[StoredModule, ...]:
        """The modules by name and depth."""
        return tuple(StoredModule(*key, tensors) for key, tensors in sorted(self.modules.items()))


def read_adapter(
    name: str,
    store: Store,
    *,
    initial: Store | None = None,
    unpickle: Pickles = None,
    families: Families | None = None,
) -> StoredAdapter:
    """Headers and config of one adapter.

    Args:
        name: the recipe's name of it.
        store: the adapter's folder.
        initial: the folder of the adapter that training started from (PiSSA, OLoRA ...).
        unpickle: converts adapter_model.bin; None refuses it.
        families: of the adapters read so far, where many are read.

    Raises:
        AdapterError: a setting or tensor that cannot be merged exactly.
        CheckpointError: a missing, truncated or malformed file.
    """
    if store.url.endswith((".safetensors", ".bin", ".json")):
        raise AdapterError(f"adapter {name}: {store.url} is a file; give the folder that holds {CONFIG_FILE}")
    check_links(store, [CONFIG_FILE])
    config = read_json(store, CONFIG_FILE)
    settings = read_settings(config, f"adapter {name}: {store.url}/{CONFIG_FILE}")
    started = None if initial is None else read_adapter(f"{name} (initial)", initial, unpickle=unpickle)
    # Looked up before the header is read: a file replaced in between is noticed later.
    file, info = _weights_file(name, store, unpickle)
    where = f"adapter {name}: {store.url}/{file}"
    member, found = None, _Sorted()
    if file == WEIGHTS_FILE and families is not None and started is None:
        member, found = _in_family(store, settings, config, where, families)
    else:
        found = _sort_tensors(_tensors(store, file, info, unpickle), settings, where)
    return StoredAdapter(
        name=name,
        url=store.url,
        config=config,
        settings=settings,
        modules=found.sorted_modules() if member is None else MemberModules(member),
        saved=tuple(found.saved[key] for key in sorted(found.saved)),
        tokens=found.tokens,
        same=tuple(found.same),
        ignored=found.ignored,
        file=file,
        file_bytes=0 if info is None else info.n_bytes,
        file_version="" if info is None else info.version,
        pickled=file == PICKLE_FILE,
        unsloth=_mentions_unsloth(store, config),
        # A request each on object storage: only saved tensors can have changed the vocabulary.
        side_files=_side_files(store) if found.saved else (),
        initial=started,
        member=member,
    )


def _side_files(store: Store) -> tuple[ObjectInfo, ...]:
    found = tuple(info for path in TOKENIZER_FILES if (info := store.info(path)) is not None)
    check_links(store, [info.path for info in found])
    return found


def _in_family(
    store: Store, settings: Settings, config: Mapping[str, Any], where: str, families: Families
) -> tuple[Member | None, _Sorted]:
    """The tensors as a member of a family, or sorted one by one where they make none."""
    raw, n_bytes = fetch_header(store, WEIGHTS_FILE)
    member = families.member(raw, WEIGHTS_FILE, n_bytes, settings, config)
    if member is not None:
        return member, _Sorted()
    header = parse_header(raw, file=WEIGHTS_FILE, file_bytes=n_bytes, where=f"{store.url}/{WEIGHTS_FILE}")
    return None, _sort_tensors(header.tensors, settings, where)


def _weights_file(name: str, store: Store, unpickle: Pickles) -> tuple[str, ObjectInfo | None]:
    info = store.info(WEIGHTS_FILE)
    pickle = store.info(PICKLE_FILE) if info is None else None
    if pickle is None:
        return WEIGHTS_FILE, info
    if unpickle is None:
        raise CheckpointError(
            f"adapter {name}: {store.url} holds a pickle, {PICKLE_FILE}, which can run code when it is loaded; save it "
            "as safetensors, or write allow_pickle: true behind its path to have tensors alone read from it"
        )
    return PICKLE_FILE, pickle


def _tensors(
    store: Store, file: str, info: ObjectInfo | None, unpickle: Pickles
) -> Mapping[str, TensorEntry]:
    if file == WEIGHTS_FILE:
        return read_header(store, file).tensors
    converted: Path = unpickle(store, info)
    from ray_merge.storage.store import open_store

    tensors = read_header(open_store(str(converted.parent)), converted.name).tensors
    return {key: replace(entry, file=file) for key, entry in tensors.items()}


def _mentions_unsloth(store: Store, config: Mapping[str, Any]) -> bool:
    """Unsloth packed the experts' B in another order, and shapes do not show it."""
    texts = [str(config.get("base_model_name_or_path")), str(config.get("auto_mapping"))]
    card = store.info(CARD_FILE) if config.get("target_parameters") else None
    if card is not None and card.n_bytes:
        texts.append(store.read(CARD_FILE, 0, min(card.n_bytes, MAX_CARD_BYTES)).decode("utf-8", "replace"))
    return any("unsloth" in text.lower() for text in texts)


def _sort_tensors(tensors: Mapping[str, TensorEntry], settings: Settings, where: str) -> _Sorted:
    found = _Sorted()
    for key, entry in sorted(tensors.items()):
        name = known_name(key, settings.training_only)
        if isinstance(name, str):
            raise AdapterError(
                f"{where}: tensor {key!r} {name}, which is not supported; nothing of an adapter is dropped silently"
            )
        _check_entry(key, entry, name, where)
        _place(key, entry, name, found, where)
    for (module, _), roles in found.modules.items():
        _check_pairs(module, roles, settings, where)
    if not found.modules and not found.saved and not found.tokens:
        raise AdapterError(f"{where} holds no LoRA factor")
    return found


def _place(key: str, entry: TensorEntry, name: Name, found: _Sorted, where: str) -> None:
    if name.role == "ignored":
        found.ignored[key] = name.why
    elif name.role == "saved":
        before = found.saved.get(name.module)
        if before is not None:
            # PEFT with bias: all saves the bias of a module of modules_to_save under two names.
            why = f"{key!r} and {before.name!r} are two values of one parameter"
            if before.entry.shape != entry.shape or not {before.entry.dtype, entry.dtype} <= set(FLOATS):
                raise AdapterError(
                    f"{where}: {why}, of different shapes or no floats; save the adapter again"
                )
            found.same.append(SameValues(_flat(entry), _flat(before.entry), f"{where}: {why}"))
        else:
            found.saved[name.module] = StoredTensor(name.module, entry, name.wrapped)
    elif name.role == "tokens":
        if name.module in found.tokens:
            raise AdapterError(
                f"{where}: the trained tokens of {name.module} stand twice; save the adapter again"
            )
        found.tokens[name.module] = entry
    else:
        roles = found.modules.setdefault((name.module, name.depth), {})
        if name.role in roles:
            raise AdapterError(
                f"{where}: {name.module} has two tensors for its {name.role} (one is {key!r}); save the adapter again "
                "from one model"
            )
        roles[name.role] = entry


def _flat(entry: TensorEntry) -> View:
    size = 1
    for length in entry.shape:
        size *= length
    return View(entry, (size, 1))


def _check_entry(key: str, entry: TensorEntry, name: Name, where: str) -> None:
    if name.role == "ignored":
        return
    # A saved BatchNorm counts its batches in whole numbers.
    if entry.dtype not in FLOATS and name.role != "saved":
        raise AdapterError(f"{where}: {key!r} is of dtype {entry.dtype}; expected one of {', '.join(FLOATS)}")
    if 0 in entry.shape:
        raise AdapterError(
            f"{where}: {key!r} has the empty shape {entry.shape}: a sharded (ZeRO-3, FSDP) training saved it without "
            "gathering; save it again from the gathered model"
        )


def _check_pairs(module: str, roles: Mapping[Role, TensorEntry], settings: Settings, where: str) -> None:
    pairs: tuple[tuple[Role, Role], ...] = (("A", "B"), ("embedding_A", "embedding_B"))
    for one, other in pairs:
        if (one in roles) != (other in roles):
            have, lack = (one, other) if one in roles else (other, one)
            raise AdapterError(f"{where}: {module} has lora_{have} but no lora_{lack}")
    if "A" in roles and "embedding_A" in roles:
        raise AdapterError(
            f"{where}: {module} has factors of a linear layer and of an embedding; save it again"
        )
    if not {"A", "embedding_A"} & roles.keys():
        raise AdapterError(f"{where}: {module} has {', '.join(sorted(roles))} but no factors")
    if ("magnitude" in roles) != settings.dora:
        has, says = ("has", "false") if "magnitude" in roles else ("lacks", "true")
        raise AdapterError(
            f"{where}: {module} {has} a lora_magnitude_vector, but {CONFIG_FILE} says use_dora: {says}"
        )
    if ("B.bias" in roles) and not settings.lora_bias:
        raise AdapterError(
            f"{where}: {module} has a bias on B, but {CONFIG_FILE} does not say lora_bias: true"
        )
    if settings.lora_bias and "B" in roles and "B.bias" not in roles:
        raise AdapterError(
            f"{where}: {module} lacks the bias on B that {CONFIG_FILE} promises (lora_bias: true)"
        )
