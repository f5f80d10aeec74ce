"""The names of our merge methods, where everybody who uses mergekit may load them."""

REGMEAN, TSV, EMR = "regmean", "tsv", "emr"
METHODS = (REGMEAN, TSV, EMR)
