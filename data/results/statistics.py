"""Statistics of counts and numbers: intervals, rank correlation, calibration, pass@k."""

import math
from statistics import StatisticsError, correlation


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def unique(values) -> list:
    """Each value once, in order of its first appearance."""
    return list(dict.fromkeys(values))


def only(records: list, **wanted) -> list:
    """The records that have all of these values."""
    return [r for r in records if all(r[key] == value for key, value in wanted.items())]


def wilson(right: int, n: int) -> tuple:
    """95 % interval (low, high) of a proportion (Wilson 1927), inside [0, 1]."""
    # the usual p ± z·√(p(1−p)/n) has no width where every answer is right
    z = 1.959964
    p = right / n
    # (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    middle = p + z ** 2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z ** 2 / (4 * n ** 2))
    whole = 1 + z ** 2 / n
    return (middle - half) / whole, (middle + half) / whole


def ratio(sums, counts) -> tuple:
    """(mean, low, high) of all tokens, with a 95 % interval; sums, counts: tensors, by example.

    Examples are independent of each other, the tokens of one example are not.
    """
    n, total = len(sums), counts.sum()
    middle = sums.sum() / total
    # Var(Σs/Σc) ≈ n/(n−1) · Σ(s_i − m·c_i)² / (Σc)²
    variance = n / max(1, n - 1) * (sums - middle * counts).square().sum() / total ** 2
    half = 1.959964 * variance.sqrt()
    return float(middle), float(middle - half), float(middle + half)


def ranks(values: list) -> list:
    """Ranks from 1, the smallest; equal values share the mean of their ranks."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2
            for value in values]


def rank_correlation(x, y) -> float | None:
    """Spearman's ρ in [−1, 1]: do x and y rise together? None where one of them is constant."""
    try:
        return correlation(ranks(x), ranks(y))
    except StatisticsError:
        return None


def calibration(confidences, rights, bins: int = 10) -> dict:
    """Of the tokens predicted with probability p, is a share p correct? Lists of equal length.

    ece is the expected calibration error (Guo et al. 2017) in [0, 1]: the mean distance between
    accuracy and confidence over `bins` equal intervals of p.
    """
    groups = [[] for _ in range(bins)]
    for confidence, right in zip(confidences, rights):
        groups[min(bins - 1, int(confidence * bins))].append(right - confidence)
    # ECE = Σ_b n_b/n · |accuracy_b − confidence_b|
    error = sum(abs(sum(group)) for group in groups)
    return {
        "tokens": len(rights),
        "accuracy": mean(rights),
        "confidence": mean(confidences),
        "ece": error / len(rights),
    }


def changes(before, after) -> dict:
    """Counts of tokens that became right (fixed) or wrong (broken); boolean tensors (N,)."""
    return {
        "tokens": len(before),
        "fixed": int((~before & after).sum()),
        "broken": int((before & ~after).sum()),
    }


def pass_at_k(n: int, c: int, k: int) -> float | None:
    """The chance that one of k samples is right, from n samples of which c are right.

    Unbiased (Chen et al. 2021, Eq. 1): 1 − C(n−c, k) / C(n, k). None for k > n.
    """
    if k > n:
        return None
    # integers up to the division, so nothing is rounded
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)
