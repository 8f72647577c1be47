"""Compressors of visual tokens, one method a file. Importing one registers its name."""

from llavolta.compressors.avgpool import AveragePool
from llavolta.compressors.base import COMPRESSORS, CompressedTokens, Compressor, VisualTokens

__all__ = ["COMPRESSORS", "AveragePool", "CompressedTokens", "Compressor", "VisualTokens"]
