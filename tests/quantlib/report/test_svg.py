import base64
import xml.etree.ElementTree as ET

import pytest

from quantlib.report.svg import Axis, as_markdown, plot

SVG = "{http://www.w3.org/2000/svg}"


def draw(series, lines=False):
    values = [point for points in series.values() for point in points]
    x = Axis.over("ms", "{:.1f}".format, (a for a, _ in values))
    y = Axis.over("top-1", "{:.1%}".format, (b for _, b in values))
    return ET.fromstring(plot(x, y, series, lines=lines))


def test_every_point_lies_inside_the_picture_and_higher_is_up():
    drawn = draw({"float": [(8.0, 0.9)], "int8": [(2.0, 0.5)]})
    (fx, fy), (ix, iy) = [(float(c.get("cx")), float(c.get("cy"))) for c in drawn.iter(f"{SVG}circle")]
    assert fx > ix
    assert fy < iy
    assert all(0 < a < 640 and 0 < b < 300 for a, b in [(fx, fy), (ix, iy)])


@pytest.mark.parametrize("points", [[(1.0, 1.0)], [(0.0, 0.0)], [(0, 0.5), (1, 0.5)]])
def test_values_that_do_not_differ_still_have_an_axis(points):
    drawn = draw({"only": points}, lines=True)
    assert len(list(drawn.iter(f"{SVG}circle"))) == len(points)


def test_a_name_is_never_markup():
    drawn = draw({"<script>": [(1.0, 1.0)]})
    assert "<script>" in [text.text for text in drawn.iter(f"{SVG}text")]


def test_a_picture_in_markdown_loads_nothing():
    text = as_markdown("<svg/>", "A plot")
    assert text == f"![A plot](data:image/svg+xml;base64,{base64.b64encode(b'<svg/>').decode()})"
