"""How good a network, or a group of them, is: logits, accuracy, calibration, temperature."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import EVAL_BATCH, Normalize, Split
from engine.checkpoint import TEMPERATURES
from engine.distributed import all_reduce_sum, num_processes, rank

CALIBRATION_BINS = 15  # as in Guo et al., arXiv:1706.04599


@torch.inference_mode()
def classify(
    model: nn.Module,
    images: Tensor,
    normalize: Normalize,
    flip_tta: bool = False,
    after_batch: Callable[[], None] | None = None,
    shared: bool = True,
) -> Tensor:
    """Compute the logits of all images, (N, num_classes) float32, on their device.

    Under torchrun, if `shared`, each process takes every n-th batch and all get all logits. On CPUs
    they are the same to the last bit for any number of processes, since the batches are the same.

    Args:
        model: a `ResNet`; evaluated in eval mode, then put back into its mode.
        images: (N, 3, 32, 32) uint8.
        flip_tta: average the logits with those of the mirrored images (test-time augmentation).
        after_batch: called after each batch; an exception that it raises ends the evaluation.
        shared: all processes classify these images together.
    """
    was_training = model.training
    model.eval()
    shape = len(images), model.linear.out_features
    logits = torch.zeros(shape, dtype=torch.float32, device=images.device)
    batches = list(zip(images.split(EVAL_BATCH), logits.split(EVAL_BATCH), strict=True))
    for batch, out in batches[rank() :: num_processes()] if shared else batches:
        x = normalize(batch.float() / 255)
        out.copy_((model(x) + model(x.flip(-1))) / 2 if flip_tta else model(x))
        if after_batch:
            after_batch()
    model.train(was_training)
    return all_reduce_sum(logits) if shared else logits


def evaluate(
    model: nn.Module,
    split: Split,
    normalize: Normalize,
    after_batch: Callable[[], None] | None = None,
) -> "Score | None":
    """Score `model` on a split; None if the split is empty."""
    if not len(split):
        return None
    return score(classify(model, split.images, normalize, after_batch=after_batch), split.labels)


@dataclass(frozen=True)
class Score:
    """Loss and accuracy of a model on labeled images."""

    loss: float  # mean cross entropy, nats
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Top-1, in percent."""
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the accuracy, in percent (Wilson's score interval, 1927)."""
        z, n, p = 1.959964, self.total, self.correct / self.total
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return max(0.0, 100 * (center - half)), min(100.0, 100 * (center + half))

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.accuracy:.2f}% ({self.correct:,} of {self.total:,};"
            f" 95% interval {low:.2f} to {high:.2f}), loss {self.loss:.4f}"
        )


def score(logits: Tensor, labels: Tensor) -> Score:
    """Mean cross entropy and top-1 of (N, num_classes) logits against (N,) labels."""
    correct = (logits.argmax(1) == labels).sum().item()
    return Score(F.cross_entropy(logits, labels).item(), correct, len(labels))


def mean_interval(accuracies: list[float]) -> tuple[float, float] | None:
    """95% confidence interval of the mean accuracy of several seeds, in percent (Student's t)."""
    mean, half = statistics.mean(accuracies), half_width(accuracies)
    return None if half is None else (max(0.0, mean - half), min(100.0, mean + half))


def difference_interval(first: list[float], second: list[float]) -> tuple[float, float] | None:
    """95% confidence interval of the difference of two mean accuracies, in points (Welch's t)."""
    difference = statistics.mean(first) - statistics.mean(second)
    half = half_width(first, second)
    return None if half is None else (max(-100.0, difference - half), min(100.0, difference + half))


def half_width(*groups: list[float]) -> float | None:
    """Half of the 95% interval of a mean, or of the difference of the means of two groups.

    The degrees of freedom are Welch's (1947), since the groups' variances may differ; for one group
    they are Student's n - 1. Every group needs two values. None if those of each group are equal,
    as may happen with few test images: they give no estimate of the spread.
    """
    from scipy.stats import t as student_t  # here, because it takes most of a second to load

    errors = [statistics.variance(group) / len(group) for group in groups]  # squared
    if not any(errors):
        return None
    parts = (e**2 / (len(group) - 1) for e, group in zip(errors, groups, strict=True))
    freedom = sum(errors) ** 2 / sum(parts)
    return float(student_t.ppf(0.975, freedom)) * math.sqrt(sum(errors))


def summary(accuracies: list[float]) -> str:
    """Mean and standard deviation of the accuracies of several seeds, and the mean's interval."""
    interval, told = mean_interval(accuracies), "no interval of the mean, since all are equal"
    if interval:
        told = "95% interval of the mean {:.2f} to {:.2f}".format(*interval)
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    return f"{mean:.2f} ± {deviation:.2f}% (standard deviation); {told}"


@dataclass(frozen=True)
class Calibration:
    """Images in bins of equal width by confidence, the probability of the prediction."""

    count: np.ndarray  # (CALIBRATION_BINS,) images in each bin
    confidence: np.ndarray  # (CALIBRATION_BINS,) their mean confidence, percent; 0 if empty
    accuracy: np.ndarray  # (CALIBRATION_BINS,) how many of them are right, percent; 0 if empty

    @property
    def mean_confidence(self) -> float:
        """Mean confidence of all images, percent; above the accuracy if overconfident."""
        return float(np.average(self.confidence, weights=self.count))

    @property
    def error(self) -> float:
        """Expected calibration error: mean gap between accuracy and confidence, in points."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.count))

    def __str__(self) -> str:
        return f"{self.error:.2f} points (mean confidence {self.mean_confidence:.2f}%)"


def calibrate(logits: Tensor, labels: Tensor) -> Calibration:
    """Compare confidence with accuracy, bin by bin (Guo et al., arXiv:1706.04599)."""
    confidence, predicted = logits.cpu().double().softmax(1).max(1)
    right = predicted == labels.cpu()
    # Bins are closed above, so that a confidence of 1 falls into the last one.
    place = (confidence * CALIBRATION_BINS).ceil().long().clamp(1) - 1
    count = np.bincount(place, minlength=CALIBRATION_BINS)
    means = (
        100 * np.bincount(place, values, CALIBRATION_BINS) / count.clip(1)
        for values in (confidence, right)
    )
    return Calibration(count, *means)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Temperature scaling: the divisor of the logits that minimizes the cross entropy.

    The images must be held out, not those of the training (Guo et al., arXiv:1706.04599).
    """
    from scipy.optimize import minimize_scalar

    logits, labels = logits.cpu().double(), labels.cpu()

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits / math.exp(log_temperature), labels).item()

    # Bounded, because an ever lower temperature is better where every image is right.
    low, high = TEMPERATURES
    found = minimize_scalar(loss, bounds=(math.log(low), math.log(high)), method="bounded")
    return math.exp(found.x)
