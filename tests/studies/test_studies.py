"""Every study runs from drawn images to its page; what it says is in its values; the verb lists and refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from topwork.blocks import Bars, Chart, Grid, Share, Table
from topwork.cli import app
from topwork.commands.study import run_study
from topwork.errors import TopworkError, UsageError
from topwork.progress import Reporter
from topwork.report.other_pages import study_page, write_study
from topwork.settings import StudySettings
from topwork.studies import backbones
from topwork.studies.bench import SHAPES, draw_folder, prepare, round_robin
from topwork.studies.study import STUDIES, runner_of, study_named

SMALL = StudySettings(quick=True, backbone="random:test_efficientnet", size=32, n_images=40)
NAMES = [study.name for study in STUDIES]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tiny networks further threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_folder(tmp_path_factory.mktemp("drawn"), 12)


@pytest.fixture(scope="module")
def studied(images):
    """Runs a study once, however many tests look at it."""
    done: dict = {}

    def run(name):
        if name not in done:
            done[name] = run_study(name, images, SMALL)
        return done[name]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_study_runs_and_its_page_holds_what_it_found(name, studied, tmp_path):
    found = studied(name)
    assert found.findings.sentences
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["name"] == name
    assert values["sentences"] == list(found.findings.sentences)
    page = write_study(found, tmp_path).read_text()
    assert page.count("<script") == 1
    for part in found.findings.parts:
        assert part.title.replace("'", "&#39;") in page
    for number, part in enumerate(found.findings.parts, start=1):
        if isinstance(part, Chart | Bars):
            text = (tmp_path / f"{name}-{number}.svg").read_text()
            ElementTree.fromstring(text)
            assert "nan" not in text
        elif isinstance(part, Grid):
            assert (tmp_path / f"{name}-{number}.jpg").stat().st_size < 120_000
    assert json.loads((tmp_path / f"{name}.json").read_text())["values"] == values["values"]


@pytest.mark.parametrize("name", NAMES)
def test_every_share_in_a_sentence_is_in_the_tables(name, studied):
    """A percentage with an interval that a sentence names is a measured cell or bar of the study."""
    found = studied(name).findings
    shown = set()
    for part in found.parts:
        cells = [cell for row in part.rows for cell in row] if isinstance(part, Table | Bars) else []
        shown |= {str(cell) for cell in cells if isinstance(cell, Share)}
    for text in found.sentences:
        for told in re.findall(r"[\d.]+% \([\d.]+–[\d.]+\)", text):
            assert told in shown, told


def test_half_as_many_images_are_half(studied):
    (table,) = (
        part for part in studied("data-size").findings.parts if isinstance(part, Table) and part.title == "Measured"
    )
    numbers = [row[0] for row in table.rows]
    assert numbers[-2] == numbers[-1] // 2
    assert any(f"{numbers[-2]} images" in text for text in studied("data-size").findings.sentences)


def test_gradients_of_plain_networks_decay_and_those_of_residual_ones_do_not(studied):
    found = studied("residual").findings
    shares = found.values["first_by_last"]
    assert shares["plain 12"] < 0.1 * shares["plain 4"]
    assert shares["residual 12"] > 0.1
    assert "it decays with depth" in found.sentences[0]
    assert "it does not decay" in found.sentences[1]


def test_scratch_compares_every_network_at_equal_epochs_and_equal_time(studied):
    found = studied("scratch").findings
    table = next(part for part in found.parts if isinstance(part, Table))
    pretrained, *others = table.rows
    assert pretrained[0] == "pretrained"
    assert {row[0] for row in others} >= {"six blocks", "plain, 12 layers", "residual, ResNet-9"}
    assert sum(row[3] == pretrained[3] for row in others) == 4  # each of the four at equal epochs


def test_a_folded_first_convolution_answers_as_the_repeated_channel(studied):
    found = studied("grayscale").findings
    accuracy = found.values["accuracy"]
    assert set(accuracy) >= {"color", "grayscale, channel repeated", "grayscale, first convolution folded"}
    assert sum("learned colors" in text.lower() for text in found.sentences) == 2


def test_heads_have_the_parameters_that_arithmetic_gives(studied):
    counts = studied("heads").findings.values["n_parameters"]
    d, c = 256, len(SHAPES)
    assert counts["linear"] == d * c + c
    assert counts["256-relu-0.4"] == d * 256 + 256 + 256 * c + c
    assert counts["128-relu-0.2"] == d * 128 + 128 + 128 * c + c


def test_backbones_have_the_published_parameters():
    assert backbones.size_of("tf_efficientnet_lite0", 32).n_parameters == 4_652_008
    resnet = backbones.size_of("resnet18.tv_in1k", 224)
    assert resnet.n_parameters == 11_689_512
    assert resnet.multiply_adds == pytest.approx(1.814, rel=0.01)


# ---- bench and catalog


def test_classes_take_turns_so_that_every_beginning_is_balanced():
    labels = np.repeat([0, 1, 2], [10, 20, 5])
    rows = round_robin(np.arange(35), labels, 0)
    assert sorted(rows) == list(range(35))
    assert np.bincount(labels[rows[:15]]).tolist() == [5, 5, 5]


def test_a_bench_divides_without_overlap_and_repeats_itself(images):
    one, two = (prepare(images, SMALL) for _ in range(2))
    assert not set(one.train) & set(one.held_out)
    assert len(one.train) + len(one.held_out) == len(one.manifest.samples) <= 41
    assert [s.path for s in one.manifest.samples] == [s.path for s in two.manifest.samples]
    assert len(np.bincount(one.labels[one.held_out])) == len(SHAPES)


def test_without_images_shapes_are_drawn():
    said: list[str] = []
    reporter = Reporter()
    reporter.note = said.append  # type: ignore[method-assign]
    bench = prepare(None, SMALL, reporter)
    assert bench.classes == tuple(sorted(SHAPES))
    assert "drawn" in said[0]


def test_one_class_is_refused(images, tmp_path):
    shutil.copytree(images / "disc", tmp_path / "data" / "disc")
    with pytest.raises(UsageError, match="two classes"):
        prepare(tmp_path / "data", SMALL)


def test_wrong_sizes_and_places_are_refused_before_any_work(images, tmp_path):
    with pytest.raises(UsageError, match="--size 8"):
        prepare(images, StudySettings(size=8))
    with pytest.raises(UsageError, match="--n-images 3"):
        prepare(images, StudySettings(n_images=3))
    (tmp_path / "file").write_text("")
    with pytest.raises(TopworkError, match="cannot be written"):
        app(["study", "residual", str(images), "--out", str(tmp_path / "file" / "below")])


def test_every_study_of_the_catalog_has_a_module():
    for study in STUDIES:
        assert callable(runner_of(study))
        assert all((study.title, study.teaches, study.cost, study.source))
    with pytest.raises(UsageError, match="did you mean normalization"):
        study_named("normalisation")


def test_the_verb_lists_runs_and_refuses(images, tmp_path, capsys):
    def topwork(*arguments):
        assert app(["study", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    listed = json.loads(topwork("--list", "--json"))
    assert [study["name"] for study in listed["studies"]] == NAMES
    assert "teaches" in topwork("--list")
    with pytest.raises(UsageError, match="no such study"):
        topwork("nothing", images)
    small = ["--quick", "--backbone", SMALL.backbone, "--size", 32, "--n-images", 40, "--out", tmp_path]
    answer = json.loads(topwork("data-size", images, *small, "--json"))
    assert answer["page"] == str(tmp_path / "data-size.html")
    assert answer["sentences"]
    with pytest.raises(UsageError, match=r"data-size\.html exists already"):
        topwork("data-size", images, *small)
    said = topwork("data-size", images, *small, "--overwrite")
    assert all(sentence in said for sentence in answer["sentences"])


def test_class_names_cannot_run_in_a_page(tmp_path):
    root = draw_folder(tmp_path, 8)
    (root / "disc").rename(root / "<img src=x onerror=alert(1)>")
    page = study_page(run_study("heads", root, SMALL))
    assert "<img src=x" not in page


@pytest.mark.slow
def test_forgetting_normalization_costs_accuracy_on_photographs(shared_data):
    found = run_study("normalization", shared_data / "ants-bees", StudySettings(quick=True)).findings
    drop = found.values["drops"]["pixels 0 to 255"]
    assert drop["is_clear"]
    assert drop["value"] < 0


# ---- pages to learn from


LEARN = Path(__file__).parents[2] / "docs" / "learn"


def test_every_study_has_a_page_to_learn_from_whose_pictures_are_there_and_small():
    pages = {path.stem.lstrip("0123456789-"): path.read_text() for path in LEARN.glob("*.md")}
    assert set(NAMES) <= set(pages)
    for name, text in pages.items():
        for link in re.findall(r"\]\(([^):]+?)\)", text):
            assert (LEARN / link).exists(), f"{name}: {link}"
    assert all(path.stat().st_size < 60 * 1024 for path in LEARN.iterdir())


def test_the_table_of_figures_names_only_verbs_and_studies_that_exist():
    text = (LEARN / "README.md").read_text()
    verbs = {name for name in app if not name.startswith("-")}
    assert set(re.findall(r"`topwork ([a-z][a-z-]*)", text)) <= verbs
    assert set(re.findall(r"`topwork study ([a-z][a-z-]*)", text)) <= set(NAMES)
