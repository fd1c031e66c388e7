"""Pruned folders exported as graphs compute in ONNX Runtime, OpenVINO and ExecuTorch what transformers computes."""

from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn

from conftest import IDS, LLAMA, MIXTURE, load, logits
from models import relative

NAMES = {"input_names": ["input_ids"], "output_names": ["logits"]}
SIZES = {"input_ids": {0: torch.export.Dim("rows"), 1: torch.export.Dim("length")}}
# Each export takes half a minute.
EXPORTED = [(LLAMA, "hf"), (MIXTURE, "stock")]


class Logits(nn.Module):
    """Token ids in, logits out; nothing is cached."""

    def __init__(self, folder: Path):
        super().__init__()
        # Only this implementation of experts can be exported.
        self.model = load(folder, experts_implementation="batched_mm")

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("case", EXPORTED, ids="-".join)
def test_onnx_runtime_and_openvino_compute_the_same(folders, case, tmp_path):
    file, expected = str(tmp_path / "model.onnx"), logits(load(folders(case)))
    model = Logits(folders(case)).eval()
    torch.onnx.export(model, (IDS,), file, dynamo=True, dynamic_shapes=SIZES, verbose=False, **NAMES)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    exact: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(file, "CPU", exact)
    # Another number of rows and another length, too.
    for ids, meant in ((IDS, expected), (IDS[:1, :7], expected[:1, :7])):
        assert relative(torch.tensor(session.run(None, {"input_ids": ids.numpy()})[0]), meant) < 1e-5
        assert relative(torch.tensor(compiled({"input_ids": ids.numpy()})[0]), meant) < 1e-5


@pytest.mark.parametrize("case", EXPORTED, ids="-".join)
def test_executorch_computes_the_same(folders, case, tmp_path):
    graph = torch.export.export(Logits(folders(case)).eval(), (IDS,))
    program = to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()]).to_executorch()
    (tmp_path / "model.pte").write_bytes(program.buffer)
    forward = Runtime.get().load_program(str(tmp_path / "model.pte")).load_method("forward")
    (found,) = forward.execute([IDS])
    assert relative(found, logits(load(folders(case)))) < 1e-5
