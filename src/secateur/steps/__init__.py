"""The steps of the data's way, one file each: survey, plan, refit, slice, write; `prune` runs them all."""
