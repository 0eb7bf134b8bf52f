"""Seeded mutations of a merge's inputs. `case_of(seed)` always gives the same case for the same seed."""

from __future__ import annotations

import io
import json
import pickle
import random
import stat
import string
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from fuzz_inputs import (
    ADAPTER_CONFIG,
    BASE_CONFIG,
    HIDDEN,
    MODULES,
    PREFIX,
    WIDTHS,
    Inputs,
    Link,
    Node,
    Sparse,
    Tensors,
    adapter_tensors,
    base_tensors,
    file_of,
    good_inputs,
    header_of,
    safetensors,
    zeros,
)

Mutation = Callable[[random.Random, Inputs], None]

CONFIG = "a/adapter_config.json"
WEIGHTS = "a/adapter_model.safetensors"
BASE = "base/model.safetensors"
INDEX = "base/model.safetensors.index.json"

# Values


def deep(levels: int, rng: random.Random) -> str:
    """JSON text of so many lists or mappings inside each other."""
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    return opening * levels + "1" + closing * levels


def junk_text(rng: random.Random) -> str:
    """JSON text of a value that hardly any key expects."""
    kind = rng.randrange(20)
    if kind == 0:
        return deep(rng.choice([3, 50, 200, 900, 985, 20_000]), rng)
    if kind == 1:
        return rng.choice(["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e308", "5e-324", "-0.0"])
    if kind == 2:
        return rng.choice(["1", "-1", "0", "2", "65536", "9" * 19, "9" * 400, "9" * 4200, "9" * 5000, "-5"])
    if kind == 3:
        return json.dumps("x" * rng.choice([1, 300, 5000, 200_000]))
    if kind == 4:
        return json.dumps([rng.choice([0, "q", None, 1.5])] * rng.choice([1, 300, 20_000]))
    if kind == 5:
        return '"\\ud800"'
    if kind == 6:
        return json.dumps({str(i): i for i in range(rng.choice([1, 40, 5000]))})
    return json.dumps(
        rng.choice(
            [
                None, True, False, 0, 1, 2, -1, 1.5, "", "yes", "none", "true", "2", [], {}, [[]], [1], [None],
                ["q_proj"],
                ["classifier"], {"q_proj": 2}, {"": 1}, {"a": {"b": []}}, "\0", "\x1b[31m", "a\nb", "\u202e", "..",
                 "../../etc",
                "/etc/passwd", ".*", "all", "lora_only", "pissa", "eva", "loftq", "gaussian", {"embed_tokens": [0,
                1]},
                {"embed_tokens": [10**9, -1, "x"]}, [0, 1], [-1], "all-linear", 3, ["lm_head"], ["embed_tokens"],
                "F" * 80,
                "0.17.0", "../x", [["q_proj", 3]], {"rho": 2.0}, "rank_major",
            ]
        )
    )  # fmt: skip


def object_text(pairs: list[tuple[str, str]]) -> bytes:
    """A JSON object of raw value texts; keys may repeat."""
    return ("{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in pairs) + "}").encode(
        "utf-8", "surrogatepass"
    )


def with_junk(document: dict[str, Any], more: list[str], rng: random.Random) -> bytes:
    """The document with one to three values replaced by junk, one key removed or one repeated now and then."""
    pairs = {key: json.dumps(value) for key, value in document.items()}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key = rng.choice([*document, *more]) if rng.random() < 0.95 else random_name(rng)
        pairs[key] = junk_text(rng)
    if rng.random() < 0.1:
        pairs.pop(rng.choice([*pairs]))
    listed = [*pairs.items()]
    if rng.random() < 0.07:
        listed.append((rng.choice(listed)[0], junk_text(rng)))
    return object_text(listed)


def spoil_bytes(data: bytes, rng: random.Random, upto: int | None = None) -> bytes:
    """One to four edits of the first `upto` bytes; the length may change."""
    limit = len(data) if upto is None else min(upto, len(data))
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(limit + 1)
        kind = rng.randrange(6)
        if kind == 0 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(result):
            result[place] = rng.choice(b'\0\xff{}[]",:0-9e.\\ \n')
        elif kind == 2:
            del result[place : place + rng.choice([1, 2, 8, 50])]
        elif kind == 3:
            result[place:place] = rng.choice(
                [
                    b"\0",
                    b"\xff\xfe",
                    b"\xef\xbb\xbf",
                    b'"',
                    b"[",
                    b"{",
                    b",",
                    b"9" * 40,
                    b"\\ud83d",
                    b" " * 100,
                ]
            )
        elif kind == 4:
            result[place:place] = result[place : place + rng.choice([1, 10, 60])]
        else:
            del result[place:]
    return bytes(result)


def random_name(rng: random.Random) -> str:
    """A key or part of a tensor name."""
    return "".join(rng.choices(string.ascii_lowercase + "._", k=rng.randrange(1, 12)))


# Adapter configs

CONFIG_KEYS = [
    "alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_B_layout", "lora_bias", "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_qalora", "velora_config", "use_next_lora", "_custom",
]  # fmt: skip

HOSTILE_PATTERNS = [
    "(a+)+$", "(.*)*x", "(.*.*)*q_proj", "((.*)+)+", "(model|mod.l|.*)*x", "(x+x+)+y", "(.|.)*x", "(a|aa)+$",
    ".*" * 40,
    "(?=.*)q_proj", "(?<=.)q_proj", r"(q_proj)\1", "(?i)q_proj", "(?i:Q_PROJ)", "a{65000}", "(.{1,99}){1,99}", "(",
    ")",
    "*", "[", "[[]", "q_proj)|(v_proj", "", "^", "$", r"\Z", r"\b", "(?P<n>q)(?P<n>q)", "q_proj#", "a{99999999999}",
    "((((((((((a?){9}){9}){9}){9}){9}){9}){9}){9}){9}){9}", "(" * 300 + ")" * 300, "x" * 3000, r"\d+" * 30,
    "(?:)*" * 20,
    "(?>a+)", "a++", "(?P=x)", "(?(1)a|b)", r"\p{L}", r"\N{DIGIT ONE}", "[z-a]",
]  # fmt: skip
PLAIN_PATTERNS = [
    "q_proj", "layers.0.self_attn.q_proj", r".*self_attn\.q_proj", r"model\.layers\.(0|1)\.self_attn\..*",
    r"^model\.layers\.\d+\.self_attn\.q_proj", "q_proj|v_proj", "nosuch",
]  # fmt: skip


def config_values(rng: random.Random, inputs: Inputs) -> None:
    inputs.files[CONFIG] = with_junk(ADAPTER_CONFIG, CONFIG_KEYS, rng)
    if rng.random() < 0.3:  # its values are compared with those of the others, and some are written again
        inputs.recipe["merges"][0]["export"] = rng.choice(["adapter", "both"])


def config_bytes(rng: random.Random, inputs: Inputs) -> None:
    text = json.dumps(ADAPTER_CONFIG)
    kind = rng.randrange(8)
    if kind == 0:
        data = text.encode(rng.choice(["utf-8-sig", "utf-16", "utf-32", "utf-16-le"]))
    elif kind == 1:
        data = rng.choice([b"", b"null", b"3", b"[]", b'"x"', b"\xff\xfe", b"\0" * 100, b"{}", b"NaN"])
    elif kind == 2:
        data = deep(rng.choice([100, 990, 100_000]), rng).encode()
    else:
        data = spoil_bytes(text.encode(), rng)
    inputs.files[CONFIG] = data


def config_patterns(rng: random.Random, inputs: Inputs) -> None:
    pairs = {key: json.dumps(value) for key, value in ADAPTER_CONFIG.items()}
    for field in rng.choice([["rank_pattern"], ["alpha_pattern"], ["rank_pattern", "alpha_pattern"]]):
        keys = rng.sample(HOSTILE_PATTERNS, rng.randrange(1, 4)) + rng.sample(
            PLAIN_PATTERNS, rng.randrange(2)
        )
        values = [junk_text(rng) if rng.random() < 0.3 else "2" for _ in keys]
        pairs[field] = object_text(list(zip(keys, values, strict=True))).decode()
    if rng.random() < 0.5:  # longer names make bad patterns worse
        renamed = {
            name.replace(MODULES[0], "a" * 60 + "." + MODULES[0] + "b" * rng.randrange(2)): tensor
            for name, tensor in adapter_tensors(MODULES[0]).items()
        }
        inputs.files[WEIGHTS] = safetensors(renamed)
    inputs.files[CONFIG] = object_text([*pairs.items()])


# Tensors of adapters

SUFFIXES = [
    "lora_A.weight", "lora_B.weight", "lora_A", "lora_B", "lora_A.bias", "lora_B.bias", "lora_magnitude_vector",
    "lora_magnitude_vector.weight", "lora_embedding_A", "lora_embedding_B", "lora_embedding_A.weight", "lora_diag",
    "lora_E",
    "lora_A.default.weight", "base_layer.weight", "base_layer.lora_A.weight", "token_adapter.trainable_tokens_delta",
    "trainable_tokens_delta", "token_adapter.base_layer.weight", "modules_to_save.default.weight",
    "original_module.weight", "weight", "bias", "lora_A.weight.absmax", "lora_dropout.p", "vera_lambda_b",
    "hada_w1_a",
    "oft_r", "prompt_embeddings", "lora_C.weight", "lora_mask", "ranknum", "lora_B.weight.weight",
    "lora_A_std", "lora_ga_A", "base_layer.base_layer.lora_B.weight",
]  # fmt: skip
ODD_MODULES = [
    "model.embed_tokens", "lm_head", "model.norm", "classifier", "score", "model.layers.0.self_attn", "", ".", "..",
    "../../etc", "model..q_proj", "/etc/passwd", "model.layers.9.self_attn.q_proj", "model.layers.0.mlp.experts",
    "model.layers.0.mlp.experts.base_layer", "a\x00b", "a\nb", "\x1b[2J", "\u202egnp", "caf\u00e9", "\ud800",
    "x" * 5000,
    "self_attn.q_proj", "layers.0.self_attn.q_proj", "model.layers.\u0660.self_attn.q_proj",
    "model.layers.\u00b2.self_attn.q_proj", "model.layers.00.self_attn.q_proj", "__metadata__", "model.layers.-1.q",
    "model.layers.0.self_attn.q_proj.q_proj", "model.layers.0.self_attn.q_proj ",
]  # fmt: skip
SHAPES: list[list[int]] = [
    [], [0], [0, HIDDEN], [HIDDEN, 0], [2], [HIDDEN], [1, HIDDEN], [HIDDEN, 1], [3, HIDDEN], [2, 9], [HIDDEN, HIDDEN],
    [2, HIDDEN, 1, 1], [2, HIDDEN, 3, 3], [HIDDEN, 2, 1, 1], [1, 2, HIDDEN], [16, 2], [2, 16], [1] * 65, [1] * 8,
     [4, HIDDEN],
    [HIDDEN, 4], [0, 0], [2, 0], [16, HIDDEN], [18, HIDDEN], [1000, HIDDEN], [HIDDEN, 1000],
]  # fmt: skip


def _put_tensors(tensors: Tensors, inputs: Inputs) -> None:
    # Surrogates cannot be written as such, only as JSON escapes, which is what json.dumps makes of them.
    inputs.files[WEIGHTS] = safetensors(tensors)


def adapter_names(rng: random.Random, inputs: Inputs) -> None:
    tensors = dict(adapter_tensors(MODULES[0]))
    for _ in range(rng.choice([1, 2, 2])):
        kind = rng.randrange(6)
        if kind == 0:
            tensors.pop(rng.choice([*tensors]), None)
        elif kind == 1:
            old = rng.choice([*tensors])
            tensors = {
                (rng.choice(["", "base_model.", "../", "x."]) + name if name == old else name): tensor
                for name, tensor in tensors.items()
            }
        elif kind == 2:
            module = rng.choice(ODD_MODULES)
            tensors = {name.replace(MODULES[0], module): tensor for name, tensor in tensors.items()}
        else:
            module = rng.choice([MODULES[0], MODULES[0], "model.embed_tokens", rng.choice(ODD_MODULES)])
            for suffix in rng.sample(SUFFIXES, rng.choice([1, 1, 2])):
                shape = rng.choice(SHAPES)
                tensors[f"{PREFIX}{module}.{suffix}"] = zeros("F32", shape)
        if not tensors:
            break
    if rng.random() < 0.3:
        extra = {
            "modules_to_save": rng.choice(
                [["classifier"], ["lm_head"], ["embed_tokens"], ["norm"], [""], ["."]]
            ),
            "use_dora": rng.random() < 0.3,
            "lora_bias": rng.random() < 0.3,
            "bias": rng.choice(["none", "none", "all", "lora_only"]),
            "trainable_token_indices": rng.choice([None, [0, 3], {"embed_tokens": [1]}]),
            "target_parameters": rng.choice([None, None, ["mlp.experts.gate_up_proj"]]),
        }
        inputs.files[CONFIG] = json.dumps({**ADAPTER_CONFIG, **extra}).encode()
    _put_tensors(tensors, inputs)


def adapter_shapes(rng: random.Random, inputs: Inputs) -> None:
    tensors = dict(adapter_tensors(MODULES[0]))
    for name in rng.sample([*tensors], rng.choice([1, 1, 2])):
        dtype = (
            rng.choice(["F32"] * 6 + [*WIDTHS])
            if rng.random() < 0.9
            else rng.choice(["F4", "C64", "f32", ""])
        )
        shape = rng.choice(SHAPES) if rng.random() < 0.8 else tensors[name][1]
        tensors[name] = zeros(dtype, shape)
    rank = rng.choice([2, 2, 2, 1, 3, HIDDEN, 1000, 10**18])
    inputs.files[CONFIG] = json.dumps({**ADAPTER_CONFIG, "r": rank}).encode()
    _put_tensors(tensors, inputs)


def adapter_numbers(rng: random.Random, inputs: Inputs) -> None:
    values = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 1e30, 0.0]
    tensors: Tensors = {}
    for name, (_, shape, data) in adapter_tensors(MODULES[0]).items():
        numbers = [*struct.unpack(f"<{len(data) // 4}f", data)]
        for _ in range(rng.choice([0, 1, 16])):
            numbers[rng.randrange(len(numbers))] = rng.choice(values)
        tensors[name] = ("F32", shape, struct.pack(f"<{len(numbers)}f", *numbers))
    alpha = rng.choice([4, 4, 0, -3, 1e300, 1e38, 1e-300, 10**300])
    inputs.files[CONFIG] = json.dumps({**ADAPTER_CONFIG, "lora_alpha": alpha}).encode()
    _put_tensors(tensors, inputs)


# Safetensors headers

ODD_NUMBERS: list[Any] = [
    -1, True, False, 0.0, 4.0, 1.5, "4", None, [], 2**31, 2**62, 2**63, 2**64, 10**300, float("nan"), float("inf"),
    {},
    -(2**63),
]  # fmt: skip


@dataclass
class _File:
    """A safetensors file that is being spoilt; `text` takes the place of the header, `length` is what it claims."""

    header: dict[str, Any]
    data: bytes
    rng: random.Random
    text: str | None = None
    length: int | None = None

    def name(self) -> str:
        """One of its tensors that still looks like one."""
        whole = [
            name
            for name, entry in self.header.items()
            if isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= set(entry)
        ]
        return self.rng.choice(whole) if whole else "x"

    def entry(self) -> dict[str, Any]:
        """Its entry."""
        return self.header.setdefault(self.name(), {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})


def _odd_offset(file: _File) -> None:
    entry = file.entry()
    end = (
        entry["data_offsets"][-1] if isinstance(entry["data_offsets"], list) and entry["data_offsets"] else 4
    )
    entry["data_offsets"] = file.rng.choice(
        [[file.rng.choice(ODD_NUMBERS), end], [0, file.rng.choice(ODD_NUMBERS)]]
    )


def _odd_offsets(file: _File) -> None:
    n_bytes = len(file.data)
    file.entry()["data_offsets"] = file.rng.choice(
        [
            [0, 0],
            [64, 0],
            [0],
            [0, 1, 2],
            [],
            None,
            "0,4",
            {"0": 0, "1": 4},
            [8, 72],
            [0, 2**40],
            [n_bytes, n_bytes],
        ]
    )


def _same_offsets(file: _File) -> None:
    file.entry()["data_offsets"] = file.entry()["data_offsets"]


def _odd_shape(file: _File) -> None:
    odd = file.rng.choice(ODD_NUMBERS)
    file.entry()["shape"] = file.rng.choice(
        [[odd], [2, odd], [2**32, 2**32], [2**62, 4], [2**63 - 1] * 8, [1] * 70, [0, 2**62], [2**62] * 3000, "8",
         None, 8, {}]
    )  # fmt: skip


def _odd_dtype(file: _File) -> None:
    file.entry()["dtype"] = file.rng.choice(
        [
            "F33",
            "f32",
            "F64",
            "BF16",
            "I64",
            None,
            3,
            [],
            {},
            "F32 ",
            "",
            "U8",
            "F8_E8M0",
            "F4",
            "x" * 5000,
            [[[[3]]]],
        ]
    )


def _missing_key(file: _File) -> None:
    entry = file.entry()
    entry.pop(file.rng.choice([*entry]))


def _more_keys(file: _File) -> None:
    file.entry()["extra"] = file.rng.choice([None, 3, "x", [[]], {"a": 1}])


def _no_entry(file: _File) -> None:
    file.header[file.name()] = file.rng.choice([None, 3, [], {}, "x", [1, 2, 3], True])


def _odd_metadata(file: _File) -> None:
    file.header["__metadata__"] = file.rng.choice(
        [None, 3, [], {"a": 1}, {"a": None}, "x", {"a": {}}, {"a": "b" * 10_000}, {"a": "\ud800"}, {"": ""}]
    )


def _odd_tensor(file: _File) -> None:
    name = file.rng.choice(
        ["", "..", "../x", "a\nb", "\0", "x" * 9000, "\ud800", "\u202e", "\u00b2", "1\u00b22"]
    )
    file.header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [len(file.data), len(file.data)]}


def _other_data(file: _File) -> None:
    data = file.data
    file.data = file.rng.choice([data[:-1], data + b"\0", data[: len(data) // 2], b"", data + data])


def _other_length(file: _File) -> None:
    file.length = file.rng.choice(
        [0, 1, 7, 10**6, 25 * 10**6, 10**8, 2**31, 2**63, 2**64 - 1, len(file.data), -8]
    )


def _one_more_dimension(file: _File) -> None:
    entry = file.entry()
    entry["shape"] = [*entry["shape"], 1] if isinstance(entry["shape"], list) else [1]


def _other_order(file: _File) -> None:
    file.header = {name: file.header[name] for name in file.rng.sample([*file.header], len(file.header))}


def _name_twice(file: _File) -> None:
    name = file.name()
    file.text = json.dumps(file.header)[:-1] + f", {json.dumps(name)}: {json.dumps(file.header.get(name))}}}"


def _other_text(file: _File) -> None:
    text, rng = json.dumps(file.header), file.rng
    file.text = rng.choice(
        ["null", "[]", "3", '"x"', "{", "}", "", "{}", deep(900, rng), deep(30_000, rng), '{"a":}', f"\ufeff{text}",
         f"  {text}", text + " " * 50, text + "\0" * 8, text + "{}"]
    )  # fmt: skip


_HEADER_EDITS: list[Callable[[_File], None]] = [
    _odd_offset, _odd_offset, _odd_offsets, _same_offsets, _odd_shape, _odd_shape, _odd_dtype, _missing_key,
    _more_keys,
    _no_entry, _odd_metadata, _odd_tensor, _other_data, _other_length, _one_more_dimension, _other_order, _name_twice,
    _other_text,
]  # fmt: skip


def spoilt_file(tensors: Tensors, rng: random.Random) -> bytes:
    """The tensors as a safetensors file with up to three things wrong in its header."""
    file = _File(header_of(tensors), b"".join(data for _, _, data in tensors.values()), rng)
    for edit in rng.choices(_HEADER_EDITS, k=rng.choice([1, 2, 2, 3])):
        edit(file)
    header = file.header if file.text is None else file.text.encode("utf-8", "surrogatepass")
    return file_of(header, file.data, file.length)


def adapter_header(rng: random.Random, inputs: Inputs) -> None:
    inputs.files[WEIGHTS] = spoilt_file(adapter_tensors(rng.choice(MODULES)), rng)


def adapter_bytes(rng: random.Random, inputs: Inputs) -> None:
    data = inputs.files[WEIGHTS]
    assert isinstance(data, bytes)
    header = 8 + int.from_bytes(data[:8], "little")
    kind = rng.randrange(4)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        data += rng.randbytes(rng.choice([1, 8, 1000]))
    elif kind == 2:
        data = spoil_bytes(data, rng, upto=8)
    else:
        data = spoil_bytes(data, rng, upto=header)
    inputs.files[WEIGHTS] = data


# Files of many megabytes


def _large_setting(field: str, make: Callable[[], str]) -> Mutation:
    def mutation(rng: random.Random, inputs: Inputs) -> None:
        pairs = {key: json.dumps(value) for key, value in ADAPTER_CONFIG.items()}
        inputs.files[CONFIG] = object_text([*(pairs | {field: make()}).items()])

    return mutation


def _large_header(path: str, make: Callable[[], bytes]) -> Mutation:
    def mutation(rng: random.Random, inputs: Inputs) -> None:
        inputs.files[path] = file_of(make(), b"")

    return mutation


def _many_tensors(count: int) -> bytes:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [f"{PREFIX}m.{i}.lora_{side}.weight" for i in range(count // 2) for side in "AB"]
    return ("{" + ",".join(f'"{name}":{entry}' for name in names) + "}").encode()


def _long_header(rng: random.Random, inputs: Inputs) -> None:
    inputs.files[WEIGHTS] = Sparse((90_000_000).to_bytes(8, "little") + b'{"a":[', 90_000_100)


def _endless_file(rng: random.Random, inputs: Inputs) -> None:
    inputs.files[BASE] = Sparse((2**40).to_bytes(8, "little"), 2**41)


def _large_head(rng: random.Random, inputs: Inputs) -> None:
    tensors = adapter_tensors(MODULES[0])
    header = header_of(tensors)
    position = sum(len(data) for _, _, data in tensors.values())
    header[f"{PREFIX}classifier.weight"] = {
        "dtype": "F32", "shape": [4, 15_625_000], "data_offsets": [position, position + 250_000_000],
    }  # fmt: skip
    start = file_of(header, b"".join(data for _, _, data in tensors.values()))
    inputs.files[WEIGHTS] = Sparse(start, len(start) + 250_000_000)
    inputs.files[CONFIG] = json.dumps({**ADAPTER_CONFIG, "modules_to_save": ["classifier"]}).encode()


LARGE: list[Mutation] = [
    _large_setting("unknown", lambda: json.dumps("x" * 10_000_000)),
    _large_setting("base_model_name_or_path", lambda: json.dumps("/x" * 2_000_000)),
    _large_setting("target_modules", lambda: json.dumps(["q"] * 1_000_000)),
    _large_setting("modules_to_save", lambda: json.dumps([f"m{i}" for i in range(100_000)])),
    _large_setting("rank_pattern", lambda: json.dumps({f"layers.{i}.q_proj": 2 for i in range(50_000)})),
    _large_setting("alpha_pattern", lambda: json.dumps({rf".*layers\.{i}\..*q": 2 for i in range(3_000)})),
    _large_setting("alpha_pattern", lambda: json.dumps({"." * i: 2 for i in range(1, 2_000)})),
    _large_setting("trainable_token_indices", lambda: json.dumps([*range(1_000_000)])),
    _large_setting("auto_mapping", lambda: "[" + "[]," * 6_000_000 + "0]"),
    _large_setting("r", lambda: "[" + "[" * 90 + "]" * 90 + ",0]"),
    _large_header(WEIGHTS, lambda: _many_tensors(100_000)),
    _large_header(BASE, lambda: _many_tensors(20_000)),
    _large_header(
        WEIGHTS, lambda: b'{"a":[' + b"[]," * 6_000_000 + b"0]}"
    ),  # 20 bytes in memory for each byte of it
    _large_header(BASE, lambda: b"{" + b",".join(b'"%x":{}' % i for i in range(700_000)) + b"}"),
    _large_header(BASE, lambda: b'{"a' + b"x" * 19_000_000 + b'":{}}'),
    _long_header,
    _endless_file,
    _large_head,
]
"""Each of these takes seconds, so each comes once in `LARGE_EVERY` times their number of cases."""

LARGE_EVERY = 120


# The base


def base_header(rng: random.Random, inputs: Inputs) -> None:
    inputs.files[BASE] = spoilt_file(base_tensors(), rng)


def base_bytes(rng: random.Random, inputs: Inputs) -> None:
    data = inputs.files[BASE]
    assert isinstance(data, bytes)
    header = 8 + int.from_bytes(data[:8], "little")
    inputs.files[BASE] = (
        data[: rng.randrange(len(data))] if rng.random() < 0.2 else spoil_bytes(data, rng, header)
    )


def base_names(rng: random.Random, inputs: Inputs) -> None:
    tensors = dict(base_tensors())
    for _ in range(rng.choice([1, 1, 3])):
        odd = rng.choice(
            ["\u00b2", "1\u00b22.weight", "9" * 300 + ".weight", "9" * 5000, "0.weight", "1.weight",
             "model.layers.7.x", "..", "a/b",
             "model.layers.\u0661.x", "x" * 3000, "\x1b[31m", "\ud800", "0.0.0.0.0", "." * 200, "0." * 300, "embed",
             "a b", ""]
        )  # fmt: skip
        shape = rng.choice(SHAPES)
        dtype = rng.choice(["F32", "F32", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F16"])
        tensors[odd] = zeros(dtype, shape)
    if rng.random() < 0.3:
        name = f"{MODULES[0]}.weight"
        tensors[name] = zeros(
            rng.choice(["F32", "F64", "BF16", "F16", "I64", "U8", "F8_E4M3", "BOOL"]), rng.choice(SHAPES)
        )
    inputs.files[BASE] = safetensors(tensors)
    if rng.random() < 0.3:
        inputs.recipe["out_dtype"] = rng.choice(["float16", "bfloat16", "float64"])
        inputs.recipe["max_shard_size"] = rng.choice([1, 100, 10**9])


BASE_CONFIG_KEYS = [
    "quantization_config", "text_config", "vision_config", "id2label", "num_labels", "dtype", "auto_map",
    "_name_or_path",
    "num_experts", "base_model_tp_plan", "transformers_version", "problem_type",
]  # fmt: skip


def base_config(rng: random.Random, inputs: Inputs) -> None:
    name = "base/config.json"
    if rng.random() < 0.75:
        inputs.files[name] = with_junk(BASE_CONFIG, BASE_CONFIG_KEYS, rng)
    else:
        inputs.files[name] = spoil_bytes(json.dumps(BASE_CONFIG).encode(), rng)
    if rng.random() < 0.3:
        inputs.recipe["out_dtype"] = "bfloat16"
    if rng.random() < 0.2:
        inputs.recipe["merges"][0]["export"] = "both"
    if rng.random() < 0.1:
        inputs.recipe["base_numerics"] = "dequantise"


def base_quantised(rng: random.Random, inputs: Inputs) -> None:
    """A base in two of the layouts that can be dequantised, and something wrong with its parts or their description."""
    tensors, name = dict(base_tensors()), f"{MODULES[0]}.weight"
    if rng.random() < 0.5:
        quantisation: Any = {"quant_method": "fp8", "weight_block_size": [8, 8]}
        tensors[name] = zeros("F8_E4M3", [HIDDEN, HIDDEN])
        tensors[f"{name}_scale_inv"] = zeros("F32", rng.choice([[1, 1], [1, 1], *SHAPES]))
    else:
        quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        state: Any = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [HIDDEN, HIDDEN]}
        text = json.dumps(state).encode() if rng.random() < 0.3 else with_junk(state, ["nested_offset"], rng)
        text = spoil_bytes(text, rng) if rng.random() < 0.2 else text
        tensors[name] = zeros("U8", rng.choice([[32, 1], [32, 1], *SHAPES]))
        tensors[f"{name}.absmax"] = zeros("F32", rng.choice([[1], [1], *SHAPES]))
        tensors[f"{name}.quant_map"] = zeros("F32", rng.choice([[16], [16], *SHAPES]))
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = ("U8", [len(text)], text)
    if rng.random() < 0.2:
        tensors.pop(rng.choice([*tensors]))
    config = json.dumps({**BASE_CONFIG, "quantization_config": quantisation}).encode()
    if rng.random() < 0.4:
        junk = with_junk(quantisation, ["weight_block_size", "load_in_8bit", "activation_scheme"], rng)
        config = object_text([*((key, json.dumps(value)) for key, value in BASE_CONFIG.items()),
                              ("quantization_config", junk.decode("utf-8", "surrogatepass"))])  # fmt: skip
    inputs.files["base/config.json"] = config
    inputs.files[BASE] = safetensors(tensors)
    if rng.random() < 0.9:
        inputs.recipe["base_numerics"] = "dequantise"


def model_class(rng: random.Random, inputs: Inputs) -> None:
    """Names that fit only if a class of transformers is built from config.json, and what that says of its size."""
    config: dict[str, Any] = dict(BASE_CONFIG)
    huge = [10**3, 10**6, 10**9, 2**40, 10**18, 0, -1, 1.5, "8"]
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(
            [
                "num_hidden_layers", "num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size",
                "num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts",
                "max_position_embeddings",
                "pad_token_id", "num_labels", "n_layer",
            ]
        )  # fmt: skip
        config[key] = rng.choice(huge)
    if rng.random() < 0.5:
        config["model_type"] = rng.choice(
            [
                "mixtral",
                "bert",
                "gpt2",
                "t5",
                "nosuch",
                "",
                "__class__",
                "../llama",
                "gpt_oss",
                "vit",
                "whisper",
                "x" * 5000,
            ]
        )
    if rng.random() < 0.5:
        config["architectures"] = rng.choice(
            [["BertModel"], ["MixtralForCausalLM"], ["PreTrainedModel"], ["AutoModel"], ["Trainer"], ["pipeline"],
             ["os"],
             ["__file__"], [""], [], ["x" * 5000], ["LlamaForCausalLM", "BertModel"], ["T5ForConditionalGeneration"]]
        )  # fmt: skip
    if rng.random() < 0.2:
        config["auto_map"] = {"AutoModelForCausalLM": "evil.py--Evil", "AutoConfig": "http://x/y"}
    inputs.files["base/config.json"] = json.dumps(config).encode()
    module = rng.choice(
        [f"model.{MODULES[0]}", "nosuch.q_proj", MODULES[0].removeprefix("model."), "lm_head", MODULES[0]]
    )
    inputs.files[WEIGHTS] = safetensors(
        {name.replace(MODULES[0], module): tensor for name, tensor in adapter_tensors(MODULES[0]).items()}
    )
    if rng.random() < 0.3:
        auto = rng.choice(
            [{"base_model_class": name} for name in ("LlamaModel", "BertModel", "os", "Trainer", 3)] + [[], 3]
        )
        inputs.files[CONFIG] = json.dumps({**ADAPTER_CONFIG, "auto_mapping": auto}).encode()
    if rng.random() < 0.2:
        inputs.recipe["tied"] = "untie"


def base_index(rng: random.Random, inputs: Inputs) -> None:
    tensors = base_tensors()
    inputs.files.pop(BASE)
    names = [*tensors]
    halves = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, own in halves.items():
        inputs.files[f"base/{file}"] = safetensors({name: tensors[name] for name in own})
    weight_map: Any = {name: file for file, own in halves.items() for name in own}
    document: Any = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    kind = rng.randrange(9)
    if kind == 0:
        weight_map[rng.choice(names)] = rng.choice(
            ["../a/adapter_model.safetensors", "/etc/passwd", "", ".", "..", "x/../model-1.safetensors",
             "model-3.safetensors",
             "model-1.safetensors\0", "a\\b", ".hidden", None, 3, [], {}, "model-1.safetensors/", "\x1b[31m",
             "config.json",
             "x" * 300, "x" * 100_000, "\ud800", "model-2.safetensors", "pipe.safetensors", "folder.safetensors"]
        )  # fmt: skip
    elif kind == 1:
        weight_map[rng.choice(["nosuch", "", "\n", "\ud800"])] = "model-1.safetensors"
    elif kind == 2:
        weight_map.pop(rng.choice(names))
    elif kind == 3:
        document["weight_map"] = rng.choice(
            [None, 3, [], {}, "x", [["a", "b"]], dict.fromkeys(names, "model-1.safetensors")]
        )
    elif kind == 4:
        document = rng.choice([[], 3, None, {"weight_map": {"weight_map": {}}}, {}])
    elif kind == 5:
        document["metadata"] = rng.choice([None, 3, [], {"total_size": -1}, {"total_size": "x"}])
    elif kind == 6:
        inputs.files.pop(f"base/{rng.choice([*halves])}")
    inputs.files["base/pipe.safetensors"] = Node(stat.S_IFIFO)
    inputs.files["base/folder.safetensors"] = Node(stat.S_IFDIR)
    text = json.dumps(document).encode()
    if kind == 7:
        text = spoil_bytes(text, rng)
    elif kind == 8:
        text = text[:-1] + b', "weight_map": {"a": "../../x"}}'
    inputs.files[INDEX] = text


# What is no plain file


def special_files(rng: random.Random, inputs: Inputs) -> None:
    names = [CONFIG, WEIGHTS, "base/config.json", BASE, "base/tokenizer_config.json"]
    for name in rng.sample(names, rng.choice([1, 2, 2])):
        kind = rng.randrange(12)
        if kind == 0:
            inputs.files.pop(name)
        elif kind < 4:
            inputs.files[name] = Node((stat.S_IFIFO, stat.S_IFDIR, stat.S_IFSOCK)[kind - 1])
        elif kind < 10:
            targets = [
                "@/nothing", name.rpartition("/")[2], "/dev/zero", "/dev/null", "/dev/random", "/etc/hostname", "/",
                "@/base",
                "/proc/self/mem", "/proc/kmsg", "/sys/kernel/debug/tracing/trace_pipe", "@/pipe",
                "@/b/adapter_config.json",
                "..", "/proc/self/environ", "@/blobs/good", "/dev/stdin", "/proc/kcore",
            ]  # fmt: skip
            content = inputs.files[name]
            if isinstance(content, bytes):
                inputs.files["blobs/good"] = content
            inputs.files["pipe"] = Node(stat.S_IFIFO)
            inputs.files[name] = Link(rng.choice(targets))
        elif kind == 10:
            inputs.files[name] = rng.choice([b"", b"\0", b"x" * 100])
        else:
            inputs.forbidden.add(name)


def _to_everything(rng: random.Random, inputs: Inputs) -> None:
    inputs.files["base/everything"] = Link(
        rng.choice(["/", "/proc", "/sys", "/dev", "/proc/self/fd", "/proc/self/root"])
    )


def _all_to_all(rng: random.Random, inputs: Inputs) -> None:
    for one in range(12):  # 12! ways through these
        for other in range(12):
            inputs.files[f"base/d{one}/{other}"] = Link(f"../d{other}")


def _loop(rng: random.Random, inputs: Inputs) -> None:
    inputs.files["base/loop"] = Link(rng.choice([".", "..", "loop", "../base", "../a"]))


def _crowd(rng: random.Random, inputs: Inputs) -> None:
    for index in range(rng.choice([30, 300])):
        inputs.files[f"base/side/{index}.txt"] = b""


def _deep_folders(rng: random.Random, inputs: Inputs) -> None:
    inputs.files[f"base/{'d/' * rng.choice([50, 300])}x.json"] = b"{}"


def _odd_file_name(rng: random.Random, inputs: Inputs) -> None:
    name = rng.choice(
        ["\x1b[31mred.json", "a\nb", "a\\b.json", "\udcff.json", "x" * 255, " ", "caf\u00e9.json", ".hidden", "-rf",
         "\u202e.json",
         "README.md", "adapter/x", "ray_merge/MANIFEST.json", ".tmp-1", "model.safetensors.lock"]
    )  # fmt: skip
    inputs.files[f"base/{name}"] = b"{}"


def _large_side_file(rng: random.Random, inputs: Inputs) -> None:
    inputs.files["base/tokenizer.model"] = Sparse(b"", rng.choice([20_000_000, 257_000_000, 2**40]))


def _odd_nodes(rng: random.Random, inputs: Inputs) -> None:
    for name in ("pipe.json", "socket.json"):
        inputs.files[f"base/{name}"] = Node(rng.choice([stat.S_IFIFO, stat.S_IFSOCK]))


def _leak(rng: random.Random, inputs: Inputs) -> None:
    inputs.files["base/vocab.txt"] = Link(
        rng.choice(["/etc/passwd", "/proc/self/environ", "/proc/kmsg", "@/secret", "../secret"])
    )
    inputs.files["secret"] = b"secret"


_FOLDER_EDITS: list[Mutation] = [
    _to_everything, _all_to_all, _loop, _crowd, _deep_folders, _odd_file_name, _odd_file_name, _large_side_file,
    _odd_nodes,
    _leak,
]  # fmt: skip


def special_folders(rng: random.Random, inputs: Inputs) -> None:
    """Folders of a base that are links, endless or crowded, or hold what is no file of a model."""
    rng.choice(_FOLDER_EDITS)(rng, inputs)


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("pwned", "w"))


def pickles(rng: random.Random, inputs: Inputs) -> None:
    import torch

    inputs.files.pop(WEIGHTS)
    values: dict[Any, Any] = {
        name: torch.full(shape, 0.5) for name, (_, shape, _) in adapter_tensors(MODULES[0]).items()
    }
    stream = io.BytesIO()
    kind = rng.randrange(8)
    if kind == 0:
        values["x"] = _Malicious()
    elif kind == 1:
        values[rng.choice(["x", 3, None, ""])] = rng.choice(
            [3, None, "y", [], {}, torch.zeros(3).expand(5, 3)]
        )
    if kind == 2:
        data = pickle.dumps(_Malicious())
    elif kind == 3:
        data = rng.choice([b"", b"PK\x03\x04", b"\x80\x02.", rng.randbytes(200)])
    else:
        torch.save(values, stream, _use_new_zipfile_serialization=kind != 4)
        data = stream.getvalue()
    if kind > 5:
        data = data[: rng.randrange(len(data))] if kind == 6 else spoil_bytes(data, rng)
    inputs.files["a/adapter_model.bin"] = data
    if rng.random() < 0.7:
        inputs.recipe["adapters"]["a"] = {"path": "@/a", "allow_pickle": True}


# Recipes

RECIPE_JUNK: list[Any] = [
    None, True, 0, -1, 1.5, "", "x", [], {}, [[]], {"a": 1}, "@/base", "@/out", "@/nosuch", "/dev/zero", "@/pipe",
    "..", "\0", "a" * 5000,
    "s3://",  "file:///etc/passwd", "nosuch://x", "hf://", "http://x/y", "ray://x", "x::y",
    "@/base/model.safetensors",
    float("nan"), float("inf"), 10**30, "\ud800", "{id", "{date}", "{x}", "@/base/out", "@/a", "memory://x",
    "C:\\x", "1GB", "-5GB", "@/out/../b",
]  # fmt: skip
RECIPE_KEYS = [
    "base_model", "output", "adapters", "merges", "dtype", "out_dtype", "max_shard_size", "max_merges", "store",
    "base_model_names",
    "calibration", "placement", "tied", "base_numerics", "key_mapping", "unknown",
]  # fmt: skip
MERGE_KEYS = [
    "name", "merge_method", "adapters", "parameters", "sweep", "combinations", "export", "seed", "export_rank",
    "export_tolerance", "x",
]  # fmt: skip
PARAMETERS: list[Any] = [
    {"lambda": 1e300}, {"lambda": float("nan")}, {"lambda": "x"}, {"weight": {"a": 1}}, {"weight": {"a": 1, "b": 2,
    "c": 3}},
    {"weight": [1, 2]}, {"weight": [{"filter": "(", "value": 1}]}, {"weight": [{"filter": "(a+)+$", "value": 1}]},
    {"weight": [{}]},
    {"density": 0}, {"normalize": "yes"}, {"rank": 10**9}, {"space": "core"}, {"lambda": 10**400}, [], 3, {"": 1},
    {"lambda": None},
]  # fmt: skip
METHODS = [
    "task_arithmetic",
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "knots_ties",
    "knots_dare_ties",
    "x",
    "",
]


def recipe_values(rng: random.Random, inputs: Inputs) -> None:
    recipe = inputs.recipe
    merges = recipe.get("merges")
    merge = merges[0] if isinstance(merges, list) and merges and isinstance(merges[0], dict) else {}
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.randrange(7)
        if kind == 0:
            recipe[rng.choice(RECIPE_KEYS)] = rng.choice(RECIPE_JUNK)
        elif kind == 1:
            merge[rng.choice(MERGE_KEYS)] = rng.choice(RECIPE_JUNK)
        elif kind == 2:
            merge["merge_method"] = rng.choice(METHODS)
            merge["parameters"] = rng.choice(PARAMETERS)
        elif kind == 3 and isinstance(recipe.get("adapters"), dict):
            recipe["adapters"][rng.choice(["a", "b", "", "..", "a/b", "x" * 65, "a__b", 3])] = rng.choice(
                RECIPE_JUNK
            )
        elif kind == 4:
            merge["sweep"] = rng.choice(
                [{"lambda": [0.5, 1]}, {"lambda": []}, {"lambda": 3}, {"x": [1]}, {"lambda": ["../x"]},
                 {"lambda": [1] * 2000}, [],
                 {"lambda": [1, 1]}, {"weight": [{"a": 1, "b": 2}]}]
            )  # fmt: skip
        elif kind == 5:
            merge["combinations"] = rng.choice(
                [{"choose": n} for n in (0, 1, 2, 3, -1, "x", [1, 2], [])] + [3, None, {}]
            )
        else:
            merge["export"] = rng.choice(["adapter", "both", "checkpoint", "x"])
            merge["merge_method"] = rng.choice(METHODS)
    if recipe.get("base_model") == "@/pipe" or "@/pipe" in map(str, recipe.values()):
        inputs.files["pipe"] = Node(stat.S_IFIFO)


def recipe_text(rng: random.Random, inputs: Inputs) -> None:
    text = yaml.safe_dump(inputs.recipe, sort_keys=False).encode()
    kind = rng.randrange(12)
    if kind == 0:
        text += rng.choice(
            [
                b"\nbase_model: x",
                b"\n- x",
                b"\n---\na: 1",
                b"\n!!python/object/apply:os.system [x]",
                b"\n\t",
                b"\0",
                b"\xff",
            ]
        )
    elif kind == 1:
        text = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
            b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
        )
    elif kind == 2:
        text = rng.choice(
            [
                b"",
                b"null",
                b"3",
                b"[]",
                b"[" * 5000,
                b"{a: " * 900,
                b"? [a]\n: b",
                b"&a [*a]",
                b"x" * 5_000_000,
                b"<<: 3",
            ]
        )
    elif kind == 3:
        text = text.decode().encode(rng.choice(["utf-8-sig", "utf-16"]))
    else:
        text = spoil_bytes(text, rng)
    inputs.recipe_text = text


MUTATIONS: list[tuple[Mutation, int]] = [
    (config_values, 26), (config_bytes, 10), (config_patterns, 10), (adapter_names, 22), (adapter_shapes, 16),
    (adapter_numbers, 4), (adapter_header, 26), (adapter_bytes, 14), (base_header, 12), (base_bytes, 6),
    (base_names, 8), (base_config, 14), (base_index, 6), (model_class, 10), (base_quantised, 8),
    (special_files, 12), (special_folders, 5), (pickles, 5), (recipe_values, 12), (recipe_text, 4),
]  # fmt: skip
"""Mutations and their shares; `LARGE` comes by number."""


def case_of(seed: int) -> tuple[str, Inputs]:
    """The name of the mutation and the spoilt inputs of one seed."""
    rng = random.Random(seed)
    inputs = good_inputs()
    if seed % LARGE_EVERY == 20:
        LARGE[seed // LARGE_EVERY % len(LARGE)](rng, inputs)
        return "large", inputs
    chosen = [rng.choices([m for m, _ in MUTATIONS], [share for _, share in MUTATIONS])[0]]
    if rng.random() < 0.15:  # two things are wrong at once
        chosen.append(rng.choice([config_values, adapter_header, base_config, recipe_values]))
    for mutation in chosen:
        mutation(rng, inputs)
    return "+".join(mutation.__name__ for mutation in chosen), inputs
