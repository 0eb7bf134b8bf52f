"""The recipe as validated models: what a platform engineer may write, and nothing else.

Owns the recipe's keys, their types and their defaults (DESIGN: interfaces). Knows no files but the recipe's
own text, and no merge method but through the registry.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictInt,
    Tag,
    ValidationError,
    model_validator,
)

from ray_merge.errors import RecipeError, shown
from ray_merge.recipe.names import check_merge_name, check_name
from ray_merge.recipe.placement import SPREAD, Placement, long_form
from ray_merge.recipe.problems import describe
from ray_merge.recipe.size import parse_size
from ray_merge.recipe.source import MAX_RECIPE_BYTES, Source, nearest, parse_yaml, plain_data
from ray_merge.spec import FLOAT_DTYPES, Export

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
assert set(FLOAT_DTYPES) == {"float16", "bfloat16", "float32", "float64"}


def _one_size(value: Any) -> Any:
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _only_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _one_text(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value  # `parameters:` with nothing behind it


def _none_is_no_entry(value: Any) -> Any:
    return [] if value is None else value  # `merges:` likewise


def _check_mapping(value: Any) -> Any:
    """Rules that rewrite names, each tried once here so that a broken one is refused at its line."""
    for pattern, replacement in value.items() if isinstance(value, dict) else ():
        try:
            # The text of a replacement is checked only where something matches: an empty branch always does.
            re.compile(str(pattern))
            re.sub(f"(?:{pattern})|", str(replacement), "")
        except (re.error, IndexError) as error:
            raise ValueError(
                f"{shown(pattern)}: {shown(replacement)} is no rule for names ({error})"
            ) from error
    return value


Size = Annotated[int, BeforeValidator(parse_size)]
Name = Annotated[str, BeforeValidator(check_name)]
MergeName = Annotated[str, BeforeValidator(check_merge_name)]
KeyMapping = Annotated[dict[str, str], BeforeValidator(_check_mapping)]
"""Regular expressions on runtime names -> what takes their place, in order."""
Word = Annotated[str, Field(min_length=1)]
Columns = Annotated[list[Word], Field(min_length=1, max_length=2)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class DataSource(_Model):
    """Where a task's unlabelled inputs are: a file, a folder of files or a glob.

    `text` names one text column or the two of a pair; `limit` looks at the first rows only.
    """

    path: str
    text: Annotated[Columns | None, BeforeValidator(_one_text)] = None
    limit: int | None = Field(default=None, ge=1)


class Evaluation(_Model):
    """Labelled data and the metric of a task."""

    path: str
    label: str = "label"
    metric: Literal["accuracy", "f1", "mcc", "pearson", "spearman", "perplexity", "exact_match"]


TaskKind = Literal[
    "classification", "regression", "generation",
    "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION",
]  # fmt: skip
"""What an adapter's head is for: in plain words, or as PEFT's task types."""


class HeadSource(_Model):
    """A text head: a safetensors file with one matrix, a row for each class.

    logits = logit_scale * cos(embedding, row). CLIP's own scale is about 100; with 1 every entropy stays near ln C.
    """

    path: Word
    logit_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class AdapterSource(_Model):
    """One adapter: its folder and, for methods that learn or measure, its data.

    `initial` is the adapter that PiSSA, OLoRA ... training started from; `moe_lora_b_layout` says how the experts'
    lora_B is packed where an adapter does not (Unsloth).
    """

    path: str | None = None
    data: Annotated[DataSource | None, BeforeValidator(_only_path)] = None
    task: TaskKind | None = None
    eval: Evaluation | None = None
    head: Annotated[HeadSource | None, BeforeValidator(_only_path)] = None
    initial: str | None = None
    allow_pickle: bool = False
    key_mapping: KeyMapping = Field(default_factory=dict)
    moe_lora_b_layout: Literal["rank_major", "grouped_by_expert"] | None = None


class Calibration(_Model):
    """Which inputs the moments are taken from, and how.

    `samples` rows a task, texts cut at `max_length` tokens; `features` says whether a task's own adapter is active.
    A sketch keeps `sketch_rows` rows of a site's Gram.
    """

    samples: int = Field(default=128, ge=1)
    max_length: int = Field(default=256, ge=1)
    batch_size: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    features: Literal["base", "adapter"] = "base"
    precision: Literal["full", "sketch"] = "full"
    sketch_rows: int = Field(default=256, ge=2)


class Init(_Model):
    """Adapters to fine-tune from: where they go, and how their A is found from the other tasks' moments.

    `others` are the tasks to stay clear of (default: all but the adapter's own); `project` takes adapters that are
    trained already.
    """

    method: Literal["osrm"]
    r: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    target_modules: list[Word] = Field(min_length=1)
    mode: Literal["covariance", "means"] = "covariance"
    row_scale: Literal["orthonormal", "peft"] = "orthonormal"
    others: Annotated[list[Name], Field(min_length=1)] | None = None
    output: Word
    project: bool = False


class Combinations(_Model):
    """Every subset of the adapters of one size, or of each of several sizes."""

    choose: Annotated[list[StrictInt], BeforeValidator(_one_size), Field(min_length=1)]


class Simplex(_Model):
    """Every preference whose shares are whole multiples of 1 / `simplex`, at least one for each adapter."""

    simplex: StrictInt = Field(ge=1, le=10**6)


def _preferences_kind(value: Any) -> str:
    return "a grid" if isinstance(value, dict | Simplex) else "a list"


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Listed = Annotated[list[dict[Name, Positive]], Field(min_length=1)]
Preferences = Annotated[
    Annotated[Listed, Tag("a list")] | Annotated[Simplex, Tag("a grid")], Discriminator(_preferences_kind)
]
"""The blanks in the tags keep them apart from keys of the recipe in the places of errors."""


class MergeSource(_Model):
    """One entry of `merges`, before sweeps, combinations and preferences are expanded.

    `heads` is the adapter whose head the checkpoint gets, `export_class` the task type that an exported adapter is for.
    """

    name: MergeName
    merge_method: str
    adapters: list[Name] | None = None
    parameters: Annotated[dict[str, Any], BeforeValidator(_none_is_empty)] = Field(default_factory=dict)
    sweep: dict[str, list[Any]] | None = None
    combinations: Combinations | None = None
    preferences: Preferences | None = None
    export: Export = "checkpoint"
    export_rank: int | None = Field(default=None, ge=1)
    export_tolerance: float | None = Field(default=None, ge=0, lt=1)
    export_class: Word | None = None
    heads: Name | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)


class Recipe(_Model):
    """A whole recipe. Paths are as written; relative ones count from the working directory."""

    base_model: str
    base_model_names: list[str] = Field(default_factory=list)
    output: str
    store: str | None = None
    dtype: Literal["float32", "float64"] = "float32"
    out_dtype: Dtype | None = None
    max_shard_size: Size = 10**9
    max_merges: int = Field(default=1000, ge=1)
    adapters: dict[Name, AdapterSource]
    calibration: Calibration | None = None
    stages: int | None = Field(default=None, ge=1)
    init: Init | None = None
    diagnostics: bool = False
    placement: Annotated[Placement, BeforeValidator(long_form)] = SPREAD
    tied: Literal["refuse", "untie"] = "refuse"
    base_numerics: Literal["reject", "dequantise"] = "reject"
    key_mapping: KeyMapping = Field(default_factory=dict)
    merges: Annotated[list[MergeSource], BeforeValidator(_none_is_no_entry)] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _short_adapters(cls, value: Any) -> Any:
        # `mnli: s3://adapters/mnli` is the short form of `mnli: {path: s3://adapters/mnli}`.
        if isinstance(value, dict) and isinstance(value.get("adapters"), dict):
            long = {k: {"path": v} if isinstance(v, str) else v for k, v in value["adapters"].items()}
            return {**value, "adapters": long}
        return value


def load_recipe(recipe: str | Path | dict[str, Any], text: str | None = None) -> tuple[Recipe, Source]:
    """Parse and validate a recipe.

    Args:
        recipe: a local path, or the recipe as a mapping (from Python).
        text: the YAML text, when the caller has read it already (remote recipes).

    Returns:
        The recipe and its source, which knows the line of each key.

    Raises:
        RecipeError: the file is missing, no YAML, or not a valid recipe; with file, line and nearest key.
    """
    if isinstance(recipe, dict):
        source = Source("recipe", plain_data(recipe), {})
    else:
        if text is None:
            try:
                if Path(recipe).exists() and not Path(recipe).is_file():
                    # A pipe without a writer would be waited for without end.
                    raise RecipeError(f"cannot read recipe {recipe}: it is no file")
                with Path(recipe).open(encoding="utf-8") as file:
                    text = file.read(MAX_RECIPE_BYTES + 1)  # a checkpoint given by mistake is not read whole
            except UnicodeDecodeError as error:
                raise RecipeError(f"cannot read recipe {recipe}: not UTF-8 text") from error
            except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                raise RecipeError(f"cannot read recipe {recipe}: {reason}") from error
        source = parse_yaml(text, str(recipe))
    if not isinstance(source.value, dict):
        raise RecipeError(
            f"{source.name}: a recipe is a mapping with base_model, output, adapters and merges"
        )
    _check_text(source)
    try:
        parsed = Recipe.model_validate(source.value)
    except ValidationError as error:
        raise RecipeError(describe(error, source, _known_keys)) from error
    _check_others(parsed, source)
    return parsed, source


def require_merges(recipe: Recipe, source: Source) -> None:
    """Refuse a recipe without merges, which `calibrate` and `init` take and `plan` and `run` do not.

    Raises:
        RecipeError: there is no merge.
    """
    if not recipe.merges:
        raise RecipeError(f"{source.where(('merges',))}: merges is empty: nothing to do")


def _check_others(recipe: Recipe, source: Source) -> None:
    others = (recipe.init.others if recipe.init else None) or []
    for index, name in enumerate(others):
        where = f"{source.where(('init', 'others', index))}: init.others"
        if name not in recipe.adapters:
            raise RecipeError(f"{where}: unknown adapter {name!r}{nearest(name, list(recipe.adapters))}")
        if name in others[:index]:
            raise RecipeError(f"{where}: adapter {name!r} stands twice")


def _check_text(source: Source) -> None:
    """Refuse halves of surrogate pairs, which YAML and JSON can write as escapes: no file can have such a name."""
    try:
        json.dumps(source.value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise RecipeError(
            f"{source.name}: it holds {half}, half of a surrogate pair, which is no text"
        ) from error


def _known_keys(path: tuple[str | int, ...]) -> set[str]:
    models: dict[tuple[str | int, ...], type[BaseModel]] = {
        (): Recipe, ("calibration",): Calibration, ("init",): Init,
        ("merges",): MergeSource, ("merges", "combinations"): Combinations,
        ("merges", "preferences"): Simplex,
        ("adapters",): AdapterSource, ("adapters", "data"): DataSource, ("adapters", "eval"): Evaluation,
        ("adapters", "head"): HeadSource, ("placement",): Placement,
    }  # fmt: skip
    # The second part is an index or an adapter's own name, which may be a word of ours: an adapter `data`.
    return set(models[(*path[:1], *path[2:])].model_fields)
