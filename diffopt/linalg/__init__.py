"""Linear algebra of the ground floor: structured symmetric matrices and the saddle-point system."""

from diffopt.linalg.matrices import Dense, Diagonal, DiagonalPlusLowRank, SymmetricMatrix

__all__ = ["Dense", "Diagonal", "DiagonalPlusLowRank", "SymmetricMatrix"]
