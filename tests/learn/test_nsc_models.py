"""NSC where the papers use it: a vision-language model with a trained projector, and dense regression on a ViT."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from whole_models import (
    Whole,
    batches,
    check,
    exact_norm,
    factors,
    images,
    run,
    write_adapter,
    write_rows,
)

NAMES = ("a", "b")
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.3,
}  # fmt: skip
IMAGE, VOCABULARY = 19, 20
VISION = {**SIZES, "image_size": 8, "patch_size": 4, "initializer_factor": 5.0}
LANGUAGE = [
    f"model.language_model.layers.{layer}.self_attn.{leaf}"
    for layer in (0, 1)
    for leaf in ("q_proj", "v_proj")
]
PROJECTOR = [f"model.multi_modal_projector.linear_{number}" for number in (1, 2)]


def mean_ratio(whole, given, paths):
    """Step -> the mean over tasks of the null-space ratios of their own inputs."""

    def loss(step):
        values = []
        for place, name in enumerate(NAMES):
            batch = given[name][step]
            whole.model(**batch)
            values.append(whole.omega(place, paths, batch.get("attention_mask")))
        return torch.stack(values).mean()

    return loss


def on_disk(path):
    """The site of a module of Llava, by the name that its weight has in a checkpoint."""
    return path.replace("model.language_model.", "language_model.model.").removeprefix("model.")


def test_a_vision_language_model_with_a_trained_projector(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    torch.manual_seed(0)
    larger = {**SIZES, "intermediate_size": 48}  # the largest tower is the one that is cut into stages
    text = LlamaConfig(**larger, vocab_size=VOCABULARY, num_key_value_heads=1, pad_token_id=0)
    config = LlavaConfig(
        text_config=text, vision_config=CLIPVisionConfig(**VISION), image_token_index=IMAGE,
        image_token_id=IMAGE, vision_feature_layer=-1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    adapters = {}
    for seed, name in enumerate(NAMES):
        draw = torch.Generator().manual_seed(seed)
        # A projector that was trained whole: A is half of its change (the scale is 2) and B the identity.
        whole_changes = {
            path: (torch.eye(16), 0.2 * torch.randn(16, 16, generator=draw)) for path in PROJECTOR
        }
        adapters[name] = {
            "path": write_adapter(
                tmp_path / name,
                {**factors(model, LANGUAGE, 2 + seed, seed), **whole_changes},
                {},
                task_type="CAUSAL_LM",
            ),
            "data": write_rows(
                tmp_path / f"{name}.jsonl",
                [
                    {
                        "input_ids": [
                            1,
                            *[IMAGE] * 4,
                            *(2 + (5 * row + place) % 16 for place in range(1 + row)),
                        ],
                        **one,
                    }
                    for row, one in enumerate(images(seed, 8))
                ],
            ),
        }
    phi, history = run(tmp_path, "nsc", adapters, {"layers": "last_quarter", "hold_sum": False})
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float64)
    whole = Whole(model, [adapters[name]["path"] for name in NAMES], "nsc")
    given = {name: batches(tmp_path, name, adapters[name]["data"]) for name in NAMES}
    curve = whole.learn(mean_ratio(whole, given, LANGUAGE[2:]))
    assert len(phi) == len(LANGUAGE) + len(PROJECTOR)
    # What follows the last inputs that are measured has no gradient, only weight decay.
    check(phi, whole, on_disk, still=LANGUAGE[2:])
    torch.testing.assert_close(history, torch.tensor(curve, dtype=torch.float64), rtol=0, atol=1e-8)


def in_vit(path):
    """The site of a module of ViT, as transformers 4 and checkpoints call it."""
    renamed = path.replace("layers.", "encoder.layer.").replace("attention.", "attention.attention.")
    return renamed.replace("q_proj", "query").replace("v_proj", "value")


def test_dense_regression_on_a_vit_needs_no_head(tmp_path):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES, image_size=8, patch_size=4))
    model.save_pretrained(tmp_path / "base")
    paths = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    assert len(paths) == 4
    adapters = {
        name: {
            "path": write_adapter(tmp_path / name, factors(model, paths, 2 + seed, seed), {}),
            "data": write_rows(tmp_path / f"{name}.jsonl", images(seed, 8)),
            "task": "regression",
        }
        for seed, name in enumerate(NAMES)
    }
    phi, history = run(tmp_path, "nsc", adapters, {"layers": "last_quarter", "hold_sum": False})
    whole = Whole(
        ViTModel.from_pretrained(tmp_path / "base", dtype=torch.float64),
        [adapters[name]["path"] for name in NAMES],
        "nsc",
    )
    given = {name: batches(tmp_path, name, adapters[name]["data"]) for name in NAMES}
    last = [path for path in paths if ".1." in path]
    curve = whole.learn(mean_ratio(whole, given, last))
    check(phi, whole, in_vit, still=last)
    torch.testing.assert_close(history, torch.tensor(curve, dtype=torch.float64), rtol=0, atol=1e-8)
