"""The HTML report: one file that refers to nothing outside, with pictures that decode and the numbers of the tables."""

import base64
import io
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fleetflow.cli.main import main
from fleetflow.data.datasets.pairs import pairs
from fleetflow.evaluation import evaluate as job
from fleetflow.evaluation import plots
from fleetflow.evaluation.metrics import error_histogram, sparsification
from fleetflow.evaluation.report import PICTURE_WIDTH, embedded, write_report
from fleetflow.io.flow import write_flow
from fleetflow.io.images import write_image


@pytest.fixture
def files(tmp_path):
    """Four pairs of true motion 0, 1, 2 and 3 px to the right; one of them with awkward names."""
    generator = np.random.default_rng(0)
    for k, name in enumerate(("one/a", "one/b", "two/c", "two/<d>&")):
        for number in (1, 2):
            picture = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            write_image(tmp_path / "data" / name / f"img{number}.png", picture)
        write_flow(tmp_path / "data" / name / "flow.png", np.full((24, 32, 2), (k, 0), np.float32))
    return pairs(tmp_path / "data")


def still(image1, image2):
    return np.zeros((*image1.shape[:2], 2), np.float32)


def test_the_report_needs_nothing_else(files, tmp_path):
    result = job.measure(still, files, model="<still>", dataset="pairs")
    path = tmp_path / "out" / "report.html"
    write_report(result, still, files, path)
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page and "url(" not in page
    assert "&lt;still&gt;" in page and "two/&lt;d&gt;&amp;" in page and "<d>" not in page
    assert "over all known pixels" in page and "fleetflow" in page, "it says its protocol"
    pictures = [base64.b64decode(text) for text in re.findall(r'src="data:image/webp;base64,([^"]+)"', page)]
    assert len(pictures) == 5 * 4, "three worst, and the one that is left as best"
    assert {Image.open(io.BytesIO(data)).size for data in pictures} == {(32, 24)}
    plots = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(plots) == 2 and all(np.asarray(Image.open(io.BytesIO(data)).convert("L")).std() > 5 for data in plots)
    assert "rgb(49, 54, 149)" in page and "under 0.1875" in page and "48+" in page, "the key of the error map"
    assert page.index("two/&lt;d&gt;&amp;: EPE 3.00 px") < page.index("two/c: EPE 2.00") < page.index("one/a: EPE 0.00")


def test_confidence_and_failures_are_shown(files, tmp_path):
    def broken(image1, image2):
        flow = still(image1, image2)
        flow[0, 0] = math.nan
        return flow

    result = job.measure(broken, files, model="broken", dataset="pairs")
    curves = sparsification(torch.rand(100), torch.rand(100))
    result = result._replace(pairs=[pair._replace(curves=curves) for pair in result.pairs], skipped=["one/z"])
    write_report(result, broken, files, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "infinite" in page and "one/z" in page and "Sparsification (AUSE" in page and page.count('class="plot"') == 3
    words = re.sub(r'src="[^"]*"', "", page.split("</style>")[1])
    assert "nan" not in words.lower() and "{" not in words


def test_wide_pictures_are_reduced():
    data = base64.b64decode(embedded(np.zeros((100, 3 * PICTURE_WIDTH, 3), np.uint8)).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (PICTURE_WIDTH, 33)


def test_by_command(files, tmp_path, capsys):
    pytest.importorskip("cv2")
    words = ["evaluate", "farneback", "pairs", "--root", str(tmp_path / "data"), "--html", str(tmp_path / "r.html")]
    assert main(words) == 0
    assert "protocol: " in capsys.readouterr().out and (tmp_path / "r.html").stat().st_size > 5000


def test_the_curves_are_those_of_the_numbers(monkeypatch):
    """Mean errors 2 and 0.5 px of two intervals; all errors under 1 px; the oracle below the network's confidence."""
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda axes: drawn.append(axes) or b"")
    speeds = torch.zeros(2, 10, dtype=torch.float64)
    speeds[:, 0], speeds[:, 9] = torch.tensor([6.0, 3.0]), torch.tensor([1.0, 2.0])
    plots.error_by_speed(speeds)
    plots.distribution(error_histogram(torch.tensor([0.5, 0.5, 0.0, math.inf])))
    plots.sparsification_curves(sparsification(torch.arange(20.0), torch.arange(20.0)))
    speed, share, curve = drawn
    assert speed.lines[0].get_ydata().tolist() == [2, 0.5] and speed.get_yscale() == "log"
    assert [label.get_text() for label in speed.get_xticklabels()] == ["0-0.5", "160+"]
    x, y = share.lines[0].get_data()
    assert y[x < 0.49].tolist() == [25] * (x < 0.49).sum() and y[x > 0.51].tolist() == [75] * (x > 0.51).sum()
    confident, oracle = (line.get_ydata() for line in curve.lines)
    assert list(confident) == list(oracle) and confident[0] == 1


def test_without_matplotlib_nothing_is_measured(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["evaluate", "nobody", "pairs", "--root", str(tmp_path / "data"), "--html", str(tmp_path / "r.html")]
    assert main(words) == 1 and "plots need matplotlib" in capsys.readouterr().err
