"""The oracles: the papers' equations line by line, in any precision up to float64, as slow as they like."""

from simct_kernels.reference.simct import linear_simct_loss, simct_loss, topk_simct_loss

__all__ = ["linear_simct_loss", "simct_loss", "topk_simct_loss"]
