"""The rooms of compute_fisher.py: settings, prompts, files, scores, pictures. Its results are read with

from pipeline import load_fisher_matrices
"""

from pipeline.store import FisherMatrices, Triplets, load_fisher_matrices

__all__ = ["FisherMatrices", "Triplets", "load_fisher_matrices"]
