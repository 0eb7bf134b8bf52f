"""`calibrate` with adapters active, with encoder-decoders, and with data that change under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_merge.drive.events import Event
from ray_merge.errors import RunFailed
from ray_merge.models.model_class import quiet_and_offline
from ray_merge.moments import calibrate
from ray_merge.recipe import Recipe
from ray_merge.work.moments_file import MomentsFile
from stage_workers import inputs_by_hooks, make_model, recipe_for, write_tokens
from zoo import lora


def grams(result: Any, task: str) -> dict[str, torch.Tensor]:
    store = Path(result.index.store)
    return {
        site: MomentsFile(store / info.path).moments(site).gram
        for site, info in result.index.objects[task].items()
    }


def agree(found: dict[str, torch.Tensor], rows: dict[str, torch.Tensor], tolerance: float) -> None:
    for site, gram in found.items():
        wanted = rows[site].T @ rows[site]
        assert (gram - wanted).norm() <= tolerance * wanted.norm(), site


def test_an_active_adapter_of_an_embedding_counts_although_peft_saved_the_table_beside_it(tmp_path):
    # The saved table is a copy of the base's, and the adapter's product comes on top of it.
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_model("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    lora(model, tmp_path / "a", ["embed_tokens", "q_proj"], seed=1, init_lora_weights=False)
    recipe = recipe_for(
        base, tmp_path / "out", {"a": write_tokens(tmp_path / "a.jsonl", 0)}, ["q_proj"], stages=2
    )
    given = recipe.model_dump(exclude_none=True)
    given["adapters"]["a"]["path"] = str(tmp_path / "a")
    given["calibration"]["features"] = "adapter"
    result = calibrate(given, engine="local", cache_dir=tmp_path / "cache")
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "a"
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    own = inputs_by_hooks(Recipe.model_validate({**given, "base_model": str(tmp_path / "merged")}), "a")
    agree(grams(result, "a"), own, 1e-5)
    plain = inputs_by_hooks(recipe, "a")
    assert max(float((own[site] - plain[site]).norm() / plain[site].norm()) for site in own) > 0.05


def test_the_decoder_of_an_encoder_decoder_gets_the_same_tokens_one_to_the_right(tmp_path):
    from transformers import T5Config, T5Model

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=3,
        n_positions=64,
    )
    model = T5Model(config).eval()
    model.save_pretrained(tmp_path / "base")
    recipe = recipe_for(
        tmp_path / "base", tmp_path / "out", {"a": write_tokens(tmp_path / "a.jsonl", 0)}, ["wo", "q"]
    )
    result = calibrate(recipe.model_dump(exclude_none=True), engine="local", cache_dir=tmp_path / "cache")
    assert result.stages == 1
    rows: dict[str, list[torch.Tensor]] = {}
    mask: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("wo", "q"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: rows.setdefault(name, []).append(args[0][mask[-1].bool()].double())
            )
    from ray_merge.calibration import load_batches
    from ray_merge.storage.checkpoint import read_checkpoint
    from ray_merge.storage.store import Stores, open_store

    checkpoint = read_checkpoint(open_store(str(tmp_path / "base")))
    loaded = load_batches(recipe.adapters["a"].data, recipe.calibration, "a", checkpoint, tmp_path, Stores())
    with torch.no_grad():
        for batch in loaded.batches:
            mask.append(batch.attention_mask)
            shifted = torch.cat([torch.full_like(batch.input_ids[:, :1], 3), batch.input_ids[:, :-1]], dim=1)
            model(input_ids=batch.input_ids, attention_mask=mask[-1], decoder_input_ids=shifted)
    found = grams(result, "a")
    assert any(".decoder." in f".{site}" for site in found)
    agree(found, {site: torch.cat(rows[site]) for site in found}, 1e-6)


def test_data_that_change_while_the_run_starts_stop_it_before_anything_is_stored_under_the_old_id(tmp_path):
    base = make_model("llama", tmp_path / "base")
    data = write_tokens(tmp_path / "a.jsonl", 0)
    recipe = recipe_for(base, tmp_path / "out", {"a": data}, ["q_proj"]).model_dump(exclude_none=True)

    def meddle(event: Event) -> None:
        if event.kind == "start":
            write_tokens(data, 5)

    with pytest.raises(
        RunFailed, match=r"a\.jsonl, the data of a, changed since the run was planned; run again"
    ):
        calibrate(recipe, engine="local", cache_dir=tmp_path / "cache", progress=meddle)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_threads_that_are_quiet_at_once_leave_the_process_as_it_was():
    from huggingface_hub import constants
    from transformers.utils import logging

    before = constants.HF_HUB_OFFLINE, logging.get_verbosity()
    one, other = quiet_and_offline(), quiet_and_offline()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE
    other.__exit__(None, None, None)
    assert (constants.HF_HUB_OFFLINE, logging.get_verbosity()) == before
