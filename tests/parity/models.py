"""Tiny random models, one per layer kind that PEFT adapts: how to make one, run it, and load a merged checkpoint.

Every bias, norm and learned vector is moved away from its initial value (0 or 1), so that a merge which drops or
doubles one shows in the logits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VOCAB, HIDDEN = 64, 32
_LOADED: dict[Path, nn.Module] = {}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}


@dataclass(frozen=True)
class TinyModel:
    """One architecture.

    Args:
        cls: name of its class in transformers, or `HandMade`.
        config: makes the configuration.
        inputs: keyword arguments of one forward pass; the same in every call.
        output: the field of the model's output that rows compare.
        dtype: of the tensors on disk; rows compute in float32.
        shard: size of one file on disk, as transformers takes it.
        forget: keys that are taken out of config.json, as an older transformers wrote it.
    """

    cls: str
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]
    output: str = "logits"
    dtype: torch.dtype = torch.float32
    shard: str | None = None
    forget: tuple[str, ...] = ()

    def make(self, seed: int = 0) -> nn.Module:
        """A random model in float32; the seed decides every value."""
        torch.manual_seed(seed)
        model = self._class()(self.config()).float().eval()
        shake(model, seed)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        return model

    def save(self, folder: Path) -> None:
        """The base checkpoint of this model."""
        model, options = (
            self.make().to(self.dtype),
            {} if self.shard is None else {"max_shard_size": self.shard},
        )
        model.save_pretrained(folder, **options)
        config = json.loads((folder / "config.json").read_text())
        left = {key: value for key, value in config.items() if key not in self.forget}
        (folder / "config.json").write_text(json.dumps(left, indent=2))

    def load(self, folder: str | Path) -> nn.Module:
        """The checkpoint in `folder`, in the class that wrote the base; a tensor that is missing or left over fails."""
        if self.cls == "HandMade":
            return HandMade.from_pretrained(folder)
        model, info = self._class().from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        lost = {
            key: sorted(info[key])
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[key]
        }
        assert not lost, f"{folder}: {lost}"
        return model.eval()

    def base(self, folder: Path) -> nn.Module:
        """A private copy of the checkpoint in `folder`, which is read once."""
        if folder not in _LOADED:
            _LOADED[folder] = self.load(folder)
        return copy.deepcopy(_LOADED[folder])

    def logits(self, model: nn.Module) -> Tensor:
        """What one forward pass gives, without gradients; in a resized model it also visits the last token."""
        inputs = self.inputs()
        if self.inputs is tokens and (rows := vocabulary(model)) != VOCAB:
            inputs["input_ids"] = inputs["input_ids"] % rows
            inputs["input_ids"][:, -1] = rows - 1
        with torch.no_grad():
            return getattr(model.eval()(**inputs), self.output)

    def _class(self) -> Any:
        if self.cls == "HandMade":
            return HandMade
        import transformers

        return getattr(transformers, self.cls)


def shake(model: nn.Module, seed: int) -> None:
    """Moves every vector of the model (biases, norms, sinks, running statistics) by a fixed amount of noise."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            learned = "running_" in name or isinstance(tensor, nn.Parameter)
            if learned and tensor.dim() <= 1 and tensor.is_floating_point() and tensor.numel() > 1:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).abs())
            elif learned and "bias" in name and tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def vocabulary(model: nn.Module) -> int:
    """Rows of the input embedding."""
    return model.get_input_embeddings().weight.shape[0] if hasattr(model, "get_input_embeddings") else VOCAB


def ids(rows: int = 2, columns: int = 12) -> Tensor:
    """Token ids that cover the vocabulary's first tokens, without the padding token."""
    return 3 + (torch.arange(rows * columns) * 7 % (VOCAB - 4)).reshape(rows, columns)


def tokens() -> dict[str, Tensor]:
    """Inputs of a text model."""
    return {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}


def pixels(*shape: int) -> Tensor:
    """A fixed image, video or sound."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def images() -> dict[str, Tensor]:
    """Inputs of an image model."""
    return {"pixel_values": pixels(2, 3, 16, 16)}


def _config(name: str, /, **keys: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**keys)


def _llama(**keys: Any) -> Callable[[], Any]:
    return lambda: _config("LlamaConfig", **{**DECODER, **keys})


def _moe(name: str, **keys: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = _config(
            name, **{**DECODER, "num_experts_per_tok": 2, "experts_implementation": "eager", **keys}
        )
        return config

    return make


def _clip_vision() -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "projection_dim": 16, **IMAGE,
    }  # fmt: skip


def _clip() -> Any:
    text = {**TEXT, "intermediate_size": 48, "projection_dim": 16, "max_position_embeddings": 32}
    return _config("CLIPConfig", text_config=text, vision_config=_clip_vision(), projection_dim=16)


def _siglip() -> Any:
    text = {**TEXT, "intermediate_size": 48, "max_position_embeddings": 32}
    vision = {key: value for key, value in _clip_vision().items() if key != "projection_dim"}
    return _config("SiglipConfig", text_config=text, vision_config=vision)


def _pair_inputs() -> dict[str, Tensor]:
    return {"input_ids": ids(2, 8), **images()}


IMAGE_TOKEN = VOCAB - 1


def _llava() -> Any:
    text = {**DECODER, "model_type": "llama", "tie_word_embeddings": False}
    vision = {**_clip_vision(), "model_type": "clip_vision_model"}
    return _config(
        "LlavaConfig",
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def _llava_inputs() -> dict[str, Tensor]:
    prompt = ids()
    prompt[:, 1:5] = IMAGE_TOKEN  # 16 x 16 pixels in patches of 8 are 4 image tokens
    return {"input_ids": prompt, **images()}


def _wav2vec2() -> Any:
    return _config(
        "Wav2Vec2Config",
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        conv_dim=[16, 16], conv_stride=[4, 2], conv_kernel=[8, 3], conv_bias=True, num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, num_labels=3,
    )  # fmt: skip


def _videomae() -> Any:
    return _config(
        "VideoMAEConfig",
        **{**_clip_vision(), "num_frames": 4, "tubelet_size": 2, "num_labels": 3},
    )


def _t5() -> Any:
    return _config(
        "T5Config",
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip


def _qwen2_vl() -> Any:
    text = {
        **DECODER,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return _config(
        "Qwen2VLConfig", text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3, vision_end_token_id=VOCAB - 4, tie_word_embeddings=False,
    )  # fmt: skip


def _qwen2_vl_inputs() -> dict[str, Tensor]:
    prompt = ids()[:1]
    prompt[:, 0], prompt[:, 1:5] = VOCAB - 3, IMAGE_TOKEN  # 4 x 4 patches, merged 2 x 2
    kinds = (prompt == IMAGE_TOKEN).int()
    return {
        "input_ids": prompt, "pixel_values": pixels(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": kinds,
    }  # fmt: skip


def _gemma3() -> Any:
    return _config(
        "Gemma3TextConfig", **{**DECODER, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
    )


class HandMade(nn.Module):
    """A network that no library knows: checkpoint = model.safetensors + config.json with an unknown model_type.

    It holds what transformers' tiny models lack: nn.MultiheadAttention in `attention`, a 1 x 1 x 1 Conv3d, a Conv1d
    of kernel 1, 2-D parameters that are not a layer's weight, a grouped and a dilated convolution.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = dict(config or {"model_type": "hand_made", "hidden_size": HIDDEN})
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
        self.point = nn.Conv1d(HIDDEN, HIDDEN, 1)
        self.volume = nn.Conv3d(HIDDEN, 16, 1)
        self.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.inner = nn.Linear(16, HIDDEN, bias=False)
        self.bare = Bare()
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.embed(input_ids)
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        hidden = (self.conv(hidden.mT).relu() + self.point(hidden.mT)).mT
        volume = self.volume(hidden.mT[..., None, None])[..., 0, 0]
        hidden = hidden + self.inner(self.grouped(volume).mT.tanh())
        return Output(self.head(self.bare(hidden)))

    def save_pretrained(self, folder: str | Path) -> None:
        """The folder that `from_pretrained` reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> HandMade:
        """A saved or merged checkpoint, in however many files."""
        tensors: dict[str, Tensor] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            tensors.update(load_file(path))
        model = cls(json.loads((Path(folder) / "config.json").read_text()))
        model.load_state_dict(tensors)
        return model.eval()


class Bare(nn.Module):
    """Two parameters that no layer owns: a matrix, and a stack of two square matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(0.2 * torch.randn(HIDDEN, HIDDEN))
        self.stack = nn.Parameter(0.2 * torch.randn(2, HIDDEN, 24))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden @ self.matrix.T + (hidden @ self.stack[0]) @ self.stack[1].T


@dataclass
class Output:
    """What HandMade returns."""

    logits: Tensor


MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("LlamaForCausalLM", _llama(tie_word_embeddings=False), tokens),
    "llama_bf16": TinyModel(
        "LlamaForCausalLM", _llama(tie_word_embeddings=False), tokens, dtype=torch.bfloat16
    ),
    "llama_tied": TinyModel("LlamaForCausalLM", _llama(tie_word_embeddings=True), tokens),
    "llama_biased": TinyModel(
        "LlamaForCausalLM", _llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True), tokens
    ),
    "qwen2": TinyModel(
        "Qwen2ForCausalLM", lambda: _config("Qwen2Config", **DECODER, tie_word_embeddings=False), tokens
    ),
    "qwen3_moe": TinyModel(
        "Qwen3MoeForCausalLM",
        _moe("Qwen3MoeConfig", head_dim=8, num_experts=4, moe_intermediate_size=12, decoder_sparse_step=1),
        tokens,
    ),
    "qwen3_moe_shards": TinyModel(
        "Qwen3MoeForCausalLM",
        _moe("Qwen3MoeConfig", head_dim=8, num_experts=4, moe_intermediate_size=12, decoder_sparse_step=1),
        tokens, shard="9KB",
    ),
    "qwen3_moe_square": TinyModel(
        "Qwen3MoeForCausalLM",
        _moe("Qwen3MoeConfig", head_dim=8, num_experts=4, moe_intermediate_size=16, decoder_sparse_step=1),
        tokens,
    ),
    "mixtral": TinyModel(
        "MixtralForCausalLM", _moe("MixtralConfig", num_local_experts=4, intermediate_size=20), tokens
    ),
    "gpt_oss": TinyModel(
        "GptOssForCausalLM",
        _moe("GptOssConfig", head_dim=8, num_local_experts=4, intermediate_size=20, rope_scaling=None),
        tokens,
    ),
    "gpt_oss_square": TinyModel(
        "GptOssForCausalLM",
        _moe("GptOssConfig", head_dim=8, num_local_experts=4, intermediate_size=HIDDEN, rope_scaling=None),
        tokens,
    ),
    "gemma3": TinyModel("Gemma3ForCausalLM", _gemma3, tokens),
    "gpt2": TinyModel(
        "GPT2LMHeadModel",
        lambda: _config(
            "GPT2Config",
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        ),
        tokens,
    ),
    "bert": TinyModel(
        "BertForSequenceClassification",
        lambda: _config("BertConfig", **TEXT, intermediate_size=48, num_labels=3),
        tokens,
    ),
    "bert_mlm": TinyModel(
        "BertForMaskedLM", lambda: _config("BertConfig", **TEXT, intermediate_size=48), tokens
    ),
    "roberta": TinyModel(
        "RobertaForSequenceClassification",
        lambda: _config("RobertaConfig", **TEXT, intermediate_size=48, num_labels=3, max_position_embeddings=32),
        tokens,
    ),
    "vit": TinyModel(
        "ViTForImageClassification",
        lambda: _config("ViTConfig", **_clip_vision(), num_labels=3),
        images,
    ),
    "clip": TinyModel("CLIPModel", _clip, _pair_inputs, "logits_per_image"),
    "siglip": TinyModel("SiglipModel", _siglip, _pair_inputs, "logits_per_image"),
    "t5": TinyModel(
        "T5ForConditionalGeneration", _t5, lambda: {"input_ids": ids(), "decoder_input_ids": ids(2, 6)}
    ),
    "t5_of_transformers_4": TinyModel(
        "T5ForConditionalGeneration", _t5, lambda: {"input_ids": ids(), "decoder_input_ids": ids(2, 6)},
        forget=("scale_decoder_outputs", "tie_word_embeddings"),
    ),
    "qwen2_vl": TinyModel("Qwen2VLForConditionalGeneration", _qwen2_vl, _qwen2_vl_inputs),
    "llava": TinyModel("LlavaForConditionalGeneration", _llava, _llava_inputs),
    "resnet": TinyModel(
        "ResNetForImageClassification",
        lambda: _config(
            "ResNetConfig",
            embedding_size=16, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic", num_labels=3,
        ),
        lambda: {"pixel_values": pixels(2, 3, 32, 32)},
    ),
    "wav2vec2": TinyModel("Wav2Vec2ForCTC", _wav2vec2, lambda: {"input_values": pixels(2, 200)}),
    "videomae": TinyModel(
        "VideoMAEForVideoClassification", _videomae, lambda: {"pixel_values": pixels(2, 4, 3, 16, 16)}
    ),
    "hand_made": TinyModel("HandMade", lambda: None, tokens),
}  # fmt: skip
"""Architectures by the name that row ids use."""
