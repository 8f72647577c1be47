"""llavolta: train and study vision-language models with fewer visual tokens."""

from llavolta.compression.compressors import (
    AveragePool,
    AveragePool2d,
    AveragePool3d,
    CompressedTokens,
    Compressor,
    Downsample,
    FastV,
    KeepRatio,
    KMeans,
    PruMerge,
    PruMergePlus,
    PyramidDrop,
    RandomDrop,
    VisualTokens,
    keep_tokens,
)
from llavolta.compression.masks import cache_bytes
from llavolta.compression.patch import Compression, compress
from llavolta.compression.plan import PlanError, format_plan, parse_plan, tokens_per_layer
from llavolta.errors import UnsupportedModel
from llavolta.train.projectors import MultiBlockTokenFusion, SpatialTokenFusion, replace_projector
from llavolta.train.schemes import SCHEMES, Scheme, Stage, compression_ratio, plan_compression_ratio

__version__ = "0.1.0"
__all__ = [
    "SCHEMES",
    "AveragePool",
    "AveragePool2d",
    "AveragePool3d",
    "CompressedTokens",
    "Compression",
    "Compressor",
    "Downsample",
    "FastV",
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
    "UnsupportedModel",
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
