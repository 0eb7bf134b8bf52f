"""Every tiny model is saved by transformers and loaded again: slots must say where each value came from."""

import json
import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ray_merge.errors import AdapterError, CheckpointError
from ray_merge.models.architecture import build_architecture, runtime_module
from ray_merge.models.conversion import Slot
from ray_merge.models.model_class import class_candidates

V5 = int(transformers.__version__.split(".")[0]) >= 5
renames = pytest.mark.skipif(not V5, reason="transformers 4 has no other names for these modules")

TEXT = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=32,
    max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
DECODER = TEXT | dict(num_key_value_heads=2)
IMAGE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=8,
    patch_size=4,
)
GPT2 = dict(n_embd=16, n_layer=2, n_head=4, vocab_size=32, n_positions=32)
SPEECH = dict(
    conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)  # fmt: skip


def llava_config():
    vision = transformers.CLIPVisionConfig(**IMAGE, projection_dim=16)
    return transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**DECODER))


def gemma3_config():
    return transformers.Gemma3Config(
        text_config=DECODER | {"head_dim": 4}, vision_config=IMAGE, mm_tokens_per_image=4
    )


MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "llama-base": ("LlamaModel", "LlamaConfig", DECODER),
    "qwen2-tied": ("Qwen2ForCausalLM", "Qwen2Config", DECODER | {"tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", DECODER | dict(
        num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=4)),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | {"num_local_experts": 3}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", DECODER | dict(
        num_local_experts=3, head_dim=4, layer_types=["sliding_attention", "full_attention"])),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", DECODER | {"head_dim": 4}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-base": ("GPT2Model", "GPT2Config", GPT2),
    "bert": ("BertModel", "BertConfig", TEXT),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", TEXT),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", TEXT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "vit-base": ("ViTModel", "ViTConfig", IMAGE),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", IMAGE | {"use_swiglu_ffn": True}),
    "clip": ("CLIPModel", "CLIPConfig", dict(text_config=TEXT, vision_config=IMAGE, projection_dim=16)),
    "clip-vision": ("CLIPVisionModel", "CLIPVisionConfig", IMAGE),
    "t5": ("T5ForConditionalGeneration", "T5Config", dict(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=32)),
    "llava": ("LlavaForConditionalGeneration", llava_config, {}),
    "gemma3": ("Gemma3ForConditionalGeneration", gemma3_config, {}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", dict(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
    "convnext": ("ConvNextModel", "ConvNextConfig", dict(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, drop_path_rate=0.1)),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", {
        key: value for key, value in TEXT.items() if key != "max_position_embeddings"} | SPEECH),
    "mamba": ("MambaForCausalLM", "MambaConfig", dict(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)),
}  # fmt: skip

UNNAMED = {"dinov2-swiglu": "Chunk"} if V5 else {}
"""Models with parameters that no slot can name, and the operation that makes them."""

OTHER_CLASSES = [
    ("bert", {"class_name": "BertForSequenceClassification"}),
    ("bert", {"task_type": "SEQ_CLS"}),
    ("bert-mlm", {"task_type": "FEATURE_EXTRACTION"}),
    ("bert-mlm", {"class_name": "BertForTokenClassification"}),
    ("bert-classifier", {"class_name": "BertModel"}),
    ("roberta", {"task_type": "TOKEN_CLS"}),
    ("gpt2-base", {"task_type": "CAUSAL_LM"}),
    ("gpt2", {"class_name": "GPT2Model"}),
    ("llama", {"task_type": "SEQ_CLS"}),
    ("vit-base", {"class_name": "ViTForImageClassification"}),
    ("vit", {"class_name": "ViTModel"}),
    ("llava", {"class_name": "LlavaModel"}),
    ("llava", {"task_type": "CAUSAL_LM"}),
    ("clip", {"class_name": "CLIPVisionModel"}),
    ("t5", {"task_type": "SEQ_2_SEQ_LM"}),
]


class Zoo:
    """Saved models, each made once: folder, config.json and disk tensors."""

    def __init__(self, folder):
        self.folder = folder
        self.saved = {}

    def __call__(self, name):
        if name not in self.saved:
            class_name, config, options = MODELS[name]
            make = getattr(transformers, config) if isinstance(config, str) else config
            torch.manual_seed(0)
            model = getattr(transformers, class_name)(make(**options))
            for value in [*model.parameters(), *model.buffers()]:
                if value.is_floating_point():
                    value.data.normal_()
            model.save_pretrained(self.folder / name)
            config = json.loads((self.folder / name / "config.json").read_text())
            self.saved[name] = (config, load_file(self.folder / name / "model.safetensors"))
        return self.saved[name]

    def architecture(self, name, **options):
        config, tensors = self(name)
        return build_architecture(config, shapes(tensors), **options)

    def loaded(self, name, architecture):
        return getattr(transformers, architecture.name).from_pretrained(self.folder / name).to(torch.float32)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield Zoo(tmp_path_factory.mktemp("zoo"))
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def assemble(slots, tensors):
    """The runtime parameter that these slots describe, by their indices alone."""
    experts = {}
    for slot in slots:
        experts.setdefault(slot.expert, []).append(slot)
    whole = {}
    for expert, pieces in experts.items():
        if pieces[0].rows is None:
            (piece,) = pieces
            whole[expert] = tensors[piece.tensor]
            continue
        size = list(tensors[pieces[0].tensor].shape)
        size[pieces[0].axis] = max(piece.rows[1] for piece in pieces)
        whole[expert] = torch.full(size, float("nan"))
        for piece in pieces:
            start, end = piece.rows
            whole[expert].narrow(piece.axis, start, end - start).copy_(tensors[piece.tensor])
    return whole[None] if None in whole else torch.stack([whole[expert] for expert in range(len(whole))])


def check(zoo, name, architecture):
    """Slots hold every value of the loaded model; each disk tensor has one slot, is unused, or has a reason."""
    tensors = zoo(name)[1]
    state = zoo.loaded(name, architecture).state_dict()
    for parameter, slots in architecture.slots.items():
        torch.testing.assert_close(assemble(slots, tensors), state[parameter], rtol=0, atol=0, msg=parameter)
    used = [slot.tensor for slots in architecture.slots.values() for slot in slots]
    assert len(used) == len(set(used))
    assert not set(used) & set(architecture.unused)
    known = {*architecture.slots, *architecture.tied, *architecture.unsupported}
    return set(state) - known, set(tensors) - set(used) - set(architecture.unused)


@pytest.mark.parametrize("name", MODELS)
def test_disk_tensors_through_slots_are_the_loaded_model(zoo, name):
    architecture = zoo.architecture(name)
    absent, unexplained = check(zoo, name, architecture)
    assert absent == set()
    assert bool(unexplained) == (name in UNNAMED)
    assert set(architecture.unsupported) == (
        {
            parameter
            for parameter in architecture.parameters
            if "gate_proj" in parameter or "up_proj" in parameter
        }
        if name in UNNAMED
        else set()
    )
    assert all(UNNAMED[name] in why for why in architecture.unsupported.values())
    state = zoo.loaded(name, architecture)
    assert list(architecture.parameters) == [key for key, _ in state.named_parameters(remove_duplicate=False)]
    assert architecture.parameters == {
        key: tuple(state.state_dict()[key].shape) for key in architecture.parameters
    }


@pytest.mark.parametrize(
    ("name", "asked"),
    OTHER_CLASSES,
    ids=lambda one: one if isinstance(one, str) else next(iter(one.values())),
)
def test_a_checkpoint_of_another_class_keeps_all_that_the_two_share(zoo, name, asked):
    architecture = zoo.architecture(name, **asked)
    assert architecture.name == asked.get("class_name", architecture.name)
    absent, unexplained = check(zoo, name, architecture)
    assert unexplained == set()
    assert {parameter.split(".")[0] for parameter in absent} <= {"classifier", "score", "pooler"}
    assert {tensor.split(".")[0] for tensor in architecture.unused} <= {
        "cls", "classifier", "lm_head", "pooler", "language_model", "text_model", "logit_scale", "text_projection",
        "visual_projection", "bert",
    }  # fmt: skip


def test_kinds_are_those_of_the_modules(zoo):
    def kinds(name):
        return zoo.architecture(name).kinds

    gpt2 = kinds("gpt2")
    assert (gpt2["transformer.h.0.attn.c_attn"], gpt2["lm_head"]) == ("conv1d", "linear")
    assert (gpt2["transformer.wte"], gpt2["transformer.ln_f"]) == ("embedding", "norm")
    llama = kinds("llama")
    assert (llama["model.layers.1.mlp.up_proj"], llama["model.norm"]) == ("linear", "norm")
    assert "model.layers" not in llama
    assert kinds("qwen3-moe")["model.layers.0.mlp.gate"] in ("other", "linear")
    assert kinds("gpt-oss")["model.layers.0.mlp.experts"] == "other"
    assert kinds("gemma2")["model.embed_tokens"] == "embedding"
    assert kinds("vit")["vit.embeddings.patch_embeddings.projection"] == "conv"
    assert {kind for path, kind in kinds("convnext").items() if path.endswith(".dwconv")} == {"grouped_conv"}
    assert "grouped_conv" in {kind for path, kind in kinds("mamba").items() if path.endswith(".conv1d")}


def test_a_multihead_attention_is_one_kind():
    config = transformers.SiglipVisionConfig(**IMAGE).to_dict() | {"architectures": ["SiglipVisionModel"]}
    kinds = build_architecture(config, {}).kinds
    assert [kind for path, kind in kinds.items() if path.endswith("head.attention")] == ["mha"]


@renames
@pytest.mark.parametrize(
    ("name", "expert", "gate", "up", "down", "size"),
    [
        ("qwen3-moe", "mlp.experts", "gate_proj", "up_proj", "down_proj", 8),
        ("mixtral", "block_sparse_moe.experts", "w1", "w3", "w2", 24),
    ],
)
def test_experts_are_stacked_and_gate_stands_above_up(zoo, name, expert, gate, up, down, size):
    slots = zoo.architecture(name).slots
    disk = f"model.layers.1.{expert}"
    assert slots["model.layers.1.mlp.experts.gate_up_proj"] == tuple(
        Slot(f"{disk}.{e}.{tensor}.weight", e, rows)
        for e in range(3)
        for tensor, rows in ((gate, (0, size)), (up, (size, 2 * size)))
    )
    assert slots["model.layers.1.mlp.experts.down_proj"] == tuple(
        Slot(f"{disk}.{e}.{down}.weight", e) for e in range(3)
    )


@renames
def test_twelve_experts_keep_the_order_of_their_numbers(zoo):
    config, tensors = zoo("mixtral")
    many = {name: shape for name, shape in shapes(tensors).items() if ".experts." not in name}
    for layer in range(2):
        for e in range(12):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{e}"
            many |= {
                f"{prefix}.w1.weight": (24, 16),
                f"{prefix}.w2.weight": (16, 24),
                f"{prefix}.w3.weight": (24, 16),
            }
        many[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = (12, 16)
    architecture = build_architecture(config | {"num_local_experts": 12}, many)
    downs = architecture.slots["model.layers.0.mlp.experts.down_proj"]
    assert [slot.tensor.split(".")[5] for slot in downs] == [str(slot.expert) for slot in downs]
    assert architecture.unsupported == {}
    lost = {
        name: shape for name, shape in many.items() if "layers.0.block_sparse_moe.experts.7.w3" not in name
    }
    broken = build_architecture(config | {"num_local_experts": 12}, lost)
    assert list(broken.unsupported) == ["model.layers.0.mlp.experts.gate_up_proj"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a property that transformers renamed
def test_layout_of_experts_is_the_one_that_peft_sees(zoo):
    paths = {f"model.layers.{layer}.mlp.experts" for layer in range(2)}
    assert zoo.architecture("gpt-oss").transposed_experts == paths
    assert zoo.architecture("qwen3-moe").transposed_experts == frozenset()
    peft = pytest.importorskip("peft", minversion="0.19.1")
    for name in ("gpt-oss", "qwen3-moe"):
        architecture = zoo.architecture(name)
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
        model = peft.get_peft_model(zoo.loaded(name, architecture), config)
        wrapped = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
        _, d1, d2 = architecture.parameters["model.layers.0.mlp.experts.down_proj"]
        transposed = "model.layers.0.mlp.experts" in architecture.transposed_experts
        assert wrapped.lora_A["default"].weight.shape[1] == (d1 if transposed else d2)


def test_tied_names_point_to_the_one_on_disk(zoo):
    assert zoo.architecture("llama").tied == {}
    assert zoo.architecture("qwen2-tied").tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert zoo.architecture("gpt2-base", task_type="CAUSAL_LM").tied == {
        "lm_head.weight": "transformer.wte.weight"
    }
    assert zoo.architecture("t5").tied == dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight"
    )
    config, tensors = zoo("qwen2-tied")
    disk = shapes(tensors)
    only_head = {name.replace("model.embed_tokens", "lm_head"): shape for name, shape in disk.items()}
    assert build_architecture(config, only_head).tied == {"model.embed_tokens.weight": "lm_head.weight"}
    both = build_architecture(config, disk | {"lm_head.weight": (32, 16)})
    assert both.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert both.slots["lm_head.weight"] == (Slot("lm_head.weight"),)


@renames
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("vit", "vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj"),
        ("vit", "encoder.layer.1.attention.output.dense", "vit.layers.1.attention.o_proj"),
        ("vit", "vit.encoder.layer.1.output.dense", "vit.layers.1.mlp.fc2"),
        ("vit", "vit.layers.1.mlp.fc2", "vit.layers.1.mlp.fc2"),
        ("vit", "classifier", "classifier"),
        ("vit-base", "vit.encoder.layer.0.intermediate.dense", "layers.0.mlp.fc1"),
        ("llava", "language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
        ("llava", "language_model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
        ("llava", "language_model.lm_head", "lm_head"),
        ("llava", "multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("llava", "model.layers.0.self_attn.q_proj", None),
        ("mixtral", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1", None),
        ("clip-vision", "vision_model.encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.q_proj"),
        ("neox", "embed_out", "lm_head"),
        ("llama", "layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("llama", "model.layers.7.self_attn.q_proj", None),
        ("llama", "model.layers.0.self_attn", None),
        ("bert-mlm", "encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.query"),
    ],
)  # fmt: skip
def test_older_names_of_modules(zoo, name, old, new):
    assert runtime_module(zoo.architecture(name), old) == new


@renames
def test_older_names_are_known_though_the_base_was_saved_with_newer_ones(zoo):
    config, _ = zoo("vit")
    new = zoo.architecture("vit").parameters
    architecture = build_architecture(config, new)
    assert architecture.slots == {name: (Slot(name),) for name in new}
    query = runtime_module(architecture, "vit.encoder.layer.0.attention.attention.query")
    assert query == "vit.layers.0.attention.q_proj"


def test_a_name_that_two_modules_had_is_nobodys():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE).to_dict()
    architecture = build_architecture(config | {"architectures": ["CLIPModel"]}, {})
    assert runtime_module(architecture, "encoder.layers.0.self_attn.q_proj") is None


def test_legacy_names_of_parameters_are_renamed(zoo):
    config, tensors = zoo("bert")
    legacy = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): shape
        for name, shape in shapes(tensors).items()
    }
    slots = build_architecture(config, legacy, task_type="SEQ_CLS").slots
    assert slots["bert.embeddings.LayerNorm.weight"] == (Slot("embeddings.LayerNorm.gamma"),)
    assert len(slots) == len(legacy)


def test_what_does_not_fit_is_unsupported_with_both_shapes(zoo):
    config, tensors = zoo("llama")
    architecture = build_architecture(config, shapes(tensors) | {"model.norm.weight": (17,)})
    assert architecture.unsupported == {"model.norm.weight": "disk tensors make (17,), the class has (16,)"}
    assert "model.norm.weight" not in architecture.slots


@renames
def test_two_disk_tensors_for_one_parameter_are_never_chosen_from(zoo):
    config, tensors = zoo("vit")
    twice = shapes(tensors) | {"vit.layers.0.mlp.fc1.weight": (24, 16)}
    architecture = build_architecture(config, twice)
    assert "several disk tensors" in architecture.unsupported["vit.layers.0.mlp.fc1.weight"]


def test_classes_by_preference(zoo):
    config, _ = zoo("bert-mlm")
    named = class_candidates(config, class_name="BertModel", task_type="SEQ_CLS")
    assert named == ("BertModel", "BertForSequenceClassification", "BertForMaskedLM")
    assert class_candidates(config, class_name="SentenceTransformer") == ("BertForMaskedLM",)
    assert class_candidates(config, task_type="CAUSAL_LM")[0] == "BertLMHeadModel"
    assert class_candidates({"model_type": "bert"}) == ("BertModel",)
    assert class_candidates({"model_type": "bert", "architectures": ["MyBert"]}) == ()
    assert class_candidates({"architectures": ["BertModel"]}) == ("BertModel",)


def test_the_text_model_of_a_vision_language_base_takes_its_part_of_the_config(zoo):
    architecture = zoo.architecture("gemma3", class_name="Gemma3ForCausalLM")
    assert architecture.parameters["model.embed_tokens.weight"] == (32, 16)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen", "architectures": ["QWenLMHeadModel"], "auto_map": {}},
         ["model_type 'qwen'", "QWenLMHeadModel", "key_mapping"]),
        ({}, ["model_type None", "key_mapping"]),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "many"},
         ["cannot build LlamaForCausalLM", "'llama'", "key_mapping"]),
    ],
)  # fmt: skip
def test_an_unknown_class_is_refused_with_the_way_out(config, words):
    with pytest.raises(CheckpointError) as caught:
        build_architecture(config, {}, class_name=None)
    assert all(word in str(caught.value) for word in words)


def test_a_model_type_that_borrows_its_classes_is_read():
    borrowed = [
        model_type for model_type in ("exaone", "internlm3", "xlm-roberta", "camembert", "qwen2")
        if model_type in transformers.CONFIG_MAPPING
    ]  # fmt: skip
    for model_type in borrowed:
        config = transformers.CONFIG_MAPPING[model_type](**DECODER).to_dict()
        (name,) = class_candidates(config)
        architecture = build_architecture(config, {}, class_name=name)
        assert architecture.name == name
        assert (32, 16) in architecture.parameters.values()


def test_an_adapter_of_another_model_type_is_refused(zoo):
    with pytest.raises(AdapterError, match=r"trained in LlamaForCausalLM .* model_type 'bert'.*key_mapping"):
        zoo.architecture("bert", class_name="LlamaForCausalLM")


def test_keys_about_packing_and_running_change_nothing(zoo):
    config, tensors = zoo("llama")
    extras = {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "_attn_implementation": "flash_attention_2",
        "auto_map": {"AutoModelForCausalLM": "evil.Evil"},
    }
    before = json.dumps(config | extras)
    assert build_architecture(config | extras, shapes(tensors)) == zoo.architecture("llama")
    assert json.dumps(config | extras) == before


def test_nothing_outside_is_changed_or_printed(zoo, capfd):
    from huggingface_hub import constants

    zoo("llava")
    transformers.logging.set_verbosity_info()
    torch.manual_seed(3)
    before = (torch.get_rng_state(), constants.HF_HUB_OFFLINE, torch.get_default_dtype())
    architecture = zoo.architecture("llava")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (constants.HF_HUB_OFFLINE, torch.get_default_dtype()) == before[1:]
    assert transformers.logging.get_verbosity() == transformers.logging.INFO
    transformers.logging.set_verbosity_error()
    assert pickle.loads(pickle.dumps(architecture)) == architecture
    assert capfd.readouterr() == ("", "")


def test_405_billion_parameters_take_no_memory():
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 126,
        "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8,
        "vocab_size": 128256, "torch_dtype": "bfloat16",
    }  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    architecture = build_architecture(config, {})
    assert sum(torch.Size(shape).numel() for shape in architecture.parameters.values()) > 405e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_importing_it_loads_no_library():
    code = (
        "import sys, ray_merge.models.architecture; print([m for m in ('torch', 'peft') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=dict(os.environ),
    )
    assert done.stdout.strip() == "[]"
