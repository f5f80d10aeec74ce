"""The page that `mergekit-pave report` writes. Its pictures need matplotlib."""
