"""Post-training on TRL and mergekit: rows to tokens and masks, SFT, APO, merging."""
