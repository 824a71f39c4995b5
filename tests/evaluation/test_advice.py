from dataclasses import replace

import pytest

from topwork.evaluation.advice import ClassRecord, Situation, advise, times
from topwork.evaluation.learning_curve import LearningCurve, Point


def curve(now=0.90, twice=0.93):
    points = (Point(100, now - 0.05, now - 0.07, now - 0.03), Point(200, now - 0.02, now - 0.04, now))
    forecasts = (
        Point(250, now, now - 0.02, now + 0.01),
        Point(500, twice, twice - 0.02, twice + 0.02),
        Point(1000, twice + 0.01, twice - 0.02, twice + 0.03),
    )
    return LearningCurve(points, forecasts, (twice - now, 0.01, 0.05), 0.0, 1.0, 0.5)


def situation(**changes):
    even = tuple(ClassRecord(f"class {i}", 50, 50, 45) for i in range(5))
    known = Situation(400, 250, 0.90, even, curve(), 0, 0, ("test", 2000, 0.9), "lite0", False, 100.0, "photos")
    return replace(known, **changes)


def names(s):
    return [item.name for item in advise(s)]


def test_the_largest_expected_gain_comes_first():
    found = advise(situation())
    gains = [item.gain[0] for item in found if item.gain]
    assert gains == sorted(gains, reverse=True)
    assert found[0].name == "tuning"
    assert names(situation(curve=curve(0.90, 0.99)))[0] == "images"


def test_minutes_follow_from_rates():
    found = {item.name: item for item in advise(situation())}
    assert found["backbone"].minutes == pytest.approx(2.2 * 400 / 100 / 60)
    assert found["images"].person_minutes == pytest.approx(250 * 10 / 60)
    assert times(found["images"]) == "about 42 min of your time"


def test_a_class_that_lags_is_named_and_chance_is_not():
    assert "classes" not in names(situation())
    one_weaker = (ClassRecord("a", 50, 50, 43), *situation().classes[1:])
    assert "classes" not in names(situation(classes=one_weaker)), "43 of 50 against 45 of 50 is chance"
    weak = (ClassRecord("weak <b>", 50, 50, 20), *situation().classes[1:])
    advice = next(item for item in advise(situation(classes=weak)) if item.name == "classes")
    assert "weak <b>" in advice.text
    assert advice.gain[2] == pytest.approx((0.9 - 0.4) * 50 / 250)


def test_suspects_leaks_and_small_tests_have_their_advice():
    found = names(situation(n_suspects=12, n_leaked=3, held_out=("valid", 60, 0.9)))
    assert {"labels", "leaks", "test"} <= set(found)
    assert not {"labels", "leaks", "test"} & set(names(situation()))
    unjudged = next(item for item in advise(situation(held_out=None)) if item.name == "test")
    assert "the accuracy is unknown" in unjudged.text


def test_suspects_bound_only_the_part_they_are_in():
    inside = {
        item.name: item for item in advise(situation(n_suspects=12, n_suspects_held_out=4, held_out=("test", 200, 0.9)))
    }
    assert inside["labels"].gain[2] == pytest.approx(4 / 200)
    outside = {item.name: item for item in advise(situation(n_suspects=12))}
    assert outside["labels"].gain is None
    assert "None is in test" in outside["labels"].text


def test_leaks_are_told_with_the_figure_without_them():
    found = next(i for i in advise(situation(n_leaked=3, clean_accuracy=0.85)) if i.name == "leaks")
    assert "the accuracy without them: 85.0% on test instead of 90.0%" in found.text


def test_the_weaker_of_two_classes_is_named():
    two = (ClassRecord("a", 200, 200, 190), ClassRecord("b", 100, 100, 60))
    found = next(i for i in advise(situation(classes=two)) if i.name == "classes")
    assert "b (recall 60.0%, 100 images)" in found.text
    assert found.gain[2] == pytest.approx((0.95 - 0.6) * 100 / 300)


def test_commands_repeat_the_settings_and_write_beside_the_run():
    asked = {"test_fraction": 0.3, "mode": "probe", "seed": 1, "near_duplicates": False}
    found = {i.name: i for i in advise(situation(path="my photos", out="runs/a", settings=asked))}
    expected = (
        "topwork fit 'my photos' --out runs/a-tuned --test-fraction 0.3 --mode tune --seed 1 --no-near-duplicates"
    )
    assert found["tuning"].command == expected
    assert found["backbone"].command.endswith("--backbone lite2")


def test_no_advice_for_what_was_done():
    assert "tuning" not in names(situation(is_tuned=True))
    assert "backbone" not in names(situation(backbone="resnet50.tv_in1k"))
    assert "images" not in names(situation(curve=None))


def test_a_gain_that_the_test_could_not_show_says_so():
    small = situation(accuracy=0.99, held_out=("test", 100, 0.99), curve=None)
    tuning = next(item for item in advise(small) if item.name == "tuning")
    assert "too few to measure" in tuning.text
    large = situation(accuracy=0.6, held_out=("test", 5000, 0.6))
    assert "too few to measure" not in next(item for item in advise(large) if item.name == "tuning").text


def test_a_flat_curve_says_that_images_are_not_what_is_missing():
    flat = next(item for item in advise(situation(curve=curve(0.95, 0.952))) if item.name == "images")
    assert "nearly flat" in flat.text


@pytest.mark.parametrize(
    ("n", "labels", "leaks"),
    [
        (1, "1 of 400 labels (0.2%) disagrees with the rest of the data: a likely label error, or a hard image. 1 is in test",
         "1 image of valid or test is also in train (the same picture, or one of the same group)"),
        (2, "2 of 400 labels (0.5%) disagree with the rest of the data: likely label errors, or hard images. 2 are in test",
         "2 images of valid or test are also in train (the same picture, or one of the same group)"),
        (1000, "1,000 of 400 labels", "1,000 images of valid or test are also in train"),
    ],
)  # fmt: skip
def test_advice_reads_well_at_one_two_and_many(n, labels, leaks):
    found = {i.name: i.text for i in advise(situation(n_suspects=n, n_suspects_held_out=n, n_leaked=n))}
    assert found["labels"].startswith(labels)
    assert found["leaks"].startswith(leaks)
