"""How many outputs a head has, what they are called and what they mean."""

from __future__ import annotations

import pytest

from ray_merge.plan.labels import label_names, problem_of, saved_rows
from ray_merge.spec import TensorEntry

MULTI = "multi_label_classification"


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [
        ([(3, 8), (3,)], 3),
        ([(8, 8), (3, 8), (8,)], 3),
        ([(8, 8), (40, 8)], 40),
        ([(40, 8), (8, 8)], 40),
        ([(4, 8), (40, 4)], 40),
        ([(8, 8), (8, 8)], 8),
        ([(8,), (3, 8, 1), ()], 0),
        ([], 0),
    ],
)
def test_the_last_layer_of_a_head_is_the_one_that_no_other_reads(shapes, rows):
    entries = [TensorEntry(str(n), "F32", shape, "a.safetensors", 0, 0) for n, shape in enumerate(shapes)]
    assert saved_rows(entries) == rows


@pytest.mark.parametrize(
    ("named", "names"),
    [
        ({"0": "no", "1": "yes"}, ("no", "yes")),
        ({1: "yes", 0: "no"}, ("no", "yes")),
        ({"0": "no", "1": "yes", "2": "both"}, ("LABEL_0", "LABEL_1")),
        ({"1": "no", "2": "yes"}, ("LABEL_0", "LABEL_1")),
        (["no", "yes"], ("LABEL_0", "LABEL_1")),
        (None, ("LABEL_0", "LABEL_1")),
    ],
)
def test_the_bases_names_are_kept_where_it_has_as_many(named, names):
    assert label_names({} if named is None else {"id2label": named}, 2) == names


@pytest.mark.parametrize(
    ("config", "task", "n_labels", "problem"),
    [
        ({}, None, 3, "single_label_classification"),
        ({}, None, 1, "regression"),
        ({}, "regression", 3, "regression"),
        ({"problem_type": MULTI}, None, 2, MULTI),
        ({"problem_type": MULTI, "num_labels": 3}, "SEQ_CLS", 3, MULTI),
        ({"problem_type": MULTI, "id2label": {"0": "x", "1": "y", "2": "z"}}, None, 3, MULTI),
        ({"problem_type": MULTI, "num_labels": 3}, "classification", 3, "single_label_classification"),
        ({"problem_type": MULTI, "num_labels": 3}, "regression", 3, "regression"),
        ({"problem_type": MULTI, "num_labels": 3}, None, 4, "single_label_classification"),
        ({"problem_type": "regression", "num_labels": 1}, None, 3, "single_label_classification"),
        ({"problem_type": "other"}, None, 2, "single_label_classification"),
    ],
)
def test_what_the_outputs_mean(config, task, n_labels, problem):
    assert problem_of(config, task, n_labels) == problem
