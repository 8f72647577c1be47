"""Compressors of visual tokens, one method a file. Importing one registers its name."""

from llavolta.compressors.avgpool import AveragePool
from llavolta.compressors.avgpool2d import AveragePool2d
from llavolta.compressors.avgpool3d import AveragePool3d
from llavolta.compressors.base import (
    COMPRESSORS,
    CompressedTokens,
    Compressor,
    KeepRatio,
    VisualTokens,
    keep_tokens,
)
from llavolta.compressors.downsample import Downsample
from llavolta.compressors.fastv import FastV
from llavolta.compressors.kmeans import KMeans
from llavolta.compressors.prumerge import PruMerge, PruMergePlus
from llavolta.compressors.pyramiddrop import PyramidDrop
from llavolta.compressors.random_drop import RandomDrop

__all__ = [
    "COMPRESSORS",
    "AveragePool",
    "AveragePool2d",
    "AveragePool3d",
    "CompressedTokens",
    "Compressor",
    "Downsample",
    "FastV",
    "KMeans",
    "KeepRatio",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "RandomDrop",
    "VisualTokens",
    "keep_tokens",
]
