"""The page of a report: complete, self-contained, safe to open, and looked at in a real browser."""

import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

import compresso
from compresso import charts
from compresso.cli import main
from compresso.report import report

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's, datasets' and selenium's own

WIDTHS = {"phone": 360, "tablet": 768, "desktop": 1280}
QUICK = {"steps": 8, "recover_steps": 4, "batch_size": 4, "max_length": 48, "prompt": "short", "device": "cpu"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoint, data, local):
    """Two finished runs, one of them with hidden channels removed, evaluated together with their dense model."""
    folder = tmp_path_factory.mktemp("runs")
    for name, sparsity, units in (("small", 0.3, "kv_group,intermediate,hidden"), ("smaller", 0.5, "hidden,mlp")):
        settings = {**QUICK, "target_sparsity": sparsity, "units": tuple(units.split(",")), "precision": "fp32"}
        compresso.prune(model=str(checkpoint), data=str(data), output=str(folder / name), **settings)
        suite = "piqa,arc_easy,wikitext2@64"
        models = [str(checkpoint), str(folder / name)]
        compresso.evaluate(
            models, suite=suite, data_dir=str(local), limit=4, device="cpu", output=str(folder / name / "eval.json")
        )
    return folder


@pytest.fixture(scope="module")
def page(runs):
    """The page about one run, as bytes, made from its folder alone."""
    return report(runs / "small").read_text()


@pytest.fixture(scope="module")
def browser():
    chrome, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    assert None not in (chrome, driver), "install a browser for this test: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def look(browser, path, width, scheme="light"):
    """Open a page at a width in CSS pixels."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    browser.get(path.resolve().as_uri())


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def is_drawn(image):
    """More than one flat colour, over more than a corner."""
    other = (abs(image - image[0, 0]).sum(-1) > 30).mean()
    return other > 0.01


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_pictures_are_drawn_and_nothing_is_wider_than_the_page(browser, runs, page, width, scheme):
    look(browser, runs / "small" / "report.html", width, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    figures = browser.find_elements(By.TAG_NAME, "figure")
    assert len(figures) >= 6  # plan, hidden, sparsity, loss, scores and differences at least
    for figure in figures:
        browser.execute_script("arguments[0].scrollIntoView()", figure)
        image = next(img for img in figure.find_elements(By.TAG_NAME, "img") if img.is_displayed())
        assert int(image.get_property("naturalWidth")) > 100, figure.text
        assert is_drawn(pixels(image.screenshot_as_png)), figure.text
    ground = pixels(browser.get_screenshot_as_png())[2, 2].mean()
    assert ground > 200 if scheme == "light" else ground < 60
    assert not [row for row in browser.get_log("browser") if row["level"] == "SEVERE"]


def test_several_runs_on_a_phone_and_in_print(browser, runs):
    path = report([runs / "small", runs / "smaller"], runs / "both.html")
    look(browser, path, 360)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "Size against quality" in text
    for name in ("small", "smaller"):
        assert name in text
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
    assert len(printed) > 50_000


def test_perplexities_of_other_texts_are_no_series(runs, tmp_path):
    """Without --text a run is measured on its own held-out records, which follow the seed."""
    shutil.copytree(runs / "smaller", tmp_path / "other")
    path = tmp_path / "other" / "summary.json"
    summary = json.loads(path.read_text())
    summary["perplexity"]["dense"] *= 1.02
    path.write_text(json.dumps(summary))
    page = report([runs / "small", tmp_path / "other"], tmp_path / "both.html").read_text()
    assert "size-perplexity" not in page
    assert "were measured on another text" in page
    of_runs = page[page.index('<h2 id="runs">') : page.index("</table>", page.index('<h2 id="runs">'))]
    assert of_runs.count("(dense)") == 2


class Links(HTMLParser):
    """Everything in a page that could fetch or run something."""

    def __init__(self, html):
        super().__init__()
        self.found, self.tags = [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [value for key, value in attrs if key in ("src", "srcset", "href", "action", "data")]
        assert not [key for key, _ in attrs if key.startswith("on")], "an event handler"


def test_the_page_needs_nothing_from_elsewhere(page):
    links = Links(page)
    assert "script" not in links.tags
    assert links.found
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_the_page_shows_the_figures_of_the_files(page, runs):
    folder = runs / "small"
    summary, measured = (json.loads((folder / name).read_text()) for name in ("summary.json", "eval.json"))
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))
    assert f"{100 * summary['sparsity']:.2f}" in text
    assert f"{summary['parameters']['after']:,}" in text
    for stage in ("dense", "cut", "recovered"):
        assert f"{summary['loss'][stage]:.2f}" in text
    for results in measured["results"].values():
        assert f"{100 * results['piqa']['value']:.1f}" in text
        assert f"{results['wikitext2@64']['value']:,.2f}" in text
    assert "--target-sparsity 0.3" in text
    assert summary["sample"]["question"] in page
    plan = json.loads((runs / "smaller" / "plan.json").read_text())
    words = " ".join(report(runs / "smaller").read_text().split())
    assert f"{32 - plan['hidden_size']} of 32 are gone" in words


def test_the_same_files_give_the_same_bytes(runs, page):
    pictures = {path.name: path.read_bytes() for path in (runs / "small" / "report").glob("*.png")}
    assert {"plan.png", "loss.png", "sparsity.png", "scores.png", "differences.png"} <= set(pictures)
    assert report(runs / "small").read_text() == page
    for name, content in pictures.items():
        assert (runs / "small" / "report" / name).read_bytes() == content
        image = pixels(content)
        assert min(image.shape[:2]) > 300, name
        assert is_drawn(image), name


def test_nothing_that_files_hold_becomes_markup(browser, runs, tmp_path):
    bad = "</p><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7 * 7 }}"
    folder = shutil.copytree(runs / "small", tmp_path / "a <b>&'run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["sample"] = dict.fromkeys(summary["sample"], bad)
    summary["model"] = bad
    (folder / "summary.json").write_text(json.dumps(summary))
    measured = (folder / "eval.json").read_text().replace('"piqa"', json.dumps(bad))
    (folder / "eval.json").write_text(measured)
    page = report(folder)
    assert "script" not in Links(page.read_text()).tags
    look(browser, page, 1280)
    assert "owned" not in browser.title
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "onerror=" in text
    assert "{{ 7 * 7 }}" in text


def test_paths_stay_in_the_settings(page, runs):
    told, _, settings = page.partition('<h2 id="settings">')
    assert str(runs) in settings, "what to repeat names the folders that the run had"
    assert str(runs) not in told, "elsewhere paths of this machine concern nobody"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("summary.json", None, "has no summary.json"),
        ("summary.json", "{", "summary.json is damaged"),
        ("summary.json", "{}", "has no 'sparsity'"),
        ("summary.json", lambda found: {**found, "perplexity_window": float("inf")}, "expected: whole number"),
        ("metrics.jsonl", '{"loss": "high"}', "line 1"),
        ("eval.json", '{"schema": "other"}', "eval.json"),
        ("plan.safetensors", "xx", "plan.safetensors"),
        ("config.yaml", "targt: 1", "did you mean"),
    ],
)
def test_a_damaged_file_is_named(runs, tmp_path, capsys, file, content, said):
    folder = shutil.copytree(runs / "small", tmp_path / "run", ignore=shutil.ignore_patterns("model", "cut"))
    if content is None:
        (folder / file).unlink()
    elif callable(content):
        (folder / file).write_text(json.dumps(content(json.loads((folder / file).read_text()))))
    else:
        (folder / file).write_text(content)
    before = (folder / "report.html").read_bytes()
    assert main(["report", str(folder)]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert (folder / "report.html").read_bytes() == before, "the page that was there stays"


def test_a_run_without_training_or_evaluation_has_a_page(runs, tmp_path):
    folder = shutil.copytree(runs / "small", tmp_path / "run")
    for name in ("metrics.jsonl", "eval.json"):
        (folder / name).unlink()
    assert "no metrics of training" in report(folder).read_text()


def test_the_heat_map_tells_kept_from_removed():
    """A layer that lost everything looks unlike one that kept all, for 3 layers and for 80."""
    for layers in (3, 80):
        column = [(8, 8)] * layers
        column[1] = (0, 8)
        drawn = [
            pixels(charts.picture(lambda theme, c=c: charts.kept_shares(theme, {"groups": c})).png)
            for c in (column, [(8, 8)] * layers)
        ]
        height = min(image.shape[0] for image in drawn)
        assert (abs(drawn[0][:height] - drawn[1][:height]).sum(-1) > 30).mean() > 0.001
