"""The mathematics of PAVE, RegMean and TSV on tensors. Nothing here knows mergekit, transformers or the disk."""
