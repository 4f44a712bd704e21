"""The rewriting of graphs as a pass of inductor, with the key for its cache.

It imports inductor, and is imported when a pass is asked for.
"""

import hashlib
from pathlib import Path

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from llmos_kernels.integrations.compile.rewriting import rewrite


class CompilePass(CustomGraphPass):
    """Rewrites graphs inside of inductor: a value for ``pre_grad_custom_pass``."""

    def __call__(self, graph: Graph) -> None:
        """Put fused calls into ``graph``."""
        gm = graph.owning_module
        if gm is not None:
            rewrite(gm)

    def uuid(self) -> str:
        """Return the key under which inductor caches what this pass has made."""
        package = Path(__file__).parents[2]
        sources = [*(package / "graph").rglob("*.py"), Path(__file__).with_name("rewriting.py")]
        digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(sources)))
        return f"llmos_kernels {digest.hexdigest()}"
