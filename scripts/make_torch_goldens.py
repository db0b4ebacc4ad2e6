"""Writes tests/goldens_torch: files of torch.save, for the reader that does not execute them.

    python -m scripts.make_torch_goldens        # needs torch

The values are `tests/test_torch_files.py`'s `TENSORS`. Written with torch 2.14.1.
"""

import argparse
import collections
import pathlib

import numpy as np
import torch

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens_torch"


def main() -> None:
    """Writes the files, in both layouts."""
    base = torch.arange(60.0)
    parameter = torch.nn.Parameter(base[:4].reshape(2, 2))
    parameter.note = "a parameter with attributes is stored in another way"
    state = collections.OrderedDict(
        plain=base.reshape(3, 4, 5),
        transposed=base.reshape(3, 20).T,
        strided=base[7:31:3],
        expanded=torch.tensor([1.0, 2.0])[None].expand(4, 2),
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(5.0),
        half=base[:6].half() / 8,
        bfloat16=base[:6].bfloat16() / 8,
        float8=(base[:6] / 8).to(torch.float8_e4m3fn),
        double=base[:3].double() / 3,
        integers=torch.arange(5),
        unsigned=torch.tensor([1, 65535], dtype=torch.uint16),
        booleans=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(base[:4].reshape(2, 2)),
        noted=parameter,
    )
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    module(torch.ones(1, 1, 2, 2)).sum().backward()
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.step()
    checkpoint = {
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, data=pathlib.Path("data")),
        "best": np.float64(0.5),
        "counts": np.arange(3),
        "epoch": 3,
    }
    OUT.mkdir(exist_ok=True)
    torch.save(checkpoint, OUT / "zip.pth")
    torch.save(checkpoint, OUT / "stream.pth", _use_new_zipfile_serialization=False)
    torch.save(module, OUT / "module.pth")


if __name__ == "__main__":
    main()
