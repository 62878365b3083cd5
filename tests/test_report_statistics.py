"""Intervals, paired differences and bootstraps against values worked out by hand or by scipy."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from sunets.core.metrics import mean_iou, scores_from_confusion
from sunets.report.statistics import (
    bootstrap_scores,
    detectable_difference,
    holm,
    joint_interval,
    mean_interval,
    paired_difference,
    verdict,
)


def test_interval_of_three_values() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302652729911275 / np.sqrt(3))
    assert found.low == pytest.approx(2 - 2.4841377117)


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    assert mean_interval([0.4]) == mean_interval([0.4]).__class__(0.4, None, None, 1)
    assert mean_interval([0.4]).half_width is None
    equal = mean_interval([0.1, 0.1, 0.1])  # their computed standard deviation is not 0
    assert (equal.mean, equal.low, equal.half_width, equal.n) == (pytest.approx(0.1), None, None, 3)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
    with pytest.raises(ValueError, match="not finite"):
        mean_interval([0.1, float("nan")])


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = [e.low <= 0 <= e.high for e in (mean_interval(rng.normal(size=5).tolist()) for _ in range(2000))]
    assert 0.93 < np.mean(hits) < 0.97


def test_a_class_that_resampled_test_sets_lack_does_not_widen_its_interval() -> None:
    rng = np.random.default_rng(1)
    scores = [0.941, 0.940, 0.939]
    samples = np.repeat(np.array(scores)[:, None], 1000, axis=1) + rng.normal(scale=0.003, size=1000)
    samples[:, rng.random(1000) < 0.11] = np.nan
    found = joint_interval(scores, samples)
    assert found.low is not None
    assert 0.92 < found.low < 0.935
    assert 0.945 < found.high < 0.96
    assert joint_interval(scores, np.full((3, 1000), np.nan)).low is None


def test_paired_difference_uses_the_common_seeds_and_the_direction() -> None:
    ours, reference = {0: 0.5, 1: 0.6, 2: 0.7, 9: 0.0}, {0: 0.4, 1: 0.45, 2: 0.5, 3: 0.9}
    found = paired_difference(ours, reference)
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(0.15), 3)
    assert (found.low, found.high) == (pytest.approx(0.15 - 0.1242068856), pytest.approx(0.15 + 0.1242068856))
    assert found.p_value == pytest.approx(stats.ttest_rel([0.5, 0.6, 0.7], [0.4, 0.45, 0.5]).pvalue)
    assert found.sd == pytest.approx(0.05)
    assert found.wins == 3
    assert paired_difference(ours, reference, higher_is_better=False).wins == 0
    assert paired_difference({0: 0.5, 1: 0.3}, {0: 0.4, 1: 0.4}).wins == 1


def test_pairing_finds_what_unpaired_intervals_hide() -> None:
    reference = {s: 0.4 + 0.05 * s for s in range(5)}
    ours = {s: v + 0.01 + 0.001 * (s % 2) for s, v in reference.items()}
    assert mean_interval(list(ours.values())).low < mean_interval(list(reference.values())).high
    assert paired_difference(ours, reference).p_value < 0.05


def test_differences_without_spread_or_without_seeds() -> None:
    same = paired_difference({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5})
    assert (same.untested, same.p_value, same.detectable, same.equivalence_p(1.0)) == ("", 1.0, None, None)
    assert (same.mean, same.low, same.high, same.n) == (0.0, None, None, 2)
    for ours, reference in (
        ({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5}),
        ({0: 0.43, 1: 0.43}, {0: 0.4, 1: 0.4}),
        ({0: 0.1 + 0.2, 1: 0.4}, {0: 0.2, 1: 0.3}),  # rounding is no spread
    ):
        shifted = paired_difference(ours, reference)
        assert (shifted.untested, shifted.p_value) == ("not tested (the seeds do not differ)", None)
        assert (shifted.low, shifted.high, shifted.n) == (None, None, 2)
    assert holm([shifted.p_value, 0.03, 0.04]) == [None, pytest.approx(0.06), pytest.approx(0.06)]
    assert paired_difference({0: 0.5}, {0: 0.4}).untested == "not tested (1 seed)"
    assert paired_difference({0: 0.5}, {1: 0.4}) is None


def test_detectable_difference_has_the_stated_power() -> None:
    assert detectable_difference(1.64, 3) == pytest.approx(5.4, abs=0.05)
    assert detectable_difference(1.64, 5) == pytest.approx(2.8, abs=0.05)
    assert detectable_difference(1.64, 5, power=0.9) > detectable_difference(1.64, 5)
    rng = np.random.default_rng(0)
    drawn = rng.normal(detectable_difference(2.0, 4), 2.0, (20_000, 4))
    assert np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue <= 0.05) == pytest.approx(0.8, abs=0.01)
    found = paired_difference({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.4, 1: 0.45, 2: 0.5})
    assert found.detectable == detectable_difference(found.sd, 3)


@pytest.mark.parametrize("mean", [0.3, -0.3, 0.0])
def test_equivalence_is_that_the_interval_lies_within_the_margin(mean) -> None:
    found = paired_difference({0: mean - 1, 1: mean, 2: mean + 1}, dict.fromkeys(range(3), 0.0))
    reach = max(abs(found.low), abs(found.high))
    assert found.equivalence_p(reach + 1e-6) < 0.05 < found.equivalence_p(reach - 1e-6)
    assert found.equivalence_p(0.0) >= 0.9
    low, high = (stats.ttest_1samp([mean - 1, mean, mean + 1], m, alternative=a).pvalue
                 for m, a in ((-2, "greater"), (2, "less")))  # fmt: skip
    assert found.equivalence_p(2) == pytest.approx(2 * max(low, high))


def test_equivalence_goes_before_better_and_worse_and_neither_is_undecided() -> None:
    assert verdict(0.1, 0.001, 0.001) == "equivalent"
    assert verdict(0.1, 0.05, 0.06) == "better"
    assert verdict(-0.1, 0.05, 0.06) == "worse"
    assert verdict(-0.1, 0.05, 0.06, higher_is_better=False) == "better"
    assert verdict(0.1, 0.06, 0.06) == "undecided"
    assert verdict(0.0, 1.0, None) == "undecided"


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def _counts(images: int, k: int = 4, seed: int = 0) -> np.ndarray:
    counts = np.random.default_rng(seed).integers(0, 50, (images, k, k)).astype(np.uint32)
    counts[:, 3, :] = counts[:, :, 3] = 0  # a class that no image has
    return counts


def test_miou_of_many_matrices_is_that_of_each() -> None:
    counts = _counts(6)
    for matrix, value in zip(counts, mean_iou(counts), strict=True):
        assert value == pytest.approx(scores_from_confusion(matrix)["score.miou"], abs=1e-12)
    assert np.isnan(mean_iou(np.zeros((2, 2))))


def test_bootstrap_scores_resampled_sets_of_images() -> None:
    a, b = _counts(12), _counts(12, seed=1)
    found = bootstrap_scores([a, b], resamples=20, seed=3)
    rng = np.random.default_rng(3)
    for values in found.T:
        drawn = rng.integers(12, size=12)
        expected = [scores_from_confusion(c[drawn].sum(0, dtype=np.int64))["score.miou"] for c in (a, b)]
        assert values == pytest.approx(expected, abs=1e-12)
    np.testing.assert_array_equal(found, bootstrap_scores([a, b], resamples=20, seed=3, max_bytes=1))


def test_blocks_are_drawn_as_a_whole() -> None:
    counts = _counts(12)
    blocks = [i // 3 for i in range(12)]
    together = np.stack([counts[3 * i : 3 * i + 3].sum(0, dtype=np.int64) for i in range(4)])
    np.testing.assert_array_equal(
        bootstrap_scores([counts], blocks=blocks, resamples=30), bootstrap_scores([together], resamples=30)
    )


def test_joint_interval_of_the_seeds_alone_is_the_t_interval_on_the_logit_scale() -> None:
    values = [0.40, 0.42, 0.45, 0.39, 0.43]
    found = joint_interval(values)
    exact = mean_interval(values)
    assert (found.mean, found.n) == (exact.mean, 5)
    assert found.low == pytest.approx(exact.low, abs=0.003)
    assert found.high == pytest.approx(exact.high, abs=0.003)


def test_no_interval_where_a_resampled_score_is_zero() -> None:
    samples = np.random.default_rng(0).uniform(0.4, 0.6, (3, 1000))
    assert joint_interval([0.4, 0.5, 0.6], samples).low is not None
    samples[:, 7] = 0.0
    assert joint_interval([0.4, 0.5, 0.6], samples).low is None


def test_joint_interval_holds_both_sources_of_uncertainty() -> None:
    a, b, c = _counts(12), _counts(12, seed=1), _counts(12, seed=2)
    scores = [float(mean_iou(x.sum(0))) for x in (a, b, c)]
    seeds, both = joint_interval(scores), joint_interval(scores, bootstrap_scores([a, b, c]))
    assert both.low < seeds.low < seeds.high < both.high
    one = joint_interval(scores[:1], bootstrap_scores([a]))
    low, high = np.quantile(bootstrap_scores([a]), [0.025, 0.975])
    assert (one.low, one.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_joint_interval_covers_with_few_seeds_and_stays_in_range() -> None:
    rng = np.random.default_rng(0)
    truth, hits = 0.6, []
    for _ in range(400):
        images = rng.normal(0, 0.02, 30)  # each image's effect, the same for all seeds
        scores = truth + rng.normal(0, 0.03, 3) + images.mean()
        drawn = images[rng.integers(30, size=(1000, 30))].mean(1) - images.mean()
        found = joint_interval(scores.tolist(), scores[:, None] + drawn)
        hits.append(found.low <= truth <= found.high)
    assert 0.92 < np.mean(hits) < 0.98
    wide = joint_interval([0.02, 0.3, 0.9])
    assert 0 < wide.low < wide.high < 1


def test_no_spread_is_no_interval() -> None:
    assert joint_interval([0.4, 0.4, 0.4]).low is None
    assert joint_interval([0.4]).low is None
    assert joint_interval([1.0, 1.0]).low is None
    alike = bootstrap_scores([np.repeat(_counts(1), 5, axis=0)] * 2, resamples=50)
    assert joint_interval([float(alike[0, 0])] * 2, alike).low is None


def test_resampling_a_large_test_set_takes_less_than_a_second() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (500, 11, 11)).astype(np.uint32)
    start = time.process_time()
    bootstrap_scores([counts] * 5)
    assert time.process_time() - start < 1
