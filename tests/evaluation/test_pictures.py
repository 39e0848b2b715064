"""The pictures are valid PNGs that show something, and no name can break them."""

import math

import pytest
from matplotlib.image import imread

from evaluation.pictures import bar_chart, heat_map

NAN = math.nan


def pixels(path):
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)[..., :3]


def has_colour(image, colour):
    # More than antialiased letters can have by accident.
    return (abs(image - colour).max(axis=-1) < 0.02).sum() > 300


def test_the_heat_map_shows_values_and_hatches_what_has_not_arrived(tmp_path):
    path = tmp_path / "plots" / "accuracy.png"
    heat_map(["v1", "v2"], ["city", "script"], [[1.0, None], [0.0, NAN]], path)
    image = pixels(path)
    yellow, purple, grey = (0.993, 0.906, 0.144), (0.267, 0.005, 0.329), (0.902, 0.902, 0.902)  # viridis' ends, E6E6E6
    assert all(has_colour(image, colour) for colour in (yellow, purple, grey))


def test_a_full_heat_map_has_no_hatching(tmp_path):
    heat_map(["v1"], ["city"], [[0.5]], tmp_path / "full.png")
    assert not has_colour(pixels(tmp_path / "full.png"), (0.902, 0.902, 0.902))


def test_the_bar_chart_has_one_colour_per_series(tmp_path):
    series = {"base": [0.3, 0.2], "champion": [0.6, 0.5], "candidate": [0.7, NAN]}
    bar_chart(["city", "script"], series, tmp_path / "bars.png")
    image = pixels(tmp_path / "bars.png")
    grey, blue, orange, green = (0.6,) * 3, (0.0, 0.447, 0.698), (0.902, 0.624, 0.0), (0.0, 0.62, 0.451)
    assert all(has_colour(image, colour) for colour in (grey, blue, orange))
    assert not has_colour(image, green)


def test_equal_arguments_give_equal_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        heat_map(["v1"], ["city"], [[0.5]], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", ["$\\frac{$", "a$_b$c", "x" * 500, "\x1b[31m\n\u202e", "_hidden", ""])
def test_no_name_breaks_a_picture(tmp_path, name):
    heat_map([name], [name], [[0.5]], tmp_path / "a.png", title=name)
    bar_chart([name], {name: [0.5]}, tmp_path / "b.png", title=name)
    assert pixels(tmp_path / "a.png").shape[1] < 3000
    assert pixels(tmp_path / "b.png").shape[1] < 3000
