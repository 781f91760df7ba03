"""SimCT (arXiv 2605.07711), distillation across tokenizers: its losses on logits, or on hidden states and heads."""

from .alm import alm_loss
from .bpm import bpm_loss
from .escd import escd_loss
from .functional import linear_simct_loss, simct_loss, topk_candidate_counts, topk_simct_loss
from .inputs import AlignedUnits, LMHead, SharedVocabulary
from .prefix_tables import PrefixTables
from .statistics import TokenStatistics, candidate_mass, token_statistics
from .uld import uld_loss

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
