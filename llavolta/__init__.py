"""llavolta: train and study vision-language models with fewer visual tokens."""

from llavolta.compressors import AveragePool, CompressedTokens, Compressor, VisualTokens
from llavolta.patch import Compression, compress
from llavolta.plan import PlanError, format_plan, parse_plan, tokens_per_layer
from llavolta.schemes import SCHEMES, Scheme, Stage, compression_ratio, plan_compression_ratio

__version__ = "0.1.0"
__all__ = [
    "SCHEMES",
    "AveragePool",
    "CompressedTokens",
    "Compression",
    "Compressor",
    "PlanError",
    "Scheme",
    "Stage",
    "VisualTokens",
    "compress",
    "compression_ratio",
    "format_plan",
    "parse_plan",
    "plan_compression_ratio",
    "tokens_per_layer",
]
