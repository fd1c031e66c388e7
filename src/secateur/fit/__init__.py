"""The fit: blocks are pruned and refitted to the dense model, one after the other.

From the whole model to one solve:

1. `loop`: for each block, run the dense stream, fit the block, advance the pruned streams.
2. `block`: one fit of one block, module by module. `dense_block` holds what the dense block computes, `block_state`
   what the pruned block holds so far. `mixture` fits the experts of a mixture, each of which is a module.
3. `module`: one module: choose its units, fit its output projection, fit its input projections.
4. `regression`: the rows of a module and their moments. `target` says what a module is regressed on.
5. `output_projection`, `input_projections`: the solves.

`recovery` says which of these solves a run makes and holds a run's choices, `recoveries` has those that secateur comes
with. `fitted_block` is the result for one block, and `final_norm` scales the last norm afterwards.
"""
