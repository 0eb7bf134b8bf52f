"""Recipe x headers -> units, shard names, bytes, peak memory, refusals; pure, reads no weights."""

from ray_merge.plan.inputs import read_inputs, read_named
from ray_merge.plan.layout import ADAPTER_OBJECT, SHARD_METADATA, OutTensor, Shard, file_bytes, shard_layout
from ray_merge.plan.memory import DEFAULT_MEMORY_BYTES, QUESTIONS_AT_ONCE
from ray_merge.plan.plan import Plan, make_plan
from ray_merge.plan.vocabulary import with_vocabulary

__all__ = [
    "ADAPTER_OBJECT",
    "DEFAULT_MEMORY_BYTES",
    "QUESTIONS_AT_ONCE",
    "SHARD_METADATA",
    "OutTensor",
    "Plan",
    "Shard",
    "file_bytes",
    "make_plan",
    "read_inputs",
    "read_named",
    "shard_layout",
    "with_vocabulary",
]
