"""Collect the compressors of visual tokens, one method per file.

Importing a method's file registers its name in ``COMPRESSORS``.
"""

from llavolta.compression.compressors.avgpool import AveragePool
from llavolta.compression.compressors.avgpool2d import AveragePool2d
from llavolta.compression.compressors.avgpool3d import AveragePool3d
from llavolta.compression.compressors.base import (
    COMPRESSORS,
    CompressedTokens,
    Compressor,
    KeepRatio,
    VisualTokens,
    keep_tokens,
)
from llavolta.compression.compressors.cdpruner import CDPruner
from llavolta.compression.compressors.cls import ClassAttention
from llavolta.compression.compressors.dart import DART
from llavolta.compression.compressors.divprune import DivPrune
from llavolta.compression.compressors.downsample import Downsample
from llavolta.compression.compressors.fastv import FastV
from llavolta.compression.compressors.holov import HoloV
from llavolta.compression.compressors.kmeans import KMeans
from llavolta.compression.compressors.pact import PACT
from llavolta.compression.compressors.prumerge import PruMerge, PruMergePlus
from llavolta.compression.compressors.pyramiddrop import PyramidDrop
from llavolta.compression.compressors.random_drop import RandomDrop
from llavolta.compression.compressors.restore import Restore
from llavolta.compression.compressors.sparsevlm import SparseVLM
from llavolta.compression.compressors.tome import ToMe
from llavolta.compression.compressors.visionzip import VisionZip
from llavolta.compression.compressors.vispruner import VisPruner
from llavolta.compression.compressors.vscan import VScan
from llavolta.compression.compressors.withdraw import Withdraw

__all__ = [
    "VScan",
    "SparseVLM",
    "Restore",
    "PACT",
    "HoloV",
    "COMPRESSORS",
    "DART",
    "AveragePool",
    "AveragePool2d",
    "AveragePool3d",
    "CDPruner",
    "ClassAttention",
    "CompressedTokens",
    "Compressor",
    "DivPrune",
    "Downsample",
    "FastV",
    "KMeans",
    "KeepRatio",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "RandomDrop",
    "ToMe",
    "VisPruner",
    "VisionZip",
    "VisualTokens",
    "Withdraw",
    "keep_tokens",
]
