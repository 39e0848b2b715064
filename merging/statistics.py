"""What batch norms remember of their data: means of means, and variances by the law of total variance.

Running statistics are not weights: a method's scale and projection mean nothing to them, and they count in no norm. The
mean over experts of a variance about another mean is the mean second moment less the square of the mean.

>>> import torch
>>> second_moment(torch.tensor([3.0]), torch.tensor([4.0]))
tensor([13.], dtype=torch.float64)
>>> variance(torch.tensor([3.0]), torch.tensor([13.0]))
tensor([4.], dtype=torch.float64)
"""

from torch import Tensor


def second_moment(mean: Tensor, variance: Tensor) -> Tensor:  # both (channels,) -> (channels,), float64
    """The mean square of what has this mean and this variance."""
    return variance.double() + mean.double().square()


def variance(mean: Tensor, moment: Tensor) -> Tensor:  # both (channels,) -> (channels,), float64, >= 0
    """The variance of what has this mean and this mean square."""
    return (moment.double() - mean.double().square()).clamp(min=0)
