import pytest

from ray_merge.errors import AdapterError
from ray_merge.models.names import Naming, find_naming, resolve


def weights(*modules):
    return {f"{module}.weight" for module in modules}


BERT = weights(*(f"encoder.layer.{i}.attention.self.{m}" for i in range(3) for m in ("query", "value")))
BERT_MODULES = [f"bert.{name.removesuffix('.weight')}" for name in sorted(BERT)]


def test_names_of_the_class_that_saved_the_base_resolve_as_they_are():
    module = "model.layers.0.self_attn.q_proj"
    naming, found = resolve({"a": [module]}, weights(module, "lm_head"), "base")
    assert naming == Naming()
    assert found == {module: f"{module}.weight"}
    assert naming.describe() == "runtime names = disk names"


def test_the_prefix_of_a_task_class_is_cut_off():
    naming, found = resolve({"a": BERT_MODULES}, BERT, "base")
    assert naming == Naming(strip="bert.")
    assert set(found.values()) == BERT
    assert naming.describe() == "runtime bert.* -> disk *"


def test_the_prefix_of_a_task_class_is_put_in_front():
    tensors = {f"bert.{name}" for name in BERT} | weights("cls.predictions.transform.dense")
    modules = [name.removesuffix(".weight") for name in BERT]
    naming, found = resolve({"a": modules}, tensors, "base")
    assert naming == Naming(add="bert.")
    assert set(found.values()) == {f"bert.{name}" for name in BERT}
    assert naming.describe() == "runtime * -> disk bert.*"


def test_one_prefix_serves_all_adapters_of_a_recipe():
    naming, found = resolve({"a": BERT_MODULES[:2], "b": BERT_MODULES[2:]}, BERT, "base")
    assert naming == Naming(strip="bert.")
    assert len(found) == len(BERT_MODULES)


def test_a_module_without_the_prefix_is_not_found_through_it():
    assert Naming(strip="bert.").disk("roberta.encoder", weights("encoder")) is None
    assert Naming(strip="bert.").disk("bert.encoder", weights("encoder")) == "encoder.weight"


def test_a_prefix_that_could_be_either_of_two_is_not_guessed():
    tensors = weights("text_model.encoder.layers.0.q_proj", "vision_model.encoder.layers.0.q_proj")
    assert find_naming(["encoder.layers.0.q_proj"], tensors) == Naming()
    with pytest.raises(AdapterError, match="1 of 1 adapted modules match nothing"):
        resolve({"clip": ["encoder.layers.0.q_proj"]}, tensors, "base")


def test_modules_that_match_nothing_name_adapter_count_and_what_the_base_has():
    with pytest.raises(AdapterError) as caught:
        resolve(
            {"good": BERT_MODULES, "bad": ["bert.encoder.layer.9.attention.self.query"]}, BERT, "s3://base"
        )
    message = str(caught.value)
    assert message.startswith("adapter bad: 1 of 1 adapted modules match nothing in s3://base")
    assert "bert.encoder.layer.9.attention.self.query" in message
    assert "encoder.layer.0.attention.self.query.weight" in message


def test_a_part_of_a_module_name_is_never_enough():
    with pytest.raises(AdapterError, match="match nothing"):
        resolve(
            {"a": ["model.layers.0.q_pro"]},
            weights("model.layers.0.q_proj", "model.layers.10.q_proj"),
            "base",
        )


def test_two_modules_may_not_be_one_tensor():
    tensors = weights("encoder.q", "encoder.v")
    with pytest.raises(
        AdapterError, match=r"bert\.encoder\.q and encoder\.q both resolve to encoder\.q\.weight"
    ):
        resolve({"a": ["bert.encoder.q"], "b": ["encoder.q"]}, tensors, "base")


def test_the_order_of_names_does_not_matter():
    assert find_naming(BERT_MODULES[::-1], sorted(BERT)[::-1]) == find_naming(BERT_MODULES, BERT)
