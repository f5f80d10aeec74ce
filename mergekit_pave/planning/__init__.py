"""From a merge as mergekit has planned it to the tasks that purify it. `make` has the steps, in this order:

    merge         a merge as mergekit has planned it
    source        one model of it: its files and its architecture
    checks        whether the merge can be made at all
    select        which weights are purified, and why each other tensor is not
    closed_form   which weights regmean merges in closed form
    samples       the samples of one model: of its data, or what it writes itself
    calibration   what each model is calibrated with, and the cache entries that follow from that
    unchanged     weights that equal the base model's, or that calibration does not reach
    chain         the tasks for each output tensor
    warnings      what should make a user look twice
    plan          the result; `preview` shows it, and `measured` measures it for the page

`variants` makes several configs of one, for `mergekit-pave tune`.

Planning reads configurations, tokenizers, samples and the headers of weights, so that every mistake in the `pave:` block shows
before any work. Only `unchanged` may read weights, mostly their first rows, and only when all else is in order; and with
`data: generated` a model whose text is not in the cache writes it in `samples`, unless the command only plans.
"""
