"""Compression of visual tokens inside stock vision-language models, with torch and transformers."""
