import math

import pytest
from matplotlib.figure import Figure

from mixora.diagnostics.plots import plot_expert_load, plot_loss, save_png, spread_over_depth


def make_load(experts, groups=("lights", "music"), sites=("layers.0.up", "layers.1.up")):
    even = [1 / experts] * experts
    return {"groups": list(groups), "sites": list(sites), "load": [[even for _ in groups] for _ in sites]}


def heat_maps(figure):
    return [axes for axes in figure.axes if axes.images]


def test_loss_alone_is_one_line_with_units():
    figure = plot_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    (axes,) = figure.axes
    (line,) = axes.lines
    assert list(line.get_ydata()) == [2.0, 1.0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "training loss (nats)")


def test_each_auxiliary_term_is_a_line_of_its_own_panel():
    figure = plot_loss([{"step": 1, "loss": 2.0, "balance": 1.1}, {"step": 2, "loss": 1.0, "z_loss": 0.2}])
    loss, terms = figure.axes
    assert len(loss.lines) == 1
    assert [line.get_label() for line in terms.lines] == ["balance", "z_loss"]
    assert [text.get_text() for text in terms.get_legend().get_texts()] == ["balance", "z_loss"]
    assert len({line.get_linestyle() for line in terms.lines}) == 2


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_a_gap(gap, tmp_path):
    figure = plot_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": gap}, {"step": 3, "loss": 1.0}])
    assert math.isnan(figure.axes[0].lines[0].get_ydata()[1])
    save_png(figure, tmp_path / "gap.png")


def test_a_single_step_shows_as_a_dot():
    assert plot_loss([{"step": 7, "loss": 2.0}]).axes[0].lines[0].get_marker() == "o"


def test_heat_map_has_a_row_per_domain_and_a_column_per_expert(tmp_path):
    figure = plot_expert_load(make_load(experts=4, groups=["a", "b", "c"]))
    maps = heat_maps(figure)
    assert len(maps) == 2
    for axes in maps:
        assert axes.images[0].get_array().shape == (3, 4)
        assert [text.get_text() for text in axes.texts] == ["25%"] * 12
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert maps[-1].get_xlabel() == "expert"
    assert save_png(figure, tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_left_out_of_narrow_cells(tmp_path):
    figure = plot_expert_load(make_load(experts=64))
    assert not heat_maps(figure)[0].texts
    save_png(figure, tmp_path / "load.png")


def test_sites_may_differ_in_their_number_of_experts():
    load = make_load(experts=2)
    load["load"][1] = [[0.2] * 5, [0.2] * 5]
    assert [axes.images[0].get_array().shape for axes in heat_maps(plot_expert_load(load))] == [(2, 2), (2, 5)]


def test_a_domain_without_tokens_stays_blank(tmp_path):
    load = make_load(experts=2, sites=["up"])
    load["load"][0][1] = [math.nan, None]
    figure = plot_expert_load(load)
    assert len(heat_maps(figure)[0].texts) == 2
    save_png(figure, tmp_path / "load.png")


@pytest.mark.parametrize(
    ("sites", "chosen"),
    [
        (["a.up"], [0]),
        (["a.up", "b.up"], [0, 1]),
        ([f"{layer}.up" for layer in range(9)], [0, 4, 8]),
        (["0.q", "0.up", "1.q", "1.up", "2.q", "2.up", "3.up"], [1, 5, 6]),
    ],
)
def test_sites_of_one_kind_are_spread_over_the_depth(sites, chosen):
    assert spread_over_depth(sites) == chosen


def test_dollar_signs_in_names_are_no_formulas(tmp_path):
    save_png(plot_expert_load(make_load(2, groups=["$\\frac", "a$b$"], sites=["$x^$.up"])), tmp_path / "load.png")
    save_png(plot_loss([{"step": 1, "loss": 2.0, "$y_$": 1.0}]), tmp_path / "loss.png")


def test_no_global_state_is_touched(tmp_path):
    import matplotlib.pyplot

    before = dict(matplotlib.rcParams)
    figure = plot_expert_load(make_load(experts=2))
    assert isinstance(figure, Figure)
    assert matplotlib.pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_equal_figures_give_equal_bytes(tmp_path):
    one, two = (save_png(plot_loss([{"step": 1, "loss": 2.0}]), tmp_path / name).read_bytes() for name in ("1", "2"))
    assert one == two
