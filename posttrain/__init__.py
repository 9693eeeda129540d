"""Post-training with TRL and mergekit: rows to tokens and masks, SFT, APO, merging."""
