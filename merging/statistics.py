"""What batch norms remember of their data: means of means, and variances by the law of total variance.

Running statistics are not weights: a method's scale and projection mean nothing to them, and they count in no norm. The
mean over experts of a variance about another mean is the mean second moment less the square of the mean. Moments are
taken about the base's mean, so that no small variance is lost beside a large mean.

>>> import torch
>>> moment = second_moment(torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([4.0]))
>>> moment
tensor([13.], dtype=torch.float64)
>>> merged_variance(torch.tensor([2.0]), torch.tensor([3.0]), moment - 2.0)
tensor([4.])
"""

from torch import Tensor


def second_moment(about: Tensor, mean: Tensor, variance: Tensor) -> Tensor:  # all (channels,) -> float64
    """The mean square distance from `about` of what has this mean and this variance."""
    return variance.double() + (mean.double() - about.double()).square()


def merged_variance(base: Tensor, moved_mean: Tensor, moved_moment: Tensor) -> Tensor:  # all (channels,), dtype of base
    """The variance after a base's mean, and its second moment about that mean, were moved by so much; >= 0."""
    return (base.double() + moved_moment - moved_mean.double().square()).clamp(min=0).to(base.dtype)
