"""Import an installed wheel, call it and print JSON; run by test_wheels.py in its environment."""

import json
import sys
import time

start = time.perf_counter()
import torch  # noqa: E402

torch_seconds = time.perf_counter() - start
start = time.perf_counter()
import llmos_kernels as lk  # noqa: E402

own_seconds = time.perf_counter() - start
x = torch.randn(64, 768)
start = time.perf_counter()
y = lk.layer_norm(x, (768,))
first_call = time.perf_counter() - start
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (768,)))

from llmos_kernels._tools import environment  # noqa: E402
from llmos_kernels.testing import CASES, raw_calls  # noqa: E402

checked = set()
if "opcheck" in sys.argv:
    for case in CASES:
        args = case.make(case.shapes[-1], dtype=torch.float32, requires_grad=True)
        for op, given in raw_calls(case, args):
            if op not in checked:
                torch.library.opcheck(op, given)
                checked.add(op)
owners = {environment.owner(op, "CPU") for op in environment.DEFINED}
print(
    json.dumps(
        {
            "torch": torch.__version__,
            "import torch": torch_seconds,
            "import": own_seconds,
            "first call": first_call,
            "checked": len(checked),
            "reference": owners == {"reference"},
            "file": lk.__file__,
        }
    )
)
