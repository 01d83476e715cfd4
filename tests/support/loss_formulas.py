"""What losses of a row are, written out."""

import torch


def plain_acceptance(kind, p_RW, q_RW, decay=10.0):
    """The formulas, of probabilities; p may sum to less than 1."""
    alpha_R = torch.minimum(p_RW, q_RW).sum(-1)
    if kind == "tv":
        return 1 - alpha_R
    if kind == "nla":
        return -alpha_R.log()
    reach_R1 = p_RW.sum(-1, keepdim=True)
    kl_R = reach_R1[:, 0] * (p_RW / reach_R1 * (p_RW / reach_R1 / q_RW).log()).sum(-1)
    share_R = (-decay * alpha_R).exp().detach()
    return share_R * kl_R - (1 - share_R) * alpha_R.log()
