"""SimCT (arXiv 2605.07711), distillation across tokenizers: its losses on logits, or on hidden states and heads."""

from simct_kernels.functional import linear_simct_loss, simct_loss, topk_candidate_counts, topk_simct_loss
from simct_kernels.inputs import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.objectives.alm import alm_loss
from simct_kernels.objectives.bpm import bpm_loss
from simct_kernels.objectives.escd import escd_loss
from simct_kernels.objectives.prefix_tables import PrefixTables
from simct_kernels.objectives.uld import uld_loss
from simct_kernels.statistics import TokenStatistics, candidate_mass, token_statistics

__all__ = [
    "AlignedUnits",
    "LMHead",
    "PrefixTables",
    "SharedVocabulary",
    "TokenStatistics",
    "alm_loss",
    "bpm_loss",
    "candidate_mass",
    "escd_loss",
    "linear_simct_loss",
    "simct_loss",
    "token_statistics",
    "topk_candidate_counts",
    "topk_simct_loss",
    "uld_loss",
]
