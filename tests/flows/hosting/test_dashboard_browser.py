"""The pages that people look at, in a browser; the screenshots in docs/ are taken here."""

import json
import os
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import browser
import numpy as np
import pytest
from dashboard_driver import Dashboard
from PIL import Image, ImageChops

from quantlib.report.html import write_html

pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING))]


# Where `make screenshots` puts the pictures.
DOCS = os.environ.get("QUANTFLOW_SCREENSHOTS")


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    found = Dashboard(tmp_path_factory.mktemp("dashboard"))
    if DOCS:
        found.recipe = Path("digits")  # Its results are worth looking at; it takes a minute.
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def runs(dashboard):
    """A run that computed its stages, and one that reused them."""
    found = [dashboard.begin(), dashboard.begin()]
    for run in found:
        dashboard.wait(run)
    return found


@pytest.fixture
def window():
    with browser.browse() as found:
        found.size(1280, 800)
        yield found


@pytest.fixture
def shoot(window, dashboard, tmp_path):
    """Takes a screenshot: kept in docs/ with `make screenshots`, otherwise discarded."""

    def take(name):
        window.rename(str(dashboard.home), "~/.quantflow")
        window.screenshot(Path(DOCS or tmp_path).resolve() / f"{name}.png")

    return take


def errors(window):
    """Console errors, except for icons that Prefect's interface lacks: its own, and that of no state yet."""
    return [line for line in window.errors() if not any(icon in line for icon in ("favicon.ico", "ico/undefined.svg"))]


@pytest.mark.parametrize("host", ["example.com", "192.0.2.1"])
def test_a_page_that_asks_another_host_is_noticed(window, tmp_path, host):
    (tmp_path / "page.html").write_text(f"<img src='http://{host}/image.png'>")
    window.open((tmp_path / "page.html").as_uri())
    (error,) = window.errors()
    assert "ERR_NAME_NOT_RESOLVED" in error


def test_the_deployments_are_listed_with_their_schedules(dashboard, window, shoot):
    window.size(1600, 600)  # A narrower page shows only the number of schedules.
    window.open(f"{dashboard.url}/deployments")
    window.wait_for("3 Deployments")
    # The worker is ready; each flow is named twice, as a tag and below its deployment, which loads later.
    shown = window.wait_until(
        lambda text: "Not Ready" not in text and all(text.count(flow) >= 2 for flow in ("quantize", "ptq", "qat"))
    )
    for name in ("nightly", "weekly", "At 01:00 AM every day", "only on Saturday", "only on Sunday"):
        assert name in shown
    shoot("deployments")
    window.open(f"{dashboard.url}/deployments/deployment/{dashboard.deployments()['quantize']['id']}")
    window.wait_for("At 01:00 AM")
    assert errors(window) == []


def test_the_form_of_a_deployment_describes_the_recipe(dashboard, window, shoot):
    window.open(f"{dashboard.url}/deployments/deployment/{dashboard.deployments()['quantize']['id']}/run")
    window.wait_for("The name or file of an existing recipe")
    assert "each in the form qat.0.epochs=2" in window.text()
    shoot("form")
    assert errors(window) == []


def test_a_run_is_followed_to_its_end_and_the_next_shows_its_stages_cached(dashboard, runs, window, shoot):
    window.open(f"{dashboard.url}/runs/flow-run/{runs[0]}")
    window.wait_for("Completed")
    window.open(f"{dashboard.url}/runs/flow-run/{runs[1]}")
    window.wait_for("Completed")
    window.click("Task Runs")
    # Newest first: the report, then the stages, each with its state beside it.
    shown = window.wait_for("benchmark")
    assert shown.count("\nCached\n") > 5
    shoot("run")
    assert errors(window) == []


def test_the_graph_of_a_finished_run_has_its_arrows(dashboard, runs, window, tmp_path):
    window.open(f"{dashboard.url}/runs/flow-run/{runs[0]}")
    window.wait_for("Completed")
    window.script("document.querySelector('[aria-label=\"Run Graph Options\"]').click()")
    window.wait_for("Hide dependency arrows")
    time.sleep(5)  # It is drawn stage by stage.
    window.screenshot(tmp_path / "with.png")
    hide = "[...document.querySelectorAll('label')].find(l => l.innerText.trim() === 'Hide dependency arrows')"
    # The interface hides them by default if there are too many.
    assert window.script(f"return {hide}.control.checked") is False
    window.script(f"{hide}.control.click()")
    time.sleep(5)
    window.screenshot(tmp_path / "without.png")
    canvas = "const c = document.querySelector('canvas').getBoundingClientRect(); return [c.x, c.y, c.right, c.bottom]"
    graph = window.script(canvas)
    images = [Image.open(tmp_path / name).convert("L").crop(graph) for name in ("with.png", "without.png")]
    # The menu covers the right end of both.
    assert np.mean(np.asarray(ImageChops.difference(*images)) > 30) > 0.005


def test_the_result_is_an_artifact_with_a_table(dashboard, runs, window, shoot):
    (artifact,) = dashboard.call("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [runs[1]]}}})
    window.open(f"{dashboard.url}/artifacts/artifact/{artifact['id']}")
    window.wait_for("speed-up")
    assert window.script("return document.querySelectorAll('table').length") >= 1
    # Its plots are embedded in it, and shown.
    drawn = "return [...document.images].filter(i => i.src.startsWith('data:image/svg') && i.naturalWidth > 0).length"
    assert window.script(drawn) == 2
    assert "stages were reused" in window.text()
    shoot("artifact")
    assert errors(window) == []


# Tries what a page can: requests sent without a preflight, preflighted requests, and sockets.
ATTACK = """
const api = %s, flow = name => JSON.stringify({name: %s + name}), json = {"Content-Type": "application/json"};
const socket = path => new Promise((opened, failed) => {
    const found = new WebSocket(api.replace("http", "ws") + path, "prefect");
    found.onopen = opened;
    found.onerror = failed;
});
const image = new Image();
const tried = {
    read: fetch(api + "/health"),
    preflighted: fetch(api + "/flows/", {method: "POST", headers: json, body: flow("preflighted")}),
    simple: fetch(api + "/flows/", {method: "POST", body: flow("simple")}),
    unasked: fetch(api + "/flows/", {method: "POST", mode: "no-cors", body: new Blob([flow("unasked")])}),
    beacon: Promise.resolve(navigator.sendBeacon(api + "/flows/", flow("beacon"))),
    events_in: socket("/events/in"),
    events_out: socket("/events/out"),
    worker: socket("/work_pools/quantflow/workers/connect"),
};
const done = Object.entries(tried).map(([name, promise]) => promise.then(() => name, () => null));
return Promise.all(done).then(names => names.filter(name => name !== null));
"""


@contextmanager
def somebody_elses_page():
    """The port of a web server with a single empty page."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title><p>elsewhere</p>")

        def log_message(self, *_):
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def flows_named(dashboard, start):
    names = [flow["name"] for flow in dashboard.call("/flows/filter")]
    return [name for name in names if name.startswith(f"{start} ")]


@pytest.mark.parametrize("host", ["127.0.0.1", "evil.example"])
def test_another_sites_page_reaches_nothing(dashboard, host):
    attack, allowed = (
        ATTACK % (json.dumps(f"{dashboard.url}/api"), json.dumps(f"{by} ")) for by in (host, f"own {host}")
    )
    with somebody_elses_page() as port, browser.browse("evil.example") as window:
        window.open(f"http://{host}:{port}")
        # A page cannot learn from its browser whether these two were refused: the list of flows shows it.
        assert set(window.script(attack)) <= {"unasked", "beacon"}
        assert flows_named(dashboard, host) == []
        # Under its own name, made to resolve here, it would be the server's own page.
        window.open(f"http://evil.example:{dashboard.url.rpartition(':')[2]}")
        assert window.text().startswith("Refused: ")
        # A link to the dashboard is followed, and what is then shown is the dashboard's own page.
        window.open(f"http://{host}:{port}")
        window.script(f"location.href = {json.dumps(dashboard.url)}")
        window.wait_for("Work Queues")
        assert len(window.script(allowed)) == 8
        assert f"own {host} preflighted" in flows_named(dashboard, f"own {host}")


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("light", 1100, False), ("dark", 1100, True), ("phone", 390, False)]
)
def test_the_html_report_draws_every_chart_without_errors(dashboard, runs, window, shoot, tmp_path, name, width, dark):
    page = tmp_path / "report.html"
    write_html(dashboard.home / "reports", page)
    window.size(width, 1400)
    window.dark(on=dark)
    window.open(page.as_uri())
    window.wait_for("Ship ")
    charts = window.script("return document.querySelectorAll('.chart').length")
    assert charts >= 6
    assert window.script("return document.querySelectorAll('.chart svg.main-svg').length") >= charts
    # Images that int8 answers differently from float.
    pictures = "return [...document.querySelectorAll('figure img')].map(i => i.complete && i.naturalWidth)"
    assert min(window.script(pictures)) > 0
    # Nothing is wider than the window except what scrolls on its own.
    assert window.script("return document.documentElement.scrollWidth") <= width
    light = window.script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light is not dark
    shoot(f"report-{name}")
    assert window.errors() == []
