"""A generator of one's own: two verbs. This one is conditioned on a row of numbers per network, such as its loss."""

import torch


class LinearGaussian:
    """theta = mean + slope (condition - its mean) + noise, with the covariance of what the condition does not explain."""

    def fit(self, theta, condition):
        self.mean, self.middle = theta.mean(dim=0), condition.mean(dim=0)
        self.slope = torch.linalg.lstsq(condition - self.middle, theta - self.mean).solution
        self.rest = theta - self.mean - (condition - self.middle) @ self.slope
        return self

    def sample(self, n, generator=None, condition=None):
        draws = torch.randn(n, len(self.rest), generator=generator) / (len(self.rest) - 1) ** 0.5
        return self.mean + (condition - self.middle) @ self.slope + draws @ self.rest
