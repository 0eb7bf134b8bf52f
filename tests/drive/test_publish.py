import hashlib
import json

import pytest
import torch
from safetensors import safe_open

from ray_merge.drive.outputs import Target
from ray_merge.drive.publish import checkpoint_index, head_file, publish
from ray_merge.errors import RunFailed, ShardConflict
from ray_merge.spec import Receipt, SiteReport
from ray_merge.storage.commit import MANIFEST, RECIPE, TIMELINE, id_line, probe
from ray_merge.storage.store import Stores, open_store
from tiny import Q0, factors, plan_of, tables, write_adapter, write_recipe_files

ID = "a" * 64


def receipts(plan, worker="host:1"):
    """Receipts of all shards, as if they had been made: of zeros."""
    made = [
        Receipt(
            merge_id=ID, name=shard.name, n_bytes=shard.n_bytes,
            sha256=hashlib.sha256(bytes(shard.n_bytes)).hexdigest(),
            tensors=len(shard.tensors), unit="u", worker=worker, seconds={"read": 0.1 if worker == "host:1" else 9.9},
            sites=(SiteReport(site=Q0, tensor=f"{Q0}.weight", rank=2, update_norm=0.1, lost_share=0.0),)
            if shard.index == 0 else (),
        )
        for shard in plan.shards
    ]  # fmt: skip
    return {receipt.name: receipt for receipt in made}


def published(tmp_path, recipe, to="out", worker="host:1", reverse=False, plan=None):
    plan = plan or plan_of(recipe)
    url = str(tmp_path / to)
    files = {"adapter_model.safetensors": "sha256:" + "d" * 64}
    inputs = {"seed": 0, "adapters": [{"name": name, "files": files} for name in plan.merges[0].adapters]}
    target = Target(root=url, url=url, merge_id=ID, inputs=inputs, complete=False, receipts={})
    given = receipts(plan, worker)
    store = Stores().open(url)
    probe(store, id_line(ID).encode(), ID)
    for shard in plan.shards:
        store.put_if_absent(shard.name, bytes(shard.n_bytes), {})
    ordered = dict(reversed(given.items())) if reverse else given
    publish(plan, plan.merges[0], target, ordered, dict.fromkeys(ordered, 1), Stores(), tmp_path)
    return tmp_path / to


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_manifest_names_every_other_file_by_its_bytes(tmp_path):
    folder = published(tmp_path, write_recipe_files(tmp_path))
    manifest = json.loads((folder / MANIFEST).read_text())
    named = {entry["name"]: entry for entry in manifest["files"]}
    assert list(named) == sorted(named)
    for name, data in contents(folder).items():
        if name not in (MANIFEST, RECIPE, TIMELINE):
            assert named[name] == {
                "name": name,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    assert {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer_config.json",
        "README.md",
    } <= named.keys()
    assert (manifest["id"], manifest["name"], manifest["sites"]) == (ID, "m", 2)


def test_hosts_times_and_the_order_of_receipts_change_no_byte(tmp_path):
    recipe = write_recipe_files(tmp_path)
    one = contents(published(tmp_path, recipe, "one"))
    two = contents(published(tmp_path, recipe, "two", worker="other:2", reverse=True))
    assert one.pop(TIMELINE) != two.pop(TIMELINE)
    assert one == two


def test_the_first_timeline_stays_and_a_merge_is_completed_over_it(tmp_path):
    recipe = write_recipe_files(tmp_path)
    folder = published(tmp_path, recipe)
    before = contents(folder)
    (folder / MANIFEST).unlink()
    assert contents(published(tmp_path, recipe, worker="other:2")) == before


def test_publishing_twice_adopts_everything(tmp_path):
    recipe = write_recipe_files(tmp_path)
    before = contents(published(tmp_path, recipe))
    assert contents(published(tmp_path, recipe)) == before


def test_another_manifest_in_the_way_is_a_conflict(tmp_path):
    recipe = write_recipe_files(tmp_path)
    published(tmp_path, recipe)
    (tmp_path / "out" / MANIFEST).write_text("{}")
    with pytest.raises(ShardConflict, match="MANIFEST"):
        published(tmp_path, recipe)


def test_the_index_counts_bytes_and_places_every_tensor(tmp_path):
    plan = plan_of(write_recipe_files(tmp_path) | {"out_dtype": "bfloat16"})
    index = checkpoint_index(plan, plan.merges[0])
    assert index["metadata"]["total_size"] == plan.base.n_bytes // 2
    assert index["weight_map"].keys() == plan.base.tensors.keys()
    assert set(index["weight_map"].values()) == {shard.name for shard in plan.shards}


def test_the_index_of_a_resized_vocabulary_counts_its_rows(tmp_path):
    recipe = write_recipe_files(tmp_path)
    write_adapter(tmp_path / "a", factors(Q0) | tables(20))
    recipe["merges"].append({"name": "n", "merge_method": "cat", "adapters": ["b"]})
    plan = plan_of(recipe)
    grown, plain = (checkpoint_index(plan, merge)["metadata"] for merge in plan.merges)
    assert plain["total_size"] == plan.base.n_bytes
    assert grown["total_size"] - plain["total_size"] == 2 * 4 * 8 * 4
    assert grown["total_parameters"] - plain["total_parameters"] == 2 * 4 * 8


def test_the_tokenizer_of_a_resized_vocabulary_is_the_adapters(tmp_path):
    recipe = write_recipe_files(tmp_path)
    write_adapter(tmp_path / "a", factors(Q0) | tables(20))
    (tmp_path / "a" / "tokenizer_config.json").write_text("the adapter's")
    (tmp_path / "a" / "added_tokens.json").write_text("new")
    (tmp_path / "base" / "vocab.txt").write_text("the base's")
    found = contents(published(tmp_path, recipe))
    assert found["tokenizer_config.json"] == b"the adapter's"
    assert (found["added_tokens.json"], found["vocab.txt"]) == (b"new", b"the base's")


@pytest.mark.parametrize(
    "changed",
    ["base/vocab.txt", "base/config.json", "a/tokenizer_config.json", "b/adapter_model.safetensors"],
)
def test_a_file_that_changed_since_the_plan_is_not_published(tmp_path, changed):
    recipe = write_recipe_files(tmp_path)
    write_adapter(tmp_path / "a", factors(Q0) | tables(20))
    if changed == "base/config.json":  # else the result has a config.json of its own
        write_adapter(tmp_path / "a")
    head = {"base_model.model.classifier.weight": torch.ones(3, 8)}
    write_adapter(tmp_path / "b", factors(Q0) | head, modules_to_save=["classifier"], task_type="SEQ_CLS")
    (tmp_path / "a" / "tokenizer_config.json").write_text("the adapter's")
    (tmp_path / "base" / "vocab.txt").write_text("the base's")
    plan = plan_of(recipe)
    (tmp_path / changed).write_bytes((tmp_path / changed).read_bytes()[:-1] + b" ")
    with pytest.raises(
        RunFailed, match=rf"{changed} changed in mid-run: version .* now; run the recipe again"
    ):
        published(tmp_path, recipe, plan=plan)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert not (tmp_path / "out" / changed.split("/")[1]).exists()


def test_the_manifest_says_where_every_tensor_of_an_adapter_went(tmp_path):
    recipe = write_recipe_files(tmp_path)
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    extra = {
        "base_model.model.model.norm.weight": torch.ones(8),
        "base_model.model.score.weight": torch.ones(3, 8),
        "base_model.model.score.original_module.weight": torch.ones(3, 8),
        rows: torch.ones(2, 8),
    }
    settings = {"modules_to_save": ["norm", "score"], "trainable_token_indices": [3, 1]}
    write_adapter(tmp_path / "a", factors(Q0) | extra, **settings)
    manifest = json.loads((published(tmp_path, recipe) / MANIFEST).read_text())
    found = manifest["adapters"]["a"]
    why = found.pop("ignored")
    assert found == {
        "factors": 1,
        "heads": 1,
        "replaced": ["model.norm.weight"],
        "tokens": {"model.embed_tokens.weight": [3, 1]},
    }
    assert list(why) == ["base_model.model.score.original_module.weight"]
    assert manifest["base_numerics"] == "as stored"


def with_head(tmp_path, **modules):
    recipe = write_recipe_files(tmp_path)
    head = {f"base_model.model.{name.replace('__', '.')}": tensor for name, tensor in modules.items()}
    write_adapter(
        tmp_path / "a", factors(Q0) | head, modules_to_save=["classifier", "pooler"], task_type="SEQ_CLS"
    )
    return recipe


def test_a_head_is_saved_with_what_a_loader_must_know(tmp_path):
    weight, bias = torch.arange(24.0).reshape(3, 8), torch.arange(3.0)
    recipe = with_head(
        tmp_path, classifier__weight=weight, classifier__bias=bias, pooler__dense__weight=torch.ones(8, 8)
    )
    plan = plan_of(recipe)
    (tmp_path / "h.safetensors").write_bytes(head_file(plan, plan.adapters["a"], Stores(), tmp_path))
    with safe_open(tmp_path / "h.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("classifier.weight"), weight)
        assert torch.equal(file.get_tensor("classifier.bias"), bias)
        metadata = file.metadata()
    assert (metadata["num_labels"], metadata["task_type"]) == ("3", "SEQ_CLS")
    assert metadata["problem_type"] == "single_label_classification"
    assert json.loads(metadata["id2label"]) == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


def test_a_head_with_a_hidden_layer_and_more_labels_than_its_width(tmp_path):
    recipe = with_head(
        tmp_path, classifier__dense__weight=torch.ones(8, 8), classifier__out_proj__weight=torch.ones(12, 8)
    )
    plan = plan_of(recipe)
    written = head_file(plan, plan.adapters["a"], Stores(), tmp_path)
    assert b'"num_labels":"12"' in written
    assert b"LABEL_11" in written


@pytest.mark.parametrize(("labels", "task"), [(1, None), (3, "regression")])
def test_one_output_or_the_recipes_word_make_a_regression(tmp_path, labels, task):
    recipe = with_head(tmp_path, classifier__weight=torch.ones(labels, 8))
    recipe["adapters"]["a"] = {"path": recipe["adapters"]["a"], "task": task}
    plan = plan_of(recipe)
    assert b'"problem_type":"regression"' in head_file(plan, plan.adapters["a"], Stores(), tmp_path)


def test_a_base_that_is_itself_a_result_passes_nothing_of_it_on(tmp_path):
    recipe = write_recipe_files(tmp_path)
    first = published(tmp_path, recipe, "first")
    for name, data in contents(first).items():  # everything of the first result except its weights
        target = tmp_path / "base" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in ("model.safetensors.index.json", "config.json"):
            target.write_bytes(data)
    second = published(tmp_path, recipe, "second")
    assert json.loads((second / MANIFEST).read_text())["id"] == ID
    assert open_store(str(second)).info("tokenizer_config.json") is not None
