"""Compressing visual tokens inside a stock vision-language model: the product, which needs torch and transformers."""
