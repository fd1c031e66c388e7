"""The fit: blocks are pruned and refitted to the dense model, one after the other.

From the whole model to one solve:

1. `loop`: for each block, run the dense stream, fit the block, advance the pruned streams.
2. `block`: one fit of one block, stage by stage. `dense_block` holds what the dense block computes, `block_state` what
   the pruned block holds so far.
3. `stage`, `mixture_stage`: one stage, which is an attention, a feed-forward or a mixture of experts.
4. `module`: one module: choose its units, fit its output projection, fit its input projections.
5. `regression`: the rows of a module's regression; `block_regression` and `expert_regression` are its two kinds.
   `target` says what a module is regressed on.
6. `output_projection`, `input_projections`: the solves.

`recovery` says which of these solves a run makes, `method` holds a run's choices. `fitted_block` is the result for one
block, and `final_norm` scales the last norm afterwards.
"""
