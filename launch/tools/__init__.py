"""Commands beside the pipeline: ablations, sweeps, comparisons. Stages know none of them."""
