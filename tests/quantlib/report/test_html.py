import base64
import json
import re
import shutil
import sys
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser

import numpy as np
import pytest
from rows import START, layer_row, preprocessing, variant_row

from quantlib.errors import StoreError
from quantlib.measure import examples
from quantlib.measure.examples import Example
from quantlib.measure.predictions import Predictions
from quantlib.report import html, tables
from quantlib.report.results import Report
from quantlib.report.rows import ClassRow, EpochRow, LatencyRow, StageRow

FLOAT = variant_row("float", method="float")
QAT = replace(
    FLOAT,
    variant="trained",
    method="qat",
    qconfig="fbgemm",
    engine="x86",
    runtime="torchscript-x86",
    top1=0.5,
    top1_drop=0.25,
    top1_drop_low=0.1,
    top1_drop_high=0.4,
    p_value=0.002,
    best_epoch=1,
    size_bytes=1_000_000,
    latency_p50_ms=2.0,
    speedup=4.0,
    winner=True,
)
LABELS = np.array([0, 1, 2, 3])
# Image 3 is broken by int8; image 0 is wrong in both, but differently.
FLOAT_TOP5 = np.array([[1, 0], [1, 0], [2, 0], [3, 0]])
QAT_TOP5 = np.array([[2, 0], [1, 0], [2, 0], [1, 3]])
CLASSES = ("ant", "fox", "cat", "bird")
PICTURE = Example(
    variant="trained",
    image_index=3,
    label=3,
    float_top1=3,
    int8_top1=1,
    png=examples.draw(np.zeros((8, 8, 3), np.uint8)),
)


def epoch(number):
    return EpochRow(
        variant="trained",
        epoch=number,
        loss=1.0,
        train_top1=0.5,
        top1=0.5,
        top1_selection=0.5,
        best=number == 1,
        observers_frozen=number >= 2,
        batch_norm_frozen=number >= 1,
    )


def latency(variant):
    return LatencyRow(
        variant=variant,
        runtime="torchscript-x86",
        batch_size=4,
        num_threads=1,
        p50_ms=8.0,
        p95_ms=10.0,
        images_per_second=500.0,
        num_samples=100,
    )


LAYER = layer_row("features.7", variant="trained")


def write(
    folder,
    run_id="first",
    variants=(FLOAT, QAT),
    layers=(),
    p95_ms=10.0,
):
    found = Report(
        run_id=run_id,
        variants=variants,
        epochs=tuple(epoch(number) for number in range(4)),
        latency=tuple(replace(latency(row.variant), p95_ms=p95_ms) for row in variants),
        stages=(StageRow("load_float", "k", True, 0.5, START), StageRow("benchmark", "l", False, 3.0, START)),
        classes=tuple(ClassRow(class_index=n, name=name) for n, name in enumerate(CLASSES)),
        preprocessing=(preprocessing(),),
        examples=tuple(replace(PICTURE, variant=row.variant) for row in variants if row.method == "qat"),
        layers=layers,
    )
    loss = np.zeros(4, np.float32)
    answers = {row.variant: Predictions(LABELS, QAT_TOP5, loss) for row in variants}
    tables.write(folder, found, answers | {"float": Predictions(LABELS, FLOAT_TOP5, loss)})


def chart(page, name):
    source = re.search(rf'data-chart="chart-{name}">(.*?)</script>', page, re.DOTALL)
    assert source, f"no chart {name}"
    return json.loads(source.group(1))


class Links(HTMLParser):
    """Collects every address in the page's attributes, and its elements."""

    def __init__(self, page):
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in {"src", "href", "action", "data"}]


def test_the_verdict_comes_before_every_table_and_chart(tmp_path):
    write(tmp_path)
    page = html.render(tmp_path)
    body = page[page.index("<body>") :]
    assert "<h1>Ship trained</h1>" in body
    assert body.index("Ship trained") < min(body.index("<table"), body.index('class="chart"'))
    figures = "-25.00 points of top-1 against float (95% interval -40.00 to -10.00, p = 0.002), 4.00 times as fast"
    assert f"{figures} in torchscript-x86, 4.0 times smaller" in body


def test_a_run_without_a_winner_says_so_and_names_the_best(tmp_path):
    write(tmp_path, variants=(FLOAT, replace(QAT, winner=False, accepted=False)))
    page = html.render(tmp_path)
    assert "Nothing to ship" in page
    assert "The best so far is trained" in page


def test_the_page_names_no_address_outside_itself(tmp_path):
    write(tmp_path)
    page = html.render(tmp_path)
    links = Links(page)
    assert all(address.startswith("data:") for address in links.found), links.found
    assert "img" in links.tags
    assert "link" in links.tags
    assert "default-src 'none'" in page


def test_text_from_a_recipe_a_dataset_or_a_machine_is_never_markup(tmp_path, monkeypatch):
    evil = "</script><script>alert(1)</script><b>"
    monkeypatch.setattr(sys.modules[__name__], "CLASSES", (evil,) * 4)
    names = (replace(FLOAT, recipe=evil, cpu_model=evil), replace(QAT, recipe=evil, variant=evil, qconfig=evil))
    write(tmp_path, variants=tuple(replace(row, artifact_path=evil) for row in names))
    write(tmp_path, "second", variants=tuple(replace(row, artifact_path=evil) for row in names))
    page = html.render(tmp_path)
    assert evil not in page
    assert page.count("<script>alert") == 0
    assert chart(page, "sizes")["data"][0]["y"][1] == "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;b&gt;"


def test_the_page_says_what_the_model_takes_and_says(tmp_path):
    write(tmp_path)
    page = html.render(tmp_path)
    assert (
        "Its input: RGB, shorter side resized to 256 pixels (bilinear, antialiased), centre crop of 224 x 224" in page
    )
    assert "mean 0.485, 0.456, 0.406, standard deviation 0.229, 0.224, 0.225." in page
    assert "Its classes: ant, fox, cat, bird." in page


def test_confusions_name_their_classes(tmp_path):
    write(tmp_path)
    page = html.render(tmp_path)
    assert re.search(r"<td>bird</td><td[^>]*>fox</td><td>0</td><td>1</td>", page)
    assert re.search(r"<td>ant</td><td[^>]*>cat</td><td>0</td><td>1</td>", page)


def test_images_that_int8_answers_differently_are_shown_with_all_three_classes(tmp_path):
    write(tmp_path)
    page = html.render(tmp_path)
    shown = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(shown) == 1
    content = re.search(r'src="data:image/png;base64,([^"]+)"', shown[0]).group(1)
    assert base64.b64decode(content) == PICTURE.png
    assert re.sub(r"<[^>]*>", " ", shown[0]).split() == ["is", "bird", "float:", "bird", "int8:", "fox"]


def test_a_run_reported_before_there_were_classes_and_examples_is_still_readable(tmp_path):
    write(tmp_path)
    for table in ("classes", "examples", "preprocessing"):
        shutil.rmtree(tmp_path / table)
    page = html.render(tmp_path)
    assert re.search(r"<td>3</td><td[^>]*>1</td><td>0</td><td>1</td>", page)
    assert "<figure>" not in page
    assert "by their place in the validation split: 3." in page


def test_names_of_variants_that_are_nearly_equal_stand_on_different_sides_of_their_points(tmp_path):
    near = tuple(replace(QAT, variant=f"name_{n}", latency_p50_ms=4.0 + n / 100, winner=n == 0) for n in range(4))
    write(tmp_path, variants=(FLOAT, *near))
    traces = chart(html.render(tmp_path), "tradeoff")["data"]
    (sides,) = (trace["textposition"] for trace in traces if trace["name"] == "qat")
    assert len(set(sides)) == 4


def test_freezes_are_marked_at_the_first_epoch_that_has_them(tmp_path):
    write(tmp_path)
    figure = chart(html.render(tmp_path), "epochs")
    assert [line["x0"] for line in figure["layout"]["shapes"]] == [1, 2]
    assert [note["text"] for note in figure["layout"]["annotations"]] == [
        "batch norm frozen (trained)",
        "observers frozen (trained)",
    ]


def test_latency_is_shown_per_image_with_a_whisker_to_the_95th_percentile(tmp_path):
    write(tmp_path)
    bar = chart(html.render(tmp_path), "latency")["data"][0]
    assert bar["y"] == [2.0]
    assert bar["error_y"]["array"] == [0.5]


def test_stages_are_told_apart_by_whether_they_were_cached(tmp_path):
    write(tmp_path)
    bars = {bar["name"]: bar["y"] for bar in chart(html.render(tmp_path), "stages")["data"]}
    assert bars == {"computed": ["benchmark"], "cached": ["load_float"]}


def test_history_holds_all_runs_of_the_recipe_and_no_other(tmp_path):
    write(tmp_path)
    later = tuple(replace(row, created_at=START + timedelta(days=1), top1=row.top1 / 2) for row in (FLOAT, QAT))
    write(tmp_path, "second", later)
    write(tmp_path, "other", tuple(replace(row, recipe="other", created_at=START) for row in (FLOAT, QAT)))
    page = html.render(tmp_path)
    lines = {line["name"]: line["y"] for line in chart(page, "history-top1")["data"]}
    assert lines == {"float": [0.75, 0.375], "trained": [0.5, 0.25]}
    assert "other" not in re.search(r'id="history">(.*?)</table>', page, re.DOTALL).group(1)


def test_an_earlier_run_can_be_chosen(tmp_path):
    write(tmp_path)
    write(tmp_path, "second", tuple(replace(row, created_at=START + timedelta(days=1)) for row in (FLOAT, QAT)))
    assert "<title>tiny · second</title>" in html.render(tmp_path)
    assert "<title>tiny · first</title>" in html.render(tmp_path, "first")


def test_an_unknown_run_and_an_empty_folder_are_errors_that_say_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="quantflow run"):
        html.render(tmp_path)
    write(tmp_path)
    with pytest.raises(StoreError, match=r"No run 'nope'.*newest are: first"):
        html.render(tmp_path, "nope")


def test_the_page_says_what_costs_accuracy_and_what_to_try(tmp_path):
    write(tmp_path, "without")
    assert 'id="causes"' not in html.render(tmp_path)
    later = replace(QAT, created_at=START + timedelta(days=1), top1_simulated=0.5, top1_weights_only=0.8125)
    write(tmp_path, "with", (replace(FLOAT, created_at=later.created_at), later), (LAYER,))
    page = html.render(tmp_path)
    causes = page[page.index('id="causes"') :].partition("</table>")[0]
    assert "81.25%" in causes
    assert "features.7 (only it 75.00%, 21.5 dB)" in causes
    assert "float_layers = [&#34;features.7&#34;]" in causes


def test_the_verdict_stands_beside_the_name_where_a_phone_shows_it(tmp_path):
    write(tmp_path)
    page = html.render(tmp_path)
    table = page[page.index('<table id="variants">') :]
    header = re.findall(r"<th[^>]*>([^<]*)</th>", table[: table.index("</tr>")])
    assert header[:2] == ["variant", "verdict"]


def test_an_outliers_whisker_flattens_no_bar(tmp_path):
    write(tmp_path, p95_ms=8000.0)
    figure = chart(html.render(tmp_path), "latency")
    assert figure["layout"]["yaxis"]["range"] == [0, 3.0]
