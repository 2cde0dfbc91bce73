"""The text-guided contrastive loss: normalised image features against the class prompts (TeCoA, Mao et al. 2023).

    s_k = scale · cos(z, w_k)                       logits over all K class prompts
    cross-entropy  L = −log softmax(s)_y            what the update minimises
    log-odds       m = log Σ_{j≠y} exp(s_j) − s_y   what the attack ascends; L = log(1 + exp(m))

Both have the same gradient direction in exact arithmetic, ∂L = sigmoid(m)·∂m. In floating point they do not: for an
image that CLIP is sure of, ∂L is (p_y − 1)·w_y + Σ p_j·w_j with every coefficient rounding to 0, and the attack is
handed zeros or noise. ∂m keeps its size, because it never forms p_y. These are the PyTorch references.
"""
import torch
import torch.nn.functional as F


def cosine_logits(z, head, scale):
    """scale · cos(z, w_k): fp32 [B, K] from features z [B, D] of any length and a head of unit rows [K, D]."""
    return scale * F.normalize(z.float(), dim=-1) @ head.float().T


def log_odds(logits, y):
    """m = logsumexp over the wrong classes − s_y: [B] from logits [B, K] and labels y int64 [B]. m > 0 if p_y < ½."""
    wrong = torch.zeros_like(logits).scatter(1, y[:, None], float("-inf"))
    return (logits + wrong).logsumexp(1) - logits.gather(1, y[:, None]).squeeze(1)


def contrastive_loss(z, head, y, scale):
    """Cross-entropy of each image with its class prompt: fp32 [B]. Mao et al.'s TeCoA loss."""
    return F.cross_entropy(cosine_logits(z, head, scale), y, reduction="none")


def contrastive_log_odds(z, head, y, scale):
    """Log-odds of each image against its class prompt: fp32 [B]. What the attack on `contrastive_loss` ascends."""
    return log_odds(cosine_logits(z, head, scale), y)
