from ray_merge.models.names import Naming, find_naming


def weights(*modules):
    return {f"{module}.weight" for module in modules}


BERT = weights(*(f"encoder.layer.{i}.attention.self.{m}" for i in range(3) for m in ("query", "value")))
BERT_PARAMETERS = [f"bert.{name}" for name in sorted(BERT)]


def disks(naming, parameters, tensors):
    return [naming.disk(parameter, tensors) for parameter in parameters]


def test_names_of_the_class_that_saved_the_base_resolve_as_they_are():
    parameter = "model.layers.0.self_attn.q_proj.weight"
    naming = find_naming([parameter], {parameter, "lm_head.weight"})
    assert naming == Naming()
    assert naming.disk(parameter, {parameter, "lm_head.weight"}) == parameter
    assert naming.describe() == "runtime names = disk names"


def test_the_prefix_of_a_task_class_is_cut_off():
    naming = find_naming(BERT_PARAMETERS, BERT)
    assert naming == Naming(strip="bert.")
    assert disks(naming, BERT_PARAMETERS, BERT) == sorted(BERT)
    assert naming.describe() == "runtime bert.* -> disk *"


def test_the_prefix_of_a_task_class_is_put_in_front():
    tensors = {f"bert.{name}" for name in BERT} | weights("cls.predictions.transform.dense")
    naming = find_naming(BERT, tensors)
    assert naming == Naming(add="bert.")
    assert disks(naming, sorted(BERT), tensors) == [f"bert.{name}" for name in sorted(BERT)]
    assert naming.describe() == "runtime * -> disk bert.*"


def test_a_parameter_without_the_prefix_is_not_found_through_it():
    assert Naming(strip="bert.").disk("roberta.encoder.weight", weights("encoder")) is None
    assert Naming(strip="bert.").disk("bert.encoder.weight", weights("encoder")) == "encoder.weight"


def test_a_name_that_the_base_has_is_taken_before_the_prefix():
    tensors = weights("bert.encoder", "encoder")
    assert Naming(strip="bert.").disk("bert.encoder.weight", tensors) == "bert.encoder.weight"


def test_a_prefix_that_could_be_either_of_two_is_not_guessed():
    tensors = weights("text_model.encoder.layers.0.q_proj", "vision_model.encoder.layers.0.q_proj")
    assert find_naming(["encoder.layers.0.q_proj.weight"], tensors) == Naming()
    assert Naming().disk("encoder.layers.0.q_proj.weight", tensors) is None


def test_a_parameter_that_the_base_lacks_does_not_keep_the_others_from_their_prefix():
    lacking = [*BERT_PARAMETERS, "classifier.weight", "bert.encoder.layer.9.attention.self.query.weight"]
    naming = find_naming(lacking, BERT)
    assert naming == Naming(strip="bert.")
    assert disks(naming, lacking[-2:], BERT) == [None, None]


def test_a_part_of_a_name_is_never_enough():
    tensors = weights("model.layers.0.q_proj", "model.layers.10.q_proj")
    for parameter in ("model.layers.0.q_pro.weight", "layers.1.q_proj.weight", "q_proj.weight"):
        assert find_naming([parameter], tensors).disk(parameter, tensors) is None


def test_biases_and_other_parameters_follow_the_same_prefix():
    tensors = BERT | {"embeddings.LayerNorm.bias", "attention.in_proj_weight"}
    naming = find_naming([*BERT_PARAMETERS, "bert.embeddings.LayerNorm.bias"], tensors)
    assert naming.disk("bert.embeddings.LayerNorm.bias", tensors) == "embeddings.LayerNorm.bias"
    assert naming.disk("bert.attention.in_proj_weight", tensors) == "attention.in_proj_weight"


def test_the_order_of_names_does_not_matter():
    assert find_naming(BERT_PARAMETERS[::-1], sorted(BERT)[::-1]) == find_naming(BERT_PARAMETERS, BERT)
