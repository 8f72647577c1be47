"""Train and study vision-language models with fewer visual tokens.

``compress(model, plan)`` compresses the visual tokens of a Hugging Face model. A plan names a
compressor for each layer. A ``Scheme`` trains with one plan per ``Stage``.
"""

from typing import TYPE_CHECKING

from llavolta.compression.compressors import (
    COMPRESSORS,
    DART,
    PACT,
    AveragePool,
    AveragePool2d,
    AveragePool3d,
    CDPruner,
    ClassAttention,
    CompressedTokens,
    Compressor,
    DivPrune,
    Downsample,
    FastV,
    HoloV,
    KeepRatio,
    KMeans,
    PruMerge,
    PruMergePlus,
    PyramidDrop,
    RandomDrop,
    Restore,
    SparseVLM,
    ToMe,
    VisionZip,
    VisPruner,
    VisualTokens,
    VScan,
    Withdraw,
    keep_tokens,
)
from llavolta.compression.masks import cache_bytes
from llavolta.compression.patch import Compression, compress
from llavolta.compression.plan import PlanError, format_plan, parse_plan, tokens_per_layer
from llavolta.errors import UnsupportedModel
from llavolta.train.projectors import MultiBlockTokenFusion, SpatialTokenFusion, replace_projector
from llavolta.train.schemes import SCHEMES, Scheme, Stage, compression_ratio, plan_compression_ratio

if TYPE_CHECKING:
    from llavolta.train.trainer import StageCallback

__version__ = "0.1.0"
__all__ = [
    "COMPRESSORS",
    "DART",
    "SCHEMES",
    "AveragePool",
    "AveragePool2d",
    "AveragePool3d",
    "CDPruner",
    "ClassAttention",
    "CompressedTokens",
    "Compression",
    "Compressor",
    "DivPrune",
    "Downsample",
    "FastV",
    "HoloV",
    "PACT",
    "Restore",
    "SparseVLM",
    "VScan",
    "Withdraw",
    "KMeans",
    "KeepRatio",
    "MultiBlockTokenFusion",
    "PlanError",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "RandomDrop",
    "Scheme",
    "SpatialTokenFusion",
    "Stage",
    "StageCallback",
    "ToMe",
    "UnsupportedModel",
    "VisPruner",
    "VisionZip",
    "VisualTokens",
    "cache_bytes",
    "compress",
    "compression_ratio",
    "format_plan",
    "keep_tokens",
    "parse_plan",
    "plan_compression_ratio",
    "replace_projector",
    "tokens_per_layer",
]


def __getattr__(name: str):
    """Import StageCallback on first use."""
    if name == "StageCallback":  # it needs transformers' Trainer, which nothing else does
        from llavolta.train.trainer import StageCallback

        return StageCallback
    raise AttributeError(f"module 'llavolta' has no attribute {name!r}")
