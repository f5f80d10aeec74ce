"""The page that `mergekit-pave report` writes: names -> places, measurements, plots, HTML."""
