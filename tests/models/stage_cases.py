"""Tiny random models of many families, saved by transformers, beside the same model loaded as users load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ray_merge.models.block_list import BlockList, cut_stages
from ray_merge.models.skeleton import build_skeleton
from ray_merge.models.stage import Stage
from ray_merge.models.stage_calls import StageInput
from ray_merge.models.stored_weights import StoredWeights
from ray_merge.storage.checkpoint import Checkpoint, read_checkpoint
from ray_merge.storage.store import Store, open_store

TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=64,
    max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
DECODER = TEXT | dict(num_key_value_heads=2)
IMAGE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=8
)  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"] * 2


def _clip() -> Any:
    return transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE | {"num_hidden_layers": 2})


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        **IMAGE | dict(hidden_size=16, num_hidden_layers=2), projection_dim=16
    )
    text = transformers.LlamaConfig(**DECODER)
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)


FAMILIES: dict[str, tuple[str, Any]] = {
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**DECODER)),
    "llama-tied": (
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(**DECODER, tie_word_embeddings=True),
    ),
    "qwen2": ("Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**DECODER, tie_word_embeddings=True)),
    "gemma2": (
        "Gemma2ForCausalLM",
        lambda: transformers.Gemma2Config(**DECODER, head_dim=8, sliding_window=4),
    ),
    "mistral": ("MistralForCausalLM", lambda: transformers.MistralConfig(**DECODER, sliding_window=4)),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        lambda: transformers.Qwen2MoeConfig(
            **DECODER,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            n_embd=32,
            n_layer=4,
            n_head=4,
            vocab_size=64,
            n_positions=40,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        ),
    ),
    "bert": (
        "BertForSequenceClassification",
        lambda: transformers.BertConfig(**TEXT),
    ),
    "roberta": ("RobertaForSequenceClassification", lambda: transformers.RobertaConfig(**TEXT)),
    "vit": ("ViTForImageClassification", lambda: transformers.ViTConfig(**IMAGE)),
    "clip-vision": ("CLIPVisionModel", lambda: transformers.CLIPVisionConfig(**IMAGE)),
    "clip": ("CLIPModel", _clip),
    "llava": ("LlavaForConditionalGeneration", _llava),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0
        ),
    ),
    "t5-encoder": (
        "T5EncoderModel",
        lambda: transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=64),
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        lambda: transformers.DebertaV2Config(
            **TEXT, relative_attention=True, pos_att_type="p2c|c2p", position_buckets=4
        ),
    ),
    "mpnet": ("MPNetModel", lambda: transformers.MPNetConfig(**TEXT)),
    "albert-groups": (
        "AlbertModel",
        lambda: transformers.AlbertConfig(**TEXT, embedding_size=16, num_hidden_groups=2),
    ),
}
"""Name -> class and its config."""


@dataclass(frozen=True)
class Case:
    """A saved model.

    Args:
        folder: where.
        model: from_pretrained, float32, eval.
        checkpoint: its headers.
        given: what goes into the model; right padded.
    """

    folder: Path
    model: nn.Module
    store: Store
    checkpoint: Checkpoint
    given: dict[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.checkpoint.tensors.items()}

    def stages(self, count: int, **options: Any) -> list[Stage]:
        """The model in so many stages."""
        return [self.stage(index, count, **options)[0] for index in range(count)]

    def stage(self, index: int, count: int, **options: Any) -> tuple[Stage, StoredWeights]:
        """One of so many stages, each of about as many blocks."""
        skeleton = build_skeleton(self.checkpoint.config, self.shapes)
        weights = StoredWeights(self.checkpoint, self.store, skeleton.slots, skeleton.unsupported)
        n_blocks = skeleton.blocks.count if skeleton.blocks else 0
        blocks = cut_stages([1] * n_blocks, 0, count)[index]
        return Stage(skeleton, blocks, weights, **options), weights

    def blocks(self) -> BlockList | None:
        return build_skeleton(self.checkpoint.config, self.shapes).blocks

    def input(self, hidden: Tensor | None = None) -> StageInput:
        extras = {name: value for name, value in self.given.items() if name != "attention_mask"}
        return StageInput(hidden=hidden, attention_mask=self.given.get("attention_mask"), extras=dict(extras))


def saved(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Case:
    """Save a model of a family in `dtype` and load it again in float32."""
    class_name, config = FAMILIES[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    fresh = model_class(config())
    with torch.no_grad():  # norms are ones and biases are zeros in a new model: they must not be
        for value in fresh.parameters():
            value.add_(0.1 * torch.randn_like(value))
    fresh.to(dtype).save_pretrained(folder)
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    store = open_store(str(folder))
    return Case(folder, model, store, read_checkpoint(store), _given(name))


def minilm_case(folder: Path) -> Case:
    """The real MiniLM."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    store = open_store(str(folder))
    return Case(folder, model, store, read_checkpoint(store), _given("minilm"))


def _given(name: str) -> dict[str, Tensor]:
    """Three examples of 9, 5 and 2 tokens, or two images."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    if name in ("vit", "clip-vision"):
        return {"pixel_values": images}
    ids = torch.randint(6, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([[9], [5], [2]])).long()
    ids[:, 0] = 1
    if name == "llava":
        ids[0, 2:6] = ids[1, 1:5] = 5
    ids = torch.where(mask == 1, ids, 0)
    given = {"input_ids": ids, "attention_mask": mask}
    if name in ("clip", "llava"):
        given["pixel_values"] = images
    if name in ("bert", "minilm"):
        given["token_type_ids"] = (torch.arange(9) > 3).long().expand(3, 9) * mask
    if name == "t5":
        given["decoder_input_ids"] = ids[:, :6].contiguous()
    return given


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv1D by path."""
    return {path: one for path, one in model.named_modules() if isinstance(one, (nn.Linear, Conv1D))}


def plain_inputs(case: Case) -> tuple[dict[str, list[Tensor]], Any]:
    """Inputs of every Linear and Conv1D, by plain hooks on the whole model, and what it gives out."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _module, args, path=path: seen.setdefault(path, []).append(args[0].detach())
        )
        for path, module in layers(case.model).items()
    ]
    with torch.no_grad():
        out = case.model(**case.given)
    for hook in hooks:
        hook.remove()
    return seen, out


def staged_inputs(case: Case, stages: Sequence[Stage], **options: Any) -> tuple[dict[str, list[Tensor]], Any]:
    """The same from stages one after another."""
    seen: dict[str, list[Tensor]] = {}
    hidden, out = None, None
    for stage in stages:
        out = stage.forward(
            case.input(hidden),
            watch=lambda path, x: seen.setdefault(path, []).append(x.clone()),
            to_end=True,
            **options,
        )
        hidden = out.hidden
    return seen, out
