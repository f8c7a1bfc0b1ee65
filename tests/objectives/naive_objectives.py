"""The objectives as METHOD.md defines them, in float64 NumPy and loops.

Nothing here shares algebra with the code under test: no variance in place of pairs, no stable
softplus, no Gram matrix. `mask` is a list of the responses that exist, row by row.
"""

import itertools
import math

import numpy as np


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def pairs_of(mask_row):
  return list(itertools.combinations(np.flatnonzero(mask_row), 2))


def cross_entropy(p, margin):
  return -p * math.log(sigmoid(margin)) - (1 - p) * math.log(1 - sigmoid(margin))


def dpo(h, beta, preference=None, smoothing=0.0):
  losses = []
  for row, (w, l) in enumerate(h):
    p = 1.0 if preference is None else preference[row]
    p = p * (1 - smoothing) + (1 - p) * smoothing
    losses.append(cross_entropy(p, beta * (w - l)))
  return np.array(losses)


def plackett_luce(scores, ranks, mask):
  losses = []
  for row in range(len(scores)):
    left = [j for j in range(scores.shape[1]) if mask[row, j]]
    loss = 0.0
    while left:
      best = min(left, key=lambda j: ranks[row, j])
      loss -= math.log(math.exp(scores[row, best]) / sum(math.exp(scores[row, j]) for j in left))
      left.remove(best)
    losses.append(loss)
  return np.array(losses)


def margin_distance(target, margin, form):
  if form == "square":
    return (target - margin) ** 2
  p, q = sigmoid(target), sigmoid(margin)
  return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def distill(h, r, beta, mask, form="square"):
  losses = []
  for row in range(len(h)):
    terms = [
      margin_distance(r[row, j] - r[row, k], beta * (h[row, j] - h[row, k]), form)
      for j, k in pairs_of(mask[row])
    ]
    losses.append(sum(terms) / len(terms) if terms else 0.0)
  return np.array(losses)


def lcb(h, r, beta, mask, kappa, form="square"):
  losses = []
  for row in range(len(h)):
    terms = []
    for j, k in pairs_of(mask[row]):
      margins = [member[row, j] - member[row, k] for member in r]
      mu = sum(margins) / len(margins)
      sigma = math.sqrt(sum((m - mu) ** 2 for m in margins) / len(margins))
      target = math.copysign(max(abs(mu) - kappa * sigma, 0.0), mu)
      terms.append(margin_distance(target, beta * (h[row, j] - h[row, k]), form))
    losses.append(sum(terms) / len(terms) if terms else 0.0)
  return np.array(losses)


def mean(values, weights):
  return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def advantages(h, r, mask, weights):
  """A_i = mean_b sum_j (softmax_j(h_b) - 1/n_b) r_ibj."""
  result = []
  for member in r:
    rows = []
    for row in range(len(h)):
      there = np.flatnonzero(mask[row])
      total = sum(math.exp(h[row, j]) for j in there)
      rows.append(
        sum((math.exp(h[row, j]) / total - 1 / len(there)) * member[row, j] for j in there)
      )
    result.append(mean(rows, weights))
  return result


def hull_value(weights_of_members, h, r, beta, mask, weights):
  mixture = sum(w * member for w, member in zip(weights_of_members, r, strict=True))
  return mean(distill(h, mixture, beta, mask), weights)


def ensemble(h, r, beta, mask, weights, selection, kappa=1.0, temperature=1.0, form="square"):
  """(losses, member weights) of every selection that needs no solver and no state."""
  count = len(r)
  if selection == "mean":
    return distill(h, sum(r) / count, beta, mask, form), np.full(count, 1 / count)
  if selection == "lcb":
    return lcb(h, r, beta, mask, kappa, form), np.full(count, 1 / count)
  losses = np.array([distill(h, member, beta, mask, form) for member in r])
  if selection == "example":
    chosen = np.zeros_like(losses)
    for row in range(len(h)):
      chosen[losses[:, row].tolist().index(min(losses[:, row])), row] = 1
    return losses.min(0), chosen
  means = [mean(row, weights) for row in losses]
  if selection == "batch":
    best = means.index(min(means))
    return losses[best], np.eye(count)[best]
  if selection == "worst":
    scores = advantages(h, r, mask, weights)
    best = scores.index(min(scores))
    return losses[best], np.eye(count)[best]
  if selection == "soft":
    raw = [math.exp(-m / temperature) for m in means]
    soft = np.array(raw) / sum(raw)
    return sum(w * row for w, row in zip(soft, losses, strict=True)), soft
  raise AssertionError(selection)


def simplex_minimum(gram, cross, ridge=1e-6):
  """argmin of l'Gl - 2c'l + ridge |l - 1/K|^2 over the simplex: every face in turn."""
  size = len(cross)
  best, best_value = None, math.inf
  for count in range(1, size + 1):
    for face in itertools.combinations(range(size), count):
      inside = list(face)
      system = np.zeros((count + 1, count + 1))
      system[:count, :count] = 2 * (gram[np.ix_(inside, inside)] + ridge * np.eye(count))
      system[:count, count] = system[count, :count] = 1
      right = np.append(2 * cross[inside] + 2 * ridge / size, 1.0)
      solution = np.linalg.solve(system, right)[:count]
      if (solution < -1e-12).any():
        continue
      weights = np.zeros(size)
      weights[inside] = solution
      value = (
        weights @ gram @ weights - 2 * cross @ weights + ridge * ((weights - 1 / size) ** 2).sum()
      )
      if value < best_value - 1e-15:
        best, best_value = weights, value
  return best
