"""Phi by entropies of cosines with texts (CLIP), against plain autograd; and which class gives the embeddings."""

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from lessons import information
from ray_merge.errors import AdapterError, RecipeError
from whole_models import Whole, batches, check, factors, images, run, write_adapter, write_rows

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "projection_dim": 8,
}  # fmt: skip
VISION = {**SIZES, "image_size": 8, "patch_size": 4, "initializer_range": 0.5, "initializer_factor": 5.0}
TEXT = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8}
CLASSES = {"pets": 3, "cars": 4}
SCALE = 20.0
PLACES = [
    f"vision_model.encoder.layers.{layer}.self_attn.{leaf}"
    for layer in (0, 1)
    for leaf in ("q_proj", "v_proj")
]


def school(folder, model, width=8):
    """A base and two adapters on it, each with images and a text head; adapters as the recipe has them."""
    model.save_pretrained(folder / "base")
    found = {}
    for seed, (name, count) in enumerate(CLASSES.items()):
        texts = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
        save_file({"texts": texts}, folder / f"{name}.safetensors")
        some = factors(model, PLACES, 2 + seed, seed)
        found[name] = {
            "path": write_adapter(folder / name, some, {}),
            "data": write_rows(folder / f"{name}.jsonl", images(seed, 8)),
            "head": {"path": f"{name}.safetensors", "logit_scale": SCALE},
        }
    return found


@pytest.mark.parametrize("kind", ["vision", "two towers"])
def test_phi_of_a_clip_with_text_heads_is_that_of_autograd(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if kind == "vision":
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    else:  # runs on pairs of a text and an image, so its image tower is what learns
        model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8))
    adapters = school(tmp_path, model)
    parameters = {"objective": "entropy", "anchors": "none", "alpha": 0.1, "diversity": 0.5}
    phi, history = run(tmp_path, "tara_a", adapters, {**parameters, "normalize_entropy": True})
    tower = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "base", dtype=torch.float64)
    whole = Whole(tower, [one["path"] for one in adapters.values()], "tara_a")
    given = {name: batches(tmp_path, name, one["data"]) for name, one in adapters.items()}

    def loss(step):
        values = []
        for seed, (name, count) in enumerate(CLASSES.items()):
            texts = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)).double()
            embeds = whole.model(**given[name][step]).image_embeds
            logits = SCALE * torch.nn.functional.cosine_similarity(embeds[:, None], texts[None], dim=-1)
            values.append(information(logits, diversity=0.5, normalise=True))
        return 0.1 * torch.logsumexp(torch.stack(values) / 2 / 0.1, 0)

    curve = whole.learn(loss)
    check(phi, whole)
    written = yaml.safe_load((tmp_path / "out" / "m" / "ray_merge" / "recipe.yaml").read_text())
    heads = {"path": str(tmp_path / "pets.safetensors"), "logit_scale": SCALE}
    assert written["adapters"]["pets"]["head"] == heads
    torch.testing.assert_close(history, torch.tensor(curve, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_text_head_of_another_width_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    adapters = school(tmp_path, model, width=5)
    message = r"pets\.head: the rows of .* have 5 numbers, but CLIPVisionModelWithProjection gives 8"
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, "tara_a", adapters, {})
    assert not (tmp_path / "out").exists()


def test_a_broken_text_head_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapters = school(tmp_path, CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)))
    save_file({"texts": torch.full((4, 8), torch.nan)}, tmp_path / "cars.safetensors")
    with pytest.raises(AdapterError, match=r"cars\.head: cars\.safetensors: texts holds NaN or Inf"):
        run(tmp_path, "tara_a", adapters, {})
    assert not (tmp_path / "out").exists()
