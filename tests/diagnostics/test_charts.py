import re

import pytest

from mixora.diagnostics.charts import CROSS, MOST_POINTS, draw_heat, draw_lines, find_ticks


def paths(chart):
    return re.findall(r'class="line c\d d\d" d="(M[^"]*)"><title', chart)


def test_a_line_spans_the_plot_from_its_first_to_its_last_point():
    chart = draw_lines("loss", {"loss": [(1, 4.0), (2, 2.0), (3, 0.0)]}, "step")
    assert paths(chart) == ["M0 0h0L500 500L1000 1000"]
    assert re.findall(r'"left:([\d.]+)%">([\d,]+)<', chart) == [("0", "1"), ("50", "2"), ("100", "3")]


@pytest.mark.parametrize("gap", [None, float("nan"), float("inf")])
def test_what_is_not_finite_leaves_a_gap_and_a_lone_point_is_a_dot(gap):
    chart = draw_lines("loss", {"loss": [(0, 1.0), (1, gap), (2, 1.0)]}, "step")
    assert paths(chart) == ["M0 0h0M1000 0h0"]
    assert draw_lines("loss", {"loss": [(0, gap)]}, "step") == ""
    assert draw_lines("loss", {}, "step") == ""


def test_lines_differ_in_more_than_colour_and_have_a_legend():
    chart = draw_lines("entropy", {f"kind {n}": [(0, n), (1, n)] for n in range(28)}, "layer")
    assert len(set(re.findall(r'class="line (c\d d\d)"', chart))) == 28
    assert chart.count("<li>") == 28
    assert "<li>" not in draw_lines("one", {"one": [(0, 1.0)]}, "layer")


def test_a_long_line_goes_through_means_of_neighbours():
    chart = draw_lines("loss", {"loss": [(n, float(n % 2)) for n in range(10 * MOST_POINTS)]}, "step")
    (path,) = paths(chart)
    assert len(re.findall("[ML]", path)) == MOST_POINTS
    assert len(set(re.findall(r"[ML]\d+ (\d+)", path))) == 1  # all means are 0.5


@pytest.mark.parametrize(
    ("low", "high", "is_whole", "ticks"),
    [
        (0, 1, False, [0, 0.25, 0.5, 0.75, 1]),
        (0, 4.1, False, [0, 2, 4, 6]),
        (0, 0.013, False, [0, 0.005, 0.01, 0.015]),
        (-0.3, 0.5, False, [-0.4, -0.2, 0, 0.2, 0.4, 0.6]),
        (0, 0, False, [0, 0.25, 0.5, 0.75, 1]),
        (0, 3, True, [0, 1, 2, 3]),
        (1, 2000, True, [0, 500, 1000, 1500, 2000]),
    ],
)
def test_ticks_are_round_and_cover_the_values(low, high, is_whole, ticks):
    assert find_ticks(low, high, is_whole) == pytest.approx(ticks)


def cells(chart):
    return re.findall(r'<td class="([^"]+)" title="([^"]+)">(.*?)</td>', chart)


def test_cells_are_coloured_by_the_even_share_and_show_their_number():
    chart = draw_heat("q", {"0": [0.0, 0.25, 0.75, 0.0], "1": [0.25, 0.25, 0.25, 0.25]}, along="layer")
    assert cells(chart)[:3] == [("none", "0.0%", CROSS), ("h3", "25.0%", "25"), ("h10", "75.0%", "75")]
    assert {kind for kind, _, _ in cells(chart)[4:]} == {"h3"}
    # even among two is the colour of even among four
    assert {kind for kind, _, _ in cells(draw_heat("q", {"0": [0.5, 0.5]}))} == {"h3"}


def test_a_share_that_is_not_known_is_a_dash_and_many_columns_have_no_numbers():
    assert "<td>\N{EN DASH}</td>" in draw_heat("q", {"a": [None, 1.0]})
    wide = draw_heat("q", {"a": [1 / 64] * 64})
    assert [text for _, _, text in cells(wide)] == [""] * 64
    assert re.findall(r"<th>(\d+)</th>", wide) == [str(n) for n in range(0, 64, 8)]


def test_names_are_escaped():
    for chart in (
        draw_heat("<x1>", {"<x2>": [1.0]}, "<x3>"),
        draw_lines("<x1>", {"<x2>": [(0, 1.0)], "<x3>": [(0, 1.0)]}, "<x4>"),
    ):
        assert not re.search("<x", chart)
