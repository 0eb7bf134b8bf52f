"""Parts of reports: places of sites, numbers, axes, rows of a timeline, colours."""

from __future__ import annotations

import base64
import hashlib
import math
from itertools import pairwise

import pytest
from outputs import parquet, receipt, site_names

from ray_merge.drive.unit_time import unit_time
from ray_merge.report.axes import path, round_ticks, scale
from ray_merge.report.charts import Dot, scatter
from ray_merge.report.curves import kept_steps
from ray_merge.report.heat import step_class
from ray_merge.report.limits import limits
from ray_merge.report.markup import Markup, breakable, escape, number, percent, seconds, tag
from ray_merge.report.sites import place, read_sites
from ray_merge.report.style import DARK, DARK_LINES, DARK_TEXT, LIGHT, LIGHT_LINES, LIGHT_TEXT, POLICY, SCRIPT
from ray_merge.report.times import lanes, stretches, units_of


@pytest.mark.parametrize(
    ("site", "where"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers.", 3, "self_attn.q_proj")),
        ("layers.12.mlp.experts.7.up_proj", ("layers.", 12, "mlp.experts.*.up_proj")),
        ("model.layers.0.mlp.experts.gate_up_proj[5]", ("model.layers.", 0, "mlp.experts.gate_up_proj[*]")),
        ("0.weight", ("", 0, "weight")),
        ("lm_head", ("", -1, "lm_head")),
        ("model.embed_tokens[34 rows]", ("", -1, "model.embed_tokens[34 rows]")),
        ("classifier.2", ("", -1, "classifier.2")),
    ],
)
def test_a_site_stands_in_a_block_and_a_kind_of_module(site, where):
    assert place(site) == where


def test_sites_that_share_a_cell_are_combined_by_the_figure():
    sites = [f"h.0.experts.{index}.up" for index in range(4)]
    facts = read_sites(
        parquet(
            sites,
            update_norm=[1.0, 2.0, 2.0, 4.0],
            lost_share=[0.1, 0.4, 0.2, 0.3],
            erank_all=[1.0, 2.0, 3.0, 6.0],
        ),
        limits(1),
    )
    (grid,) = facts.grids
    assert (grid.rows, grid.columns, grid.most) == (("0",), ("experts.*.up",), 4)
    assert {key: rows[0][0] for key, rows in grid.values.items()} == {
        "update_norm": 5.0, "lost_share": 0.4, "erank_all": 3.0,
    }  # fmt: skip
    assert facts.norm == 5.0
    assert facts.worst == (0.4, sites[1])


def test_blocks_and_modules_beyond_the_limit_are_put_together_and_none_is_lost():
    sites = [f"h.{block}.m{module}" for block in range(150) for module in range(20)]
    facts = read_sites(parquet(sites, update_norm=[1.0] * len(sites)), limits(1))
    (grid,) = facts.grids
    assert len(grid.rows) <= limits(1).rows
    assert (grid.rows[0], grid.rows[-1]) == ("0-2", "147-149")
    assert len(grid.columns) == limits(1).columns
    assert grid.columns[-1] == "others (9)"
    squares = sum(value**2 for row in grid.values["update_norm"] for value in row if value is not None)
    assert squares == pytest.approx(len(sites))


def test_lists_of_blocks_have_a_map_each_and_an_exported_adapter_is_shown_where_it_is_alone():
    sites = ["encoder.block.0.q", "decoder.block.0.q", "lm_head"]
    facts = read_sites(parquet(sites, export=["adapter"] * 3), limits(1))
    assert [grid.title for grid in facts.grids] == ["decoder.block", "encoder.block", "outside the blocks"]
    assert facts.export == "adapter"
    both = read_sites(parquet(sites * 2, export=["checkpoint"] * 3 + ["adapter"] * 3), limits(1))
    assert (both.export, both.n_sites) == ("checkpoint", 3)


def test_a_file_without_sites_is_named_by_what_it_has():
    with pytest.raises(ValueError, match="columns export, tensor and none of the name site"):
        read_sites(parquet(site_names(2), site=None, update_norm=None, lost_share=None), limits(1))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.0, "1.00"), (0.25, "0.250"), (12.345, "12.3"), (1234.5, "1,234"), (1e-5, "1.00e-5"),
        (-0.5, "-0.500"), (2.5e7, "2.50e7"), (None, "\N{EN DASH}"), (math.nan, "\N{EN DASH}"),
        (math.inf, "\N{INFINITY}"),        (-math.inf, "-\N{INFINITY}"), (999.96, "1,000"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_shares_and_spans_have_their_units():
    assert (percent(0.0544), percent(None), percent(0.0)) == ("5.44%", "\N{EN DASH}", "0%")
    assert (seconds(0.5), seconds(600), seconds(36_000)) == ("0.500 s", "10.0 min", "10.0 h")


def test_text_is_escaped_once_and_markup_is_not():
    assert tag("td", "<b>", Markup("<i></i>"), title='"') == '<td title="&quot;">&lt;b&gt;<i></i></td>'
    assert escape(escape("&")) == "&amp;"
    assert tag("p", f"{tag('b', 'x')}") == "<p>&lt;b&gt;x&lt;/b&gt;</p>", "an f-string is text again"
    assert breakable("a/b=0.5,<c") == "a/<wbr>b=0.5,<wbr>&lt;c"


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (3.2, 3.2), (-5.0, 7.0), (1e-9, 2e-9), (0.0, 0.0), (1e6, 9e9), (0.49, 0.51)]
)
def test_ticks_are_round_rising_and_hold_all_values(low, high):
    ticks = round_ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(ticks) <= 7
    assert all(after > before for before, after in pairwise(ticks))


def test_a_logarithmic_axis_leaves_out_what_it_cannot_show():
    axis = scale([0.0, -1.0, math.inf, 3.0, 4e7], 0.0, 100.0, logarithmic=True)
    assert (axis.low, axis.high) == (1.0, 1e8)
    assert [axis.at(value) for value in (0.0, -1.0, math.inf, math.nan)] == [None] * 4
    assert axis.at(1e4) == pytest.approx(50.0)


def test_a_line_breaks_where_a_value_is_not_known():
    assert path([(0.0, 1.0), (1.0, None), (2.0, 3.0), (3.0, 4.25)]) == "M0 1M2 3L3 4.2"


def test_a_point_that_is_beaten_looks_otherwise():
    dots = [
        Dot(x=1.0, y=1.0, label="1", title="one", best=True),
        Dot(x=0.5, y=0.5, label="2", title="two", best=False),
    ]
    drawn = scatter("t", dots, key="k", x_label="x", y_label="y")
    assert drawn.count('class="dot best"') == 1
    assert drawn.count('class="dot"') == 1


def test_kept_steps_have_both_ends():
    assert kept_steps(3, 10) == (0, 1, 2)
    assert kept_steps(500, 5) == (0, 125, 250, 374, 499)
    assert kept_steps(0, 5) == ()


def times(*given):
    return units_of([unit_time(one) for one in given])


def test_a_unit_counts_once_however_many_merges_it_served():
    (unit,) = times(
        receipt("u", "w", 100.0, read=1.0, upload=1.0), receipt("u", "w", 100.0, read=1.0, upload=2.0)
    )
    assert (unit.seconds, unit.objects, unit.n_bytes, unit.read) == (3.0, 2, 2000, 500)


def test_rows_of_a_worker_do_not_overlap():
    units = times(
        *(receipt(f"u{index}", "w", 100.0 + index, read=1.5) for index in range(4)),
        receipt("x", "v", 100.0, read=9.0),
    )
    rows = lanes(units)
    assert [(worker, [one.unit for one in row]) for worker, row in rows] == [
        ("v", ["x"]), ("w", ["u0", "u2"]), ("w", ["u1", "u3"]),
    ]  # fmt: skip


def test_a_long_pause_begins_another_stretch_and_a_long_unit_does_not():
    units = times(
        receipt("a", "w", 1000.0, read=2000.0), receipt("b", "w", 2500.0, read=1.0), receipt("c", "w", 9000.0, read=1.0)
    )  # fmt: skip
    assert [[one.unit for one in some] for some in stretches(units)] == [["a", "b"], ["c"]]


def test_colours_are_by_even_steps_and_what_is_unknown_has_none():
    assert [step_class(value, (0.0, 1.0)) for value in (0.0, 0.55, 1.0, 2.0, -1.0)] == [
        "h0",
        "h5",
        "h9",
        "h9",
        "h0",
    ]
    assert {step_class(value, (0.0, 1.0)) for value in (None, math.nan, math.inf)} == {"hx"}
    assert step_class(3.0, (3.0, 3.0)) == "h0"


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("heat", "ink"), [(LIGHT, LIGHT_TEXT), (DARK, DARK_TEXT)])
def test_numbers_can_be_read_on_every_colour_and_lightness_alone_orders_them(heat, ink):
    assert min(contrast(*pair) for pair in zip(heat, ink, strict=True)) >= 4.5
    order = [luminance(colour) for colour in heat]
    assert order == sorted(order, reverse=heat is LIGHT)
    steps = [contrast(*pair) for pair in pairwise(heat)]
    assert min(steps) >= 1.08


@pytest.mark.parametrize(("lines", "ground"), [(LIGHT_LINES, "#ffffff"), (DARK_LINES, "#101418")])
def test_lines_stand_out_from_the_page(lines, ground):
    assert min(contrast(line, ground) for line in lines) >= 4.5


def test_the_policy_allows_this_script_and_no_other():
    wanted = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"script-src 'sha256-{wanted}'" in POLICY
    assert "default-src 'none'" in POLICY
    assert "</" not in SCRIPT
