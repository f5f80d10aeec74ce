"""How this package gets into mergekit.

Everything but `host` is loaded for everybody who uses torch or mergekit, so it is light and may break nothing.
"""
