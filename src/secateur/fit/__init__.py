"""The fit: blocks are pruned and refitted to the dense model, one after the other.

From the whole model to one solve:

1. `loop`: for each block, run the dense stream, fit the block module by module, advance the pruned streams.
   `block_state` has the activations of the dense block, and the tensors and outputs of the pruned block so far.
2. `module`: one module: choose its units, fit its output projection, fit its input projections. `mixture` fits the
   experts of a mixture, each of which is a module.
3. `regression`: the rows of a module and their moments. `target` says what a module is regressed on.
4. `output_projection`, `input_projections`: the solves.

`recovery` says which of these solves a run makes and holds a run's choices, `recoveries` has those that secateur comes
with. `fitted_block` is the result for one block, and `final_norm` scales the last norm afterwards.
"""
