"""The matcher for code that is written by hand: finds attention, feed-forwards and norms in graphs.

``matcher.find`` looks for every pattern of ``patterns``, ``site.insert`` puts a fused call in the
place of a match. Both work on a graph of torch.fx, wherever that comes from.
"""
