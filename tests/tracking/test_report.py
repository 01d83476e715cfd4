"""The report of a run: complete, self-contained, honest, and never stopped by a missing file."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from medusa_exp.errors import UserError
from medusa_exp.tracking.charts import tree_layout
from medusa_exp.tracking.report import write_report

METRICS = {
    "train/loss": 1.2,
    "val/top1_head1": 0.713,
    "val/top5_head1": 0.902,
    "val/loss_head1": 1.417,
    "eval/speedup": 1.62,
    "eval/tokens_per_step": 2.14,
    "eval/tokens_per_second": 842.0,
    "eval/identical_fraction": 1.0,
    "eval/baseline_vs_hf": 1.31,
    "eval/prompt_lookup_speedup": 1.19,
    "eval/category/math/speedup": 1.87,
    "eval/category/math/tokens_per_step": 2.55,
}
RUN = {
    "name": "quickstart",
    "command": ["python", "-m", "medusa_exp", "+experiment=quickstart"],
    "created": "2026-03-02T10:12:44+00:00",
    "git": {"commit": "8f3c1d0", "dirty": True},
    "versions": {"torch": "2.13.0"},
    "data": {"train.jsonl": "a3" * 32},
    "stages": {
        "train": {"status": "done", "seconds": 61.2},
        "evaluate": {"status": "failed", "seconds": 3.0, "error": "ValueError: no"},
        "report": {"status": "running"},
    },
}
TREE = {"parents": [-1, 0, 0, 1], "ranks": [-1, 0, 1, 0]}
CALIBRATION = {
    "num_positions": 1800,
    "rank_share": [[0.7, 0.1], [0.5, 0.1]],
    "curve": [
        {"num_nodes": n, "tokens_per_step": t, "step_seconds": 0.002, "tokens_per_second": 500 * t}
        for n, t in ((1, 1.0), (4, 2.0))
    ],
    "num_nodes": 4,
    "node_probability": [1.0, 0.7, 0.1, 0.4],
    "plain_step_seconds": 0.0018,
}
HISTORY = [
    {"stage": "train", "step": 20, "train/loss": 9.125},
    {"stage": "train", "step": 20, "train/loss": 3.25, "val/top1_head1": 0.5},
    {"stage": "train", "step": 40, "train/loss": float("nan")},
]
SAMPLES = [
    {
        "prompt_id": "p0",
        "category": "math",
        "prompt": "</script><b>bold",
        "steps": [["She", " bought"], ["3"], [" <i>", " of", "<|im_end|>"]],
    }
]
RECORD = {"category": "math", "accept_lengths": [3, 1, 2], "seconds": 1.0, "baseline_seconds": 1.6}
KINDS = (("tree", 1, True), ("tree", 4, True), ("plain", 1, None))
RECORDS = [
    {**RECORD, "prompt_id": f"p{i}", "method": method, "batch_size": size, "identical": identical}
    for i in range(5)
    for method, size, identical in KINDS
]
FILES = {
    "metrics.json": METRICS,
    "run.json": RUN,
    "tree.json": TREE,
    "calibration.json": CALIBRATION,
    "history.jsonl": HISTORY,
    "records.jsonl": RECORDS,
    "samples.jsonl": SAMPLES,
}


class Page(HTMLParser):
    """What a browser would load, draw and show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.specs: list[dict] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.titles: list[str] = []
        self._inside: dict[str, str | None] = {}
        self.feed(html)
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._inside = {"tag": tag, **found}
        self.tags.append(tag)
        self.addresses += [found[name] or "" for name in ("src", "href") if name in found]
        self.titles += [" ".join((found["title"] or "").split())] if "title" in found else []

    def handle_endtag(self, tag: str) -> None:
        self._inside = {}

    def handle_data(self, data: str) -> None:
        if self._inside.get("type") == "application/json":
            self.specs.append(json.loads(data))
        elif self._inside.get("tag") not in ("script", "style"):
            self.words.append(data)


def write_run(out: Path, **changed: object) -> Path:
    for name, content in {**FILES, **{k.replace("__", "."): v for k, v in changed.items()}}.items():
        lines = content if name.endswith(".jsonl") else [content]
        (out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def page_of(out: Path) -> Page:
    return Page(write_report(out).read_text(encoding="utf-8"))


def test_full_run_shows_its_figures(tmp_path):
    page = page_of(write_run(tmp_path))
    figures = "1.62\u00d7 2.14 842 1.19\u00d7 1.31\u00d7 71.3 2.55 61.2"
    assert [figure for figure in figures.split() if figure not in page.text] == []
    assert "identical to plain decoding on 5 of 5 prompts" in page.text
    assert "python -m medusa_exp +experiment=quickstart" in page.text
    assert "8f3c1d0, with uncommitted changes" in page.text
    assert "ValueError: no" in page.text
    assert "yet:" not in page.text
    assert len(page.specs) == 10  # one each, but three of the calibration and two curves


def test_page_is_one_small_file_that_loads_nothing(tmp_path):
    write_run(tmp_path)
    path = write_report(tmp_path)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 3_000_000
    assert {file.name for file in tmp_path.iterdir()} == {*FILES, "report.html"}
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert "default-src 'none'" in html
    assert "http" not in json.dumps(page.specs)
    assert not re.search(r"@import|url\(\s*['\"]?http|\bimport\s*\(?['\"]http", html)
    assert not {"link", "img", "iframe"} & set(page.tags)


def test_text_of_files_cannot_become_markup(tmp_path):
    samples = [{**SAMPLES[0], "category": "</script><b>"}]
    metrics = {**METRICS, "eval/category/</script><b>/speedup": 1.1}
    html = write_report(
        write_run(tmp_path, samples__jsonl=samples, metrics__json=metrics)
    ).read_text(encoding="utf-8")
    assert "</script><b>" not in html
    assert "b" not in Page(html).tags
    assert "</script><b>bold" in Page(html).text


def test_samples_show_steps_and_special_tokens(tmp_path):
    page = page_of(write_run(tmp_path))
    assert page.titles == ["step 1: 2 tokens", "step 2: 1 token", "step 3: 3 tokens"]
    assert "She bought3 <i> of<|im_end|>" in page.text


@pytest.mark.parametrize("name", FILES)
def test_missing_file_costs_its_section_only(tmp_path, name):
    (write_run(tmp_path) / name).unlink()
    page = page_of(tmp_path)
    assert "yet:" in page.text
    assert "Provenance" in page.text


def test_empty_directory_names_the_stages(tmp_path):
    page = page_of(tmp_path)
    assert page.specs == []
    for stage in ("train", "calibrate", "evaluate"):
        assert f"stages=[{stage}]" in page.text


def test_different_output_is_said_in_the_headline(tmp_path):
    metrics = {**METRICS, "eval/identical_fraction": 0.9}
    page = page_of(write_run(tmp_path, metrics__json=metrics))
    assert "Output differs from plain decoding: it is identical on only 90.0" in page.text
    assert "\u2713 Output identical" not in page.text


def test_one_different_record_is_enough(tmp_path):
    records = [{**RECORDS[0], "identical": i > 0} for i in range(5)]
    page = page_of(write_run(tmp_path, records__jsonl=records))
    assert "identical on only 4 of 5 prompts" in page.text


def test_unchecked_output_is_not_called_identical(tmp_path):
    metrics = {k: v for k, v in METRICS.items() if k != "eval/identical_fraction"}
    page = page_of(write_run(tmp_path, metrics__json=metrics, records__jsonl=[]))
    assert "was not compared with plain decoding" in page.text


def test_slow_results_are_said_plainly(tmp_path):
    metrics = {**METRICS, "eval/speedup": 0.8, "eval/baseline_vs_hf": 0.5}
    page = page_of(write_run(tmp_path, metrics__json=metrics))
    assert "Slower than plain decoding" in page.text
    assert "against that the speed-up is 0.40" in page.text


def test_last_line_of_a_step_counts_and_nan_is_counted(tmp_path):
    page = page_of(write_run(tmp_path))
    drawn = json.dumps(page.specs)
    assert "3.25" in drawn
    assert "9.125" not in drawn
    assert "1 value was not finite" in page.text


def test_torn_last_line_is_passed_over_and_a_broken_one_is_named(tmp_path):
    write_run(tmp_path)
    path = tmp_path / "history.jsonl"
    path.write_text(path.read_text() + '{"stage": "tr')
    write_report(tmp_path)
    path.write_text('{"stage"\n' + path.read_text())
    with pytest.raises(UserError, match=r"history\.jsonl, line 1,"):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_other_tree_than_the_calibrated_one_is_drawn_without_probability(tmp_path):
    page = page_of(write_run(tmp_path, tree__json={"parents": [-1, 0], "ranks": [-1, 0]}))
    assert "2 nodes, 1 deep" in page.text
    assert "The stronger the colour" not in page.text


def test_tree_layout_puts_parents_between_their_children():
    nodes = tree_layout([-1, 0, 0, 1, 1], [-1, 0, 1, 1, 0], None)
    assert [node["row"] for node in nodes] == [1.25, 0.5, 2.0, 1.0, 0.0]
    assert [node["path"] for node in nodes] == ["root", "0", "1", "0 > 1", "0 > 0"]


def test_importing_is_light():
    code = (
        "import sys, medusa_exp.tracking.report\n"
        "assert not {'altair', 'jinja2', 'vl_convert', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
