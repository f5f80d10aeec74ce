"""The names of our merge methods, where everybody who uses mergekit may load them."""

REGMEAN, TSV = "regmean", "tsv"
METHODS = (REGMEAN, TSV)
