"""Float64 tensors of a device without float64 are on the CPU; `meta` stands for the device."""

import torch

from secateur.base.without_float64 import SumsOnCpu


def test_tensors_move_where_float64_begins_and_stay_elsewhere():
    there, here = torch.ones(3, device="meta"), torch.ones(3)
    with SumsOnCpu("meta"):
        created = torch.zeros(3, dtype=torch.float64, device="meta")
        assert (created.device.type, created.dtype) == ("cpu", torch.float64)
        assert created.to("meta").device.type == "cpu"
        assert created.to("meta", torch.float32).device.type == "meta"
        assert here.to("meta", torch.float64).device.type == "cpu"
        assert (there + there).device.type == (there * torch.tensor(2.0)).device.type == "meta"
        # What is changed, or read at indices, stays where it is.
        there += here
        there[:1] = created[:1]
        assert there.device.type == there[torch.tensor([0])].device.type == "meta"
        assert here.double().device.type == "cpu"
