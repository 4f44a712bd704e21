"""Package a swapped sentence encoder for a C++ program without Python.

    python package.py FOLDER [LAYERS]

writes to the folder: the model compiled by AOTInductor, inputs with the result of Python,
the schemas of the ops, and the paths of the libraries that have them.
"""

import sys
from pathlib import Path

import torch
from torch.export import Dim, export
from transformers import BertConfig, BertModel

import llmos_kernels as lk


class Encoder(torch.nn.Module):
    """BERT and the mean over the tokens that are no padding."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        # The architecture of all-MiniLM-L6-v2, with random weights.
        config = BertConfig(hidden_size=384, num_hidden_layers=layers, intermediate_size=1536)
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.bert(ids, attention_mask=mask).last_hidden_state
        shown = mask[..., None].to(states.dtype)
        return (states * shown).sum(1) / shown.sum(1)


def inputs(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and a mask that is 0 at the end of every other sentence."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[::2, length // 2 :] = 0
    return torch.randint(30000, (batch, length)), mask


def main(folder: Path, layers: int = 6) -> None:
    """Write the package and all that ``main.cpp`` reads."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = Encoder(layers).eval()
    print(lk.optimize(model, inputs=inputs(4, 32)))
    with torch.no_grad():
        sizes = {0: Dim("batch", max=512), 1: Dim("length", max=512)}
        program = export(model, inputs(4, 32), dynamic_shapes=(sizes, sizes))
        program = program.run_decompositions(lk.native_decompositions())
        ours = {n.target for n in program.graph.nodes if "llmos" in str(n.target)}
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        given = inputs(3, 77)
        tensors = {"ids": given[0], "mask": given[1], "expected": model(*given)}
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pt")
    schemas = sorted(str(op._schema).partition("::")[2] for op in ours)
    (folder / "schemas.txt").write_text("\n".join(schemas) + "\n")
    library = Path(lk.__file__).with_name("_ops_cpu.so")
    (folder / "libraries.txt").write_text(f"{library}\n")
    print(f"{len(ours)} ops of llmos_kernels in {folder / 'model.pt2'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
