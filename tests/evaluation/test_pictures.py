"""The pictures are valid PNGs that show something, and no name can break them."""

import math

import pytest
from matplotlib.image import imread

from evaluation.pictures import bar_chart, heat_map, write_plots
from evaluation.report import Record
from registry.verdicts import Report
from tests.evaluation.sample_reports import sample

NAN = math.nan
YELLOW, PURPLE = (0.993, 0.906, 0.144), (0.267, 0.005, 0.329)  # the ends of viridis
GOOD, BAD = (0.0, 0.404, 0.639), (0.769, 0.239, 0.0)  # 0067a3, c43d00
NAMES = ["tasks", "accuracy_matrix", "versions", "perplexities", "pareto", "overlap"]


def pixels(path):
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)[..., :3]


def has_colour(image, colour, least=300):
    # More than antialiased letters can have by accident.
    return (abs(image - colour).max(axis=-1) < 0.02).sum() > least


def test_the_heat_map_colours_values_and_leaves_blank_what_has_not_arrived(tmp_path):
    heat_map(["v1", "v2"], ["city", "script"], [[1.0, None], [0.0, None]], tmp_path / "plots" / "a.png")
    heat_map(["v1", "v2"], ["city", "script"], [[1.0, 0.0], [0.0, 1.0]], tmp_path / "b.png")
    half, full = pixels(tmp_path / "plots" / "a.png"), pixels(tmp_path / "b.png")
    assert all(has_colour(image, colour) for image in (half, full) for colour in (YELLOW, PURPLE))
    coloured = [(abs(image - YELLOW).max(axis=-1) < 0.02).sum() for image in (half, full)]
    assert 1.8 < coloured[1] / coloured[0] < 2.2


def test_the_heat_map_tells_unmeasured_from_not_arrived(tmp_path):
    heat_map(["v1"], ["city", "script"], [[0.5, None]], tmp_path / "blank.png")
    heat_map(["v1"], ["city", "script"], [[0.5, NAN]], tmp_path / "unknown.png")
    assert (pixels(tmp_path / "blank.png") != pixels(tmp_path / "unknown.png")).any()


def test_the_bar_chart_has_one_colour_per_series(tmp_path):
    series = {"base": [0.3, 0.2], "champion": [0.6, 0.5], "candidate": [0.7, NAN]}
    bar_chart(["city", "script"], series, tmp_path / "bars.png")
    image = pixels(tmp_path / "bars.png")
    grey, blue, orange, green = (0.6,) * 3, (0.0, 0.447, 0.698), (0.902, 0.624, 0.0), (0.0, 0.62, 0.451)
    assert all(has_colour(image, colour) for colour in (grey, blue, orange))
    assert not has_colour(image, green)


def test_every_chart_of_a_record_is_written_on_white(tmp_path):
    written = write_plots(sample(), tmp_path / "plots")
    assert [path.name for path in written] == [f"{name}.png" for name in NAMES]
    for path in written:
        image = pixels(path)
        assert (image[0, 0] == 1.0).all()
        assert 0.005 < (image < 0.9).any(axis=-1).mean() < 0.6, path  # not blank, not one blot


def test_a_chart_with_nothing_to_show_is_left_out(tmp_path):
    def names(record):
        return [path.stem for path in write_plots(record, tmp_path)]

    assert names(Record(Report("w", {}))) == []
    rejected_early = sample()._replace(report=Report("w", {}), matrix=[{"city": 0.8}], perplexities=(), tries=())
    assert names(rejected_early) == ["accuracy_matrix", "overlap"]
    assert names(sample()._replace(overlap={}, champion=None)) == NAMES[1:5]


def test_a_failed_task_has_another_colour_and_another_mark(tmp_path):
    failed = pixels(write_plots(sample(), tmp_path)[0])
    passed = pixels(write_plots(sample()._replace(verdict=None), tmp_path)[0])
    assert has_colour(failed, BAD, 50)
    assert has_colour(failed, GOOD, 50)
    assert not has_colour(passed, BAD, 0)


def test_an_unmeasured_task_does_not_stop_the_others(tmp_path):
    written = write_plots(sample(error="timed out"), tmp_path)
    assert [path.stem for path in written] == NAMES
    assert has_colour(pixels(written[0]), GOOD, 50)


@pytest.mark.parametrize("count", [1, 6, 200])
def test_layers_fit_whatever_their_number(tmp_path, count):
    layers = {
        f"encoder.layer.{place}": {"cosine": NAN if place == 3 else 0.2, "removed": 0.5} for place in range(count)
    }
    path = write_plots(sample()._replace(overlap=layers), tmp_path)[-1]
    assert path.stem == "overlap"
    assert has_colour(pixels(path), GOOD, 5000)
    assert pixels(path).shape[1] == 1440


def test_equal_arguments_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        heat_map(["v1"], ["city"], [[0.5]], tmp_path / name / "heat.png")
        write_plots(sample(), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    "name", ["$\\frac{$", "a$_b$c", "x" * 500, "\x1b[31m\n\u202e", "_hidden", "", "東京 🏛", "<b>&amp;", "%d {} {x!r}"]
)
def test_no_name_breaks_a_picture(tmp_path, name):
    heat_map([name], [name], [[0.5]], tmp_path / "a.png", title=name)
    bar_chart([name], {name: [0.5]}, tmp_path / "b.png", title=name)
    written = write_plots(sample(name, name + "2", name, name), tmp_path / "plots")
    assert len(written) == 6
    for path in (tmp_path / "a.png", tmp_path / "b.png", *written):
        assert pixels(path).shape[1] < 1600
