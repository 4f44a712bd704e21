"""``torch.compile(model, backend="llmos")``, and the same rewriting for inductor alone.

    torch.compile(model, backend="llmos", options={"then": "inductor"})

Dynamo's graph of the forward is searched by the matcher of ``llmos_kernels.graph``; what it finds
becomes calls of this package's public functions, which carry their gradients. The graph that comes
out is proved on the example inputs and handed to the backend ``then``.
"""
