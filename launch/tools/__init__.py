"""Commands beside the pipeline: ablations, sweeps, comparisons. Stages import none of them."""
