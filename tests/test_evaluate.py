"""How good a network is: logits, score and its interval, calibration, temperature."""

import math

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from config import PRESETS
from data import Normalize, load_dataset
from engine.evaluate import (
    CALIBRATION_BINS,
    Score,
    calibrate,
    classify,
    difference_interval,
    evaluate,
    fit_temperature,
    mean_interval,
    score,
    summary,
)
from model import Architecture, ResNet
from utils import generator

PIXELS = Normalize((0.5,) * 3, (0.25,) * 3)


def test_evaluation_leaves_no_trace_and_uses_the_running_statistics():
    model = ResNet(Architecture((1,), 2, pool_kernel=32, dropout=0.5)).train()
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=generator(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = classify(model, images, PIXELS)
    assert model.training and not logits.requires_grad
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    one_by_one = torch.cat([classify(model, image[None], PIXELS) for image in images])
    torch.testing.assert_close(logits, one_by_one)
    batches = classify(model, images.repeat(90, 1, 1, 1), PIXELS)  # 6 of 100, one of 30
    torch.testing.assert_close(batches, logits.repeat(90, 1))
    torch.testing.assert_close(logits, model.eval()((images / 255 - 0.5) / 0.25).detach())
    flipped = classify(model, images.flip(-1), PIXELS)
    both = classify(model, images, PIXELS, flip_tta=True)
    torch.testing.assert_close(both, (logits + flipped) / 2)


def test_it_can_be_ended_between_two_batches():
    images, calls = torch.zeros(300, 3, 32, 32, dtype=torch.uint8), []

    def stop():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    model = ResNet(Architecture((1,), 1, 1, pool_kernel=32))
    with pytest.raises(KeyboardInterrupt):
        classify(model, images, PIXELS, after_batch=stop)
    assert len(calls) == 2


def test_score_and_its_interval():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    found = score(logits, labels)
    assert (found.correct, found.total, found.accuracy) == (3, 4, 75)
    by_hand = [math.log1p(math.exp(x)) for x in (-2, -1, 3, 0)]
    assert found.loss == pytest.approx(sum(by_hand) / 4)
    # Wilson's interval as statsmodels and R's binom.wilson give it
    assert Score(0, 81, 263).interval == pytest.approx((25.529, 36.619), abs=0.01)
    assert Score(0, 10, 10).interval == pytest.approx((72.247, 100), abs=0.01)
    assert str(Score(0.5, 9484, 10_000)).startswith("94.84% (9,484 of 10,000; 95% interval 94.3")


def test_intervals_of_means_are_student_s_and_welch_s():
    first, second = [94.1, 94.3, 94.9, 94.2], [93.0, 93.9]
    mean = stats.ttest_1samp(first, 0).confidence_interval()
    assert mean_interval(first) == pytest.approx(tuple(mean))
    welch = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert difference_interval(first, second) == pytest.approx(tuple(welch))


def test_values_without_a_spread_give_no_interval():
    assert mean_interval([94.0, 94.0]) is None
    assert difference_interval([94.0, 94.0], [93.0, 93.0]) is None
    low, high = difference_interval([94.0, 94.0], [93.0, 94.0])
    assert low < 0.5 < high
    assert summary([94.0] * 3).startswith("94.00 ± 0.00% (standard deviation); no interval of")


def test_intervals_do_not_leave_their_range():
    assert mean_interval([2.0, 99.0]) == (0, 100)
    assert difference_interval([2.0, 99.0], [1.0, 98.0]) == (-100, 100)
    for total in range(1, 1000):
        for correct in (0, total):
            low, high = Score(0, correct, total).interval
            assert 0 <= low <= high <= 100


def test_empty_split_has_no_score():
    digits = load_dataset(PRESETS["demo"])
    assert evaluate(ResNet(PRESETS["demo"]), digits.val, digits.normalize) is None


def test_calibration_compares_confidence_with_accuracy_bin_by_bin():
    """Confidences 0.55 (one of two right), 0.95 (right) and 1 (wrong), by hand."""
    odds = torch.tensor([[0.55], [0.55], [0.95], [1.0]])
    logits = torch.cat([odds, 1 - odds], dim=1).log()
    found = calibrate(logits, torch.tensor([0, 1, 0, 1]))
    assert len(found.count) == CALIBRATION_BINS == 15
    assert {i: n for i, n in enumerate(found.count.tolist()) if n} == {8: 2, 14: 2}
    assert found.confidence[[8, 14]] == pytest.approx([55, 97.5])
    assert found.accuracy[[8, 14]] == pytest.approx([50, 50])
    assert found.mean_confidence == pytest.approx(76.25)
    assert found.error == pytest.approx((2 * 5 + 2 * 47.5) / 4)


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_temperature_undoes_a_scale_of_the_logits(factor):
    """Labels are drawn with the probabilities of the logits, which are then scaled."""
    logits = 3 * torch.randn(20_000, 10, generator=generator(0))
    labels = logits.softmax(1).multinomial(1, generator=generator(1)).flatten()
    found = fit_temperature(factor * logits, labels)
    assert found == pytest.approx(factor, rel=0.03)

    def loss(temperature):
        return F.cross_entropy(factor * logits / temperature, labels).item()

    assert loss(found) < min(loss(0.98 * found), loss(1.02 * found))


def test_temperature_stays_in_its_range_where_every_image_is_right_or_wrong():
    logits = torch.eye(10)
    assert 0.05 <= fit_temperature(logits, torch.arange(10)) < 0.06
    assert 19 < fit_temperature(logits, torch.arange(10).roll(1)) <= 20
