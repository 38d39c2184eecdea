"""How far two passes over the same tokens differ, in routing and in log-probabilities."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt

EXTREME_RATIO = 2.0


@dataclass(frozen=True)
class Difference:
    """One pass against a reference pass; log-probs in nats, KL by Schulman's estimators.

    Attributes:
        router_mismatch: share of router decisions, one for each token and MoE layer, whose set of
            experts differs.
        token_mismatch: share of tokens with such a decision in at least one layer.
        logprob_abs_mean: mean of |log p - log p_ref| over the sampled tokens.
        logprob_abs_max: its maximum.
        kl_k1: mean of log p_ref - log p, which estimates KL(ref || p) without bias.
        kl_k3: mean of r - 1 - log r with r = p / p_ref: the same, never negative, less noisy.
        extreme_ratio_share: share of sampled tokens whose r is above 2 or below 1/2.

    """

    router_mismatch: float
    token_mismatch: float
    logprob_abs_mean: float
    logprob_abs_max: float
    kl_k1: float
    kl_k3: float
    extreme_ratio_share: float


def compare(
    logprobs: Float[np.ndarray, " sampled"],
    reference_logprobs: Float[np.ndarray, " sampled"],
    ids: UInt[np.ndarray, "tokens L k"],
    reference_ids: UInt[np.ndarray, "tokens L k"],
) -> Difference:
    """Compare a pass with the pass that the tokens were sampled in, or with another reference."""
    log_ratio = np.asarray(logprobs, np.float64) - np.asarray(reference_logprobs, np.float64)
    differs = differing_decisions(ids, reference_ids)
    return Difference(
        router_mismatch=float(differs.mean()),
        token_mismatch=float(differs.any(1).mean()),
        logprob_abs_mean=float(np.abs(log_ratio).mean()),
        logprob_abs_max=float(np.abs(log_ratio).max()),
        kl_k1=float(-log_ratio.mean()),
        kl_k3=float((np.expm1(log_ratio) - log_ratio).mean()),
        extreme_ratio_share=float((np.abs(log_ratio) > np.log(EXTREME_RATIO)).mean()),
    )


def differing_decisions(
    ids: UInt[np.ndarray, "tokens L k"], reference_ids: UInt[np.ndarray, "tokens L k"]
) -> Bool[np.ndarray, "tokens L"]:
    """True where the two sets of experts differ; the order of the k slots does not count."""
    return np.asarray((np.sort(ids, -1) != np.sort(reference_ids, -1)).any(-1))
