"""The rows of the parity table: a model, the adapters, and which reference judges the merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import variants as v
from variants import Variant


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Args:
        id: `<model>/<variant>`, or `<model>/three/<variant>` for a combination.
        adapters: one variant (identity: weight 1), or three of different rank, alpha and targets.
        recipe: keys laid over the recipe.
        keys: keys laid over each adapter's entry in the recipe; `{initial}` stands for its initial adapter.
        reference: "peft": the unmerged PeftModel (of several adapters: all active); "dense": the float64 sum of
            each adapter's delta against the original base, where PEFT cannot run them exactly.
        second_opinion: dense.py understands the saved files too; False where their names are another class's.
        refused: words of the refusal; the row then expects exit code 2 and no output.
    """

    id: str
    adapters: tuple[Variant, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    reference: Literal["peft", "dense"] = "peft"
    second_opinion: bool = True
    refused: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """Name in MODELS."""
        return self.id.split("/")[0]


UNTIE = {"tied": "untie"}
T5_HEAD = ("lm_head", "untie", "T5")
"""No config unties T5 for every reader: its flag also scales the logits, and transformers 4 would tie them again."""
ATTENTION, MLP = ["q_proj", "v_proj"], ["q_proj", "v_proj", "down_proj"]
Q4, KV, MIX = ["q_proj", "down_proj"], ["k_proj", "v_proj"], ["q_proj", "o_proj", "up_proj"]


def one(row: str, targets: Any = None, **given: Any) -> Row:
    """A row with one adapter: each keyword goes to Row or Variant if they have it, the rest to LoraConfig."""
    for_row = {name: given.pop(name) for name in tuple(given) if name in Row.__dataclass_fields__}
    for_variant = {name: given.pop(name) for name in tuple(given) if name in Variant.__dataclass_fields__}
    if targets is not None:
        given["target_modules"] = targets
    return Row(id=row, adapters=(Variant(options=given, **for_variant),), **for_row)


def three(row: str, *adapters: Mapping[str, Any], **for_row: Any) -> Row:
    """A row with three adapters, each given by keywords of LoraConfig or Variant; r and alpha differ by position."""
    made = []
    for index, given in enumerate(adapters):
        options = dict(given)
        mine = {name: options.pop(name) for name in tuple(options) if name in Variant.__dataclass_fields__}
        made.append(Variant(options={"r": 2 + 2 * index, "lora_alpha": 5 - index, **options}, **mine))
    return Row(id=row, adapters=tuple(made), **for_row)


def t(*names: str, **options: Any) -> dict[str, Any]:
    """One adapter of a combination: its targets and options."""
    return {"target_modules": list(names), **options}


def _bd(nblocks: int = 2) -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    return BdLoraConfig(
        target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=nblocks
    )


MIXTRAL_V4 = {
    "gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
    "up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
    "down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
}
QWEN_V4 = {
    name: f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}_proj" for name in ("gate", "up", "down")
}


def rows() -> list[Row]:
    """Every row; imports PEFT for the configs that need its classes."""
    from peft.tuners.lora.config import (
        CordaConfig,
        EvaConfig,
        LoraGAConfig,
        MontecloraConfig,
        VeloraConfig,
    )

    attention_and_bias = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    experts = {"gate_up": ["experts.gate_up_proj"], "down": ["experts.down_proj"]}
    experts["both"] = [*experts["gate_up"], *experts["down"]]
    swapped = {"target_modules": [], "target_parameters": experts["both"]}
    llava_language = r".*language_model.*\.(q_proj|down_proj)"
    initial = {"initial": "{initial}"}
    return [
        # plain LoRA and its scaling, on Linear
        one("llama/plain", MLP),
        one("llama/all_linear", "all-linear"),
        one("llama/rslora", MLP, use_rslora=True),
        one(
            "llama/patterns", MLP, rank_pattern={"layers.1.self_attn.q_proj": 6, "down_proj": 2},
            alpha_pattern={".*layers.0.*q_proj": 5, "q_proj": 11, "v_proj": 3},
        ),
        one("llama/patterns_rslora", MLP, use_rslora=True, rank_pattern={"q_proj": 7}, alpha_pattern={"v_proj": 3}),
        one("llama/some_layers", MLP, layers_to_transform=[1], layers_pattern="layers"),
        one("llama/gaussian", MLP, init_lora_weights="gaussian"),
        one("llama/orthogonal", MLP, init_lora_weights="orthogonal"),
        one("llama/mica", MLP, init_lora_weights="mica"),
        one(
            "llama/eva", MLP, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0), after=v.eva_directions
        ),
        one("llama/bdlora", MLP, use_bdlora=_bd()),
        one("llama/velora", MLP, velora_config=VeloraConfig(num_groups=4)),
        one("llama/monteclora", MLP, monteclora_config=MontecloraConfig(buffer_size=4)),
        one("llama/pickle", MLP, pickle=True, keys={"allow_pickle": True}),
        one("llama/in_memory_keys", MLP, edit=v.adapter_name_in_keys),
        one("llama/compiled_keys", MLP, edit=v.wrapped_by_compile_and_fsdp),
        one("llama/no_prefix", MLP, edit=v.without_prefix),
        one("llama/bfloat16_factors", MLP, edit=v.in_bfloat16, live_from_file=True),
        one("llama_bf16/plain", MLP, recipe={"out_dtype": "float32"}),
        one("llama_bf16/dora", ["q_proj", "embed_tokens"], use_dora=True, recipe={"out_dtype": "float32"}),
        # DoRA
        one("llama/dora", MLP, use_dora=True),
        one("llama/dora_rslora", MLP, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 7}),
        one("llama/dora_old_names", MLP, use_dora=True, edit=v.old_dora_names),
        # initialisations that change the base: converted by PEFT, or with the initial adapter beside
        *[
            one(f"llama/{init}_converted", MLP, init_lora_weights=init, initial=True, convert=True)
            for init in ("pissa", "olora")
        ],
        one(
            "llama/pissa_rslora_converted", MLP, init_lora_weights="pissa", use_rslora=True, initial=True, convert=True
        ),
        one(
            "llama/pissa_patterns_converted", MLP, init_lora_weights="pissa", rank_pattern={"q_proj": 6},
            alpha_pattern={"q_proj": 5}, initial=True, convert=True,
        ),
        *[
            one(f"llama/{init}_initial", MLP, init_lora_weights=init, initial=True, keys=initial)
            for init in ("pissa", "pissa_niter_4", "olora")
        ],
        one(
            "llama/corda_initial", MLP, init_lora_weights="corda", corda_config=CordaConfig(), initial=True,
            prepare=v.corda_statistics, keys=initial,
        ),
        one(
            "llama/lora_ga_initial", MLP, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), initial=True,
            prepare=v.lora_ga_gradients, keys=initial,
        ),
        # embeddings, heads, saved modules, tokens: untied
        one("llama/lm_head", ["q_proj", "lm_head"]),
        one("llama/embed", ["q_proj", "embed_tokens"]),
        one("llama/embed_rslora", ["embed_tokens"], use_rslora=True),
        one("llama/embed_mica", ["embed_tokens", "q_proj"], init_lora_weights="mica"),
        one("llama/embed_dora", ["q_proj", "embed_tokens"], use_dora=True),
        one("llama/embed_and_head", ["q_proj", "embed_tokens", "lm_head"]),
        one("llama/save_embedding_layers", ATTENTION, tables=True),
        one("llama/save_lm_head", ATTENTION, modules_to_save=["lm_head"]),
        one("llama/save_embed", ATTENTION, modules_to_save=["embed_tokens"]),
        one("llama/save_norms", ATTENTION, modules_to_save=["norm"]),
        one("llama/save_linear", ATTENTION, modules_to_save=["layers.0.mlp.up_proj", "model.norm"]),
        one("llama/save_layer", ["layers.0.self_attn.q_proj"], modules_to_save=["layers.1"]),
        one("llama/tokens", ATTENTION, trainable_token_indices=[3, 10, 45]),
        one("llama/tokens_by_name", ATTENTION, trainable_token_indices={"embed_tokens": [10, 3], "lm_head": [5]}),
        one("llama/resized", ATTENTION, resize=70),
        one("llama/resized_smaller", ATTENTION, resize=60),
        one("llama/resized_and_targeted", ["q_proj", "embed_tokens", "lm_head"], resize=70),
        one("llama/resized_tokens", ATTENTION, resize=70, trainable_token_indices=[3, 66, 69]),
        one("llama/resized_saved", ATTENTION, resize=70, modules_to_save=["embed_tokens", "lm_head"]),
        one("llama/matrix_parameter", [], target_parameters=["q_proj.weight", "down_proj.weight"]),
        # biases
        one("llama_biased/lora_bias", attention_and_bias, lora_bias=True),
        one("llama_biased/lora_bias_rslora", attention_and_bias, lora_bias=True, use_rslora=True),
        one("llama_biased/bias_all", MLP, bias="all"),
        one("llama_biased/bias_lora_only", MLP, bias="lora_only"),
        one("llama_biased/dora", MLP, use_dora=True),
        one("qwen2/plain", MLP),
        one("qwen2/lora_bias", ["q_proj", "k_proj", "v_proj"], lora_bias=True),
        one("qwen2/bias_all", MLP, bias="all"),
        one("qwen2/bias_lora_only", MLP, bias="lora_only"),
        one("qwen2/dora_bias_lora_only", MLP, use_dora=True, bias="lora_only"),
        # tied embeddings
        one("llama_tied/plain", MLP),
        one("llama_tied/lm_head", ["q_proj", "lm_head"], recipe=UNTIE),
        one("llama_tied/lm_head_dora", ["q_proj", "lm_head"], use_dora=True, recipe=UNTIE),
        one("llama_tied/embed", ["q_proj", "embed_tokens"], recipe=UNTIE),
        one("llama_tied/embed_and_head", ["embed_tokens", "lm_head"], recipe=UNTIE),
        one("llama_tied/embed_ensure_tying", ["q_proj", "embed_tokens"], ensure_weight_tying=True),
        one("llama_tied/head_ensure_tying", ["q_proj", "lm_head"], ensure_weight_tying=True),
        one("llama_tied/save_embedding_layers", ATTENTION, tables=True),
        one("llama_tied/save_lm_head", ATTENTION, modules_to_save=["lm_head"], recipe=UNTIE),
        one("llama_tied/save_embed", ATTENTION, modules_to_save=["embed_tokens"], recipe=UNTIE),
        one("llama_tied/save_ensure_tying", ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        one(
            "llama_tied/save_embed_resized", ATTENTION, resize=70, modules_to_save=["embed_tokens"], recipe=UNTIE
        ),
        one(
            "llama_tied/save_ensure_tying_resized", ATTENTION, resize=70, modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
        one("llama_tied/tokens", ATTENTION, trainable_token_indices=[3, 10, 45]),
        one("llama_tied/tokens_ensure_tying", ATTENTION, trainable_token_indices=[3, 45], ensure_weight_tying=True),
        one(
            "llama_tied/tokens_both_same", ATTENTION,
            trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [3, 9]},
        ),
        one(
            "llama_tied/tokens_apart", ATTENTION, trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [5]},
            recipe=UNTIE,
        ),
        one("llama_tied/resized", ATTENTION, resize=70),
        one("llama_tied/resized_tokens", ATTENTION, resize=70, trainable_token_indices=[3, 66, 69]),
        one("llama_tied/resized_embed", ["q_proj", "embed_tokens"], resize=70, recipe=UNTIE),
        one(
            "llama_tied/resized_embed_ensure_tying", ["q_proj", "embed_tokens"], resize=70, ensure_weight_tying=True
        ),
        # Gemma: scaled embeddings, (1 + w) norms, tied
        one("gemma3/plain", MLP),
        one("gemma3/embed", ["q_proj", "embed_tokens"], recipe=UNTIE),
        one("gemma3/embed_ensure_tying", ["q_proj", "embed_tokens"], ensure_weight_tying=True),
        one("gemma3/embed_dora", ["q_proj", "embed_tokens"], use_dora=True, recipe=UNTIE),
        one(
            "gemma3/embed_dora_ensure_tying", ["q_proj", "embed_tokens"], use_dora=True, ensure_weight_tying=True,
            recipe=UNTIE,  # the factors are tied, the magnitudes are not
        ),
        one("gemma3/lm_head", ["q_proj", "lm_head"], recipe=UNTIE),
        one("gemma3/tokens", ATTENTION, trainable_token_indices=[3, 10, 45]),
        # Conv1D (GPT-2); attn.c_proj is square
        one("gpt2/plain", ["c_attn", "c_fc", "mlp.c_proj"], fan_in_fan_out=True),
        one("gpt2/square", ["attn.c_proj"], fan_in_fan_out=True),
        one("gpt2/flag_left_out", ["c_attn", "attn.c_proj"]),
        one("gpt2/conv1d_and_linear", ["c_attn", "lm_head"], recipe=UNTIE),
        one(
            "gpt2/patterns", ["c_attn", "c_fc"], use_rslora=True, rank_pattern={"c_fc": 6},
            alpha_pattern={"c_attn": 3},
        ),
        one("gpt2/dora", ["c_attn", "attn.c_proj"], use_dora=True, fan_in_fan_out=True),
        one("gpt2/lora_bias", ["c_attn", "attn.c_proj"], lora_bias=True),
        one("gpt2/bias_all", ["c_attn", "attn.c_proj"], bias="all"),
        one("gpt2/bias_lora_only", ["c_attn", "attn.c_proj"], bias="lora_only"),
        one("gpt2/wte", ["c_attn", "wte"], recipe=UNTIE),
        one("gpt2/wpe", ["c_attn", "wpe"]),
        one("gpt2/tokens", ["c_attn"], trainable_token_indices=[3, 10, 45]),
        one(
            "gpt2/pissa_converted", ["c_attn", "attn.c_proj"], init_lora_weights="pissa", initial=True, convert=True
        ),
        one("gpt2/pissa_initial", ["c_attn", "attn.c_proj"], init_lora_weights="pissa", initial=True, keys=initial),
        one("gpt2/resized", ["c_attn"], resize=70),
        # encoders with heads
        one("bert/head", ["query", "intermediate.dense"], task_type="SEQ_CLS"),
        one("bert/head_dora", ["query", "attention.output.dense"], task_type="SEQ_CLS", use_dora=True),
        one("bert/head_and_pooler", ["query"], modules_to_save=["classifier", "pooler"]),
        one("bert/no_head", ["query", "classifier"]),
        one("bert/bias_all", ["query"], bias="all"),
        one("bert/head_bias_all", ["query"], bias="all", task_type="SEQ_CLS"),
        one("bert/tables", ["query", "word_embeddings", "position_embeddings"], task_type="SEQ_CLS"),
        one("bert_mlm/plain", ["query", "cls.predictions.transform.dense"]),
        one("bert_mlm/decoder", ["query", "decoder"], recipe=UNTIE),
        one(
            "bert_mlm/tokens", ["query"], trainable_token_indices=[3, 10, 45],
            reference="dense",  # PEFT's forward drops the bias of a head that is tied to trained tokens
        ),
        one("roberta/head", ["query", "value"], task_type="SEQ_CLS"),
        one("roberta/head_part", ["query", "classifier.dense"], modules_to_save=["classifier.out_proj"]),
        # convolutions
        one("vit/plain", ["q_proj", "v_proj"], modules_to_save=["classifier"]),
        one("vit/patches", ["projection", "q_proj"]),
        one("vit/patches_dora", ["projection"], use_dora=True),
        one("vit/patches_lora_bias", ["projection"], lora_bias=True),
        one("vit/patches_rslora", ["projection"], use_rslora=True, rank_pattern={"projection": 6}),
        one(
            "vit/names_of_transformers_4", ["q_proj", "v_proj"], modules_to_save=["classifier"],
            edit=v.renamed(
                {
                    ".vit.layers.": ".vit.encoder.layer.", ".attention.q_proj": ".attention.attention.query",
                    ".attention.v_proj": ".attention.attention.value",
                },
                targets=["query", "value"],
            ),
            second_opinion=False,
        ),
        one("resnet/plain", ["convolution"]),
        one("resnet/rslora", ["convolution"], use_rslora=True),
        one("resnet/dora", ["convolution"], use_dora=True),
        one("resnet/bias_all", ["convolution", "classifier.1"], bias="all"),
        one("resnet/save_batch_norms", ["convolution"], modules_to_save=["normalization", "classifier.1"]),
        one("wav2vec2/plain", ["conv", "q_proj"], exclude_modules=["pos_conv_embed.conv"]),
        one("wav2vec2/dora", ["conv_layers.1.conv", "q_proj"], use_dora=True),
        one("wav2vec2/lora_bias", ["conv_layers.0.conv", "v_proj"], lora_bias=True),
        one("videomae/plain", ["projection", "value"]),
        one("videomae/dora", ["projection", "value"], use_dora=True),
        one("videomae/bias_lora_only", ["query", "projection"], bias="lora_only"),
        # two towers, encoder and decoder, vision and language
        one("clip/plain", ["q_proj", "fc2", "text_projection"]),
        one("clip/tables_and_patches", ["token_embedding", "position_embedding", "patch_embedding", "v_proj"]),
        one("siglip/attention_pool", ["vision_model.head.attention"]),
        one("siglip/attention_pool_and_linear", ["q_proj", "vision_model.head.attention", "head.mlp.fc1"]),
        one("siglip/all_linear", "all-linear", out_of_reach="head.attention.out_proj"),
        one("t5/plain", ["q", "v", "wi_0", "wo"]),
        one("t5/dora", ["q", "wo"], use_dora=True),
        one("t5/relative_bias", ["q", "relative_attention_bias"]),
        one("t5/tokens", ["q"], trainable_token_indices=[3, 10, 45]),
        one("t5/lm_head", ["q", "lm_head"], recipe=UNTIE, refused=T5_HEAD),
        one("t5_of_transformers_4/plain", ["q", "wo"]),
        one("t5_of_transformers_4/lm_head", ["q", "lm_head"], recipe=UNTIE, refused=T5_HEAD),
        one("qwen2_vl/all_linear", "all-linear"),
        one("qwen2_vl/patches", ["proj", "q_proj", "patch_embed.proj"]),
        one("llava/language", llava_language),
        one("llava/language_and_vision", ["q_proj", "v_proj", "fc1"]),
        one("llava/projector", ["q_proj"], modules_to_save=["multi_modal_projector"]),
        one("llava/lm_head", ["q_proj", "lm_head"]),
        one(
            "llava/names_of_the_text_model", llava_language,
            edit=v.renamed({".model.language_model.": ".model."}, targets=["q_proj", "down_proj"]),
            keys={"key_mapping": {r"^model\.layers\.": "model.language_model.layers."}}, second_opinion=False,
        ),
        one(
            "llava/names_of_the_text_model_unmapped", llava_language,
            edit=v.renamed({".model.language_model.": ".model."}, targets=["q_proj", "down_proj"]),
            second_opinion=False,  # one prefix fits every module, so the names need no mapping
        ),
        one(
            "llava/names_of_transformers_4", llava_language,
            edit=v.renamed(
                {".model.language_model.": ".language_model.model."},
                targets=r".*language_model.*\.(q_proj|down_proj)",
            ),
            second_opinion=False,
        ),
        # parameters of expert layers
        *[
            one(f"{model}/{name}", [], target_parameters=targets)
            for model in ("qwen3_moe", "mixtral", "gpt_oss")
            for name, targets in experts.items()
        ],
        *[
            one(f"{model}/both_rslora", ["q_proj"], target_parameters=experts["both"], use_rslora=True)
            for model in ("qwen3_moe", "gpt_oss")
        ],
        one("qwen3_moe_shards/both", **swapped, recipe={"max_shard_size": "12KB"}),
        one("qwen3_moe_square/both", **swapped),
        one("gpt_oss_square/both", **swapped),
        one("qwen3_moe/router", ["q_proj"], target_parameters=["mlp.gate.weight"]),
        one("gpt_oss/router_and_down", ["q_proj"], target_parameters=["mlp.router.weight", "experts.down_proj"]),
        one("gpt_oss/expert_biases", [], target_parameters=[*experts["both"], "experts.gate_up_proj_bias"]),
        one(
            "qwen3_moe/patterns", ["q_proj"], target_parameters=experts["both"],
            rank_pattern={"experts.down_proj": 2}, alpha_pattern={"experts.gate_up_proj": 3, "q_proj": 5},
        ),
        one("qwen3_moe/rank_major", **swapped, edit=v.rank_major),
        one("qwen3_moe/grouped_by_expert", **swapped, edit=v.grouped_by_expert),
        one("qwen3_moe/peft_0_18", **swapped, edit=v.moe_of_peft_0_18),
        one("qwen3_moe/peft_0_19", **swapped, edit=v.moe_of_peft_0_19),
        one("qwen3_moe_square/peft_0_18", **swapped, edit=v.moe_of_peft_0_18),
        one("qwen3_moe_square/peft_0_19", **swapped, edit=v.moe_of_peft_0_19),
        one("gpt_oss/peft_0_19", **swapped, edit=v.moe_of_peft_0_19_transposed),
        one("gpt_oss_square/peft_0_19", **swapped, edit=v.moe_of_peft_0_19_transposed),
        one("qwen3_moe_square/gate_up_peft_0_18", [], target_parameters=experts["gate_up"], edit=v.moe_of_peft_0_18),
        one(
            "gpt_oss_square/down_peft_0_19", [], target_parameters=experts["down"], edit=v.moe_of_peft_0_19_transposed
        ),
        *[
            one(f"{model}/per_expert", write=v.per_expert(names))
            for model, names in (("qwen3_moe", QWEN_V4), ("mixtral", MIXTRAL_V4))
        ],
        *[
            one(f"{model}/per_expert_rslora", write=v.per_expert(names, use_rslora=True), reference="dense")
            for model, names in (("qwen3_moe", QWEN_V4), ("mixtral", MIXTRAL_V4))
        ],
        one(
            "qwen3_moe/per_expert_and_router",
            write=v.per_expert({**QWEN_V4, "router": "model.layers.{layer}.mlp.gate"}),
        ),
        one(
            "mixtral/per_expert_and_router",
            write=v.per_expert({**MIXTRAL_V4, "router": "model.layers.{layer}.block_sparse_moe.gate"}),
        ),
        one("qwen3_moe/per_expert_down", write=v.per_expert({"down": QWEN_V4["down"]})),
        # no library knows this model
        one("hand_made/plain", ["inner", "head", "embed"]),
        one("hand_made/attention", ["attention"]),
        one("hand_made/attention_alpha", ["attention"], alpha_pattern={"attention": 3}, rank_pattern={"attention": 5}),
        one("hand_made/attention_lora_bias", ["attention"], lora_bias=True),
        one("hand_made/attention_rslora", ["attention", "head"], use_rslora=True),
        one("hand_made/convolutions", ["conv", "point", "inner"]),
        one("hand_made/volume", ["volume"]),
        one("hand_made/bare_parameters", ["head"], target_parameters=["bare.matrix", "bare.stack"]),
        one("hand_made/save", ["inner"], modules_to_save=["head", "conv"]),
        # combinations
        three("llama/three/plain", t(*Q4), t(*KV), t(*MIX)),
        three(
            "llama/three/scalings", t(*Q4, use_rslora=True), t(*MIX, rank_pattern={"q_proj": 3}),
            t(*MLP, alpha_pattern={"q_proj": 2}),
        ),
        three("llama/three/dora", t(*Q4, use_dora=True), t(*MIX, use_dora=True), t(*MLP), reference="dense"),
        three("llama/three/one_dora", t(*Q4, use_dora=True), t(*KV), t("o_proj", "up_proj")),
        three("llama/three/embed", t("embed_tokens", "q_proj"), t("embed_tokens", "lm_head"), t(*MIX)),
        three(
            "llama/three/embed_dora", t("embed_tokens", use_dora=True), t("embed_tokens", use_dora=True), t(*MIX),
            reference="dense",
        ),
        three("llama/three/one_owner", t(*ATTENTION, modules_to_save=["lm_head"]), t(*KV), t(*MIX)),
        three(
            "llama/three/two_owners", t(*ATTENTION, modules_to_save=["lm_head"]),
            t(*KV, modules_to_save=["lm_head"]), t(*MIX), refused=("lm_head", "modules_to_save"),
        ),
        three(
            "llama/three/tokens_one", t(*ATTENTION, trainable_token_indices=[3, 10]), t(*KV), t(*MIX),
            reference="dense",  # PEFT: KeyError when an adapter without token rows joins one that has them
        ),
        three(
            "llama/three/tokens_disjoint", t(*ATTENTION, trainable_token_indices=[3, 10]),
            t(*KV, trainable_token_indices=[11]), t(*MIX), reference="dense",
        ),
        three(
            "llama/three/tokens_shared", t(*ATTENTION, trainable_token_indices=[3, 10]),
            t(*KV, trainable_token_indices=[10, 11]), t(*MIX), refused=("10", "token"),
        ),
        three(
            "llama/three/converted", t(*MLP, init_lora_weights="pissa", initial=True, convert=True),
            t(*MIX, init_lora_weights="olora", initial=True, convert=True), t(*KV), reference="dense",
        ),
        three("llama/three/bdlora", t("q_proj", "v_proj", "down_proj", use_bdlora=_bd(), r=4), t(*KV), t(*MIX)),
        three("llama_biased/three/lora_bias", t(*Q4, lora_bias=True), t(*KV, lora_bias=True), t(*MIX)),
        three("llama_biased/three/one_bias", t(*Q4, bias="all"), t(*KV), t(*MIX), reference="dense"),
        three(
            "llama_biased/three/biases", t(*Q4, bias="lora_only"), t(*MIX, bias="lora_only"), t(*MLP, bias="all"),
            reference="dense",
        ),
        three(
            "llama_tied/three/lm_head", t("q_proj", "lm_head"), t("embed_tokens"), t("lm_head", "up_proj"),
            recipe=UNTIE,
        ),
        three(
            "llama_tied/three/ensure_tying", t("embed_tokens", ensure_weight_tying=True),
            t("lm_head", "q_proj", ensure_weight_tying=True), t(*MIX),
            reference="dense",  # PEFT drops the second adapter's half on the head
        ),
        three("gpt2/three/plain", t("c_attn"), t("attn.c_proj", "c_attn"), t("c_fc", "attn.c_proj")),
        three(
            "gpt2/three/dora", t("c_attn", use_dora=True), t("c_attn"), t("c_attn", "c_fc", use_dora=True),
            reference="dense",
        ),
        three("vit/three/patches", t("projection"), t("projection", "q_proj"), t("q_proj", "v_proj")),
        three(
            "wav2vec2/three/plain", t("conv_layers.0.conv", "q_proj"), t("conv_layers.0.conv"),
            t("conv_layers.1.conv"),
        ),
        three("videomae/three/plain", t("projection"), t("projection", "value"), t("value", "query")),
        three(
            "resnet/three/dora", t("convolution", use_dora=True), t("convolution", use_dora=True), t("convolution"),
            reference="dense",
        ),
        three("siglip/three/attention_pool", *[t("vision_model.head.attention", "q_proj")] * 2, t("q_proj", "fc1")),
        three("clip/three/plain", t("q_proj"), t("v_proj", "fc1"), t("q_proj", "text_projection")),
        three("t5/three/plain", t("q", "wo"), t("q", "v"), t("wi_0", "k")),
        three("llava/three/plain", t("q_proj"), t("v_proj", "fc1"), t("down_proj", "q_proj", "linear_1")),
        *[
            three(f"{model}/three/experts", *[{"target_modules": [], "target_parameters": experts["both"]}] * 3)
            for model in ("qwen3_moe", "mixtral", "gpt_oss")
        ],
        three(
            "qwen3_moe/three/different_experts", {"target_modules": ["q_proj"], "target_parameters": experts["down"]},
            {"target_modules": [], "target_parameters": experts["both"]},
            {"target_modules": ["v_proj"], "target_parameters": experts["gate_up"]}, reference="dense",
        ),
        three("hand_made/three/attention", t("attention", "head"), t("attention"), t("inner", "embed")),
    ]  # fmt: skip
