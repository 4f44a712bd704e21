"""MultiheadAttention agrees with torch's: every argument, output, weight and gradient."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch

from llmos_kernels import nn
from llmos_kernels.ops._product_policy import DIRECTIONS, OURS, override
from llmos_kernels.testing import assert_accurate, make_gradients

# Large enough that the errors of two correct implementations do not differ much by chance.
N, L, S, E, HEADS = 3, 33, 47, 64, 4
#: torch warns if one mask is bool and the other float.
mixed = pytest.mark.filterwarnings("ignore:Support for mismatched")


def pair(dtype=torch.float32, device="cpu", **options):
    """Return our and torch's module with the same random parameters, biases included."""
    theirs = torch.nn.MultiheadAttention(E, HEADS, device=device, dtype=dtype, **options)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.4)
    ours = nn.MultiheadAttention(E, HEADS, device=device, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(module, kind="cross", batched=True, device="cpu"):
    """Return query, key and value: all the same for "self"; key is value for "shared_kv"."""

    def make(length, dim):
        shape = [length] if not batched else [N, length] if module.batch_first else [length, N]
        return torch.randn(*shape, dim, device=device)

    if kind == "self":
        return (make(L, E),) * 3
    if kind == "shared_kv":
        return make(L, E), *(make(S, E),) * 2
    return make(L, E), make(S, module.kdim), make(S, module.vdim)


def mask(kind, *shape, device="cpu"):
    """Return a bool mask, True where masked, or a float mask; no row is fully masked."""
    if kind is None:
        return None
    masked = torch.rand(shape, device=device) < 0.4
    masked[..., 0] = False
    if kind == "bool":
        return masked
    return torch.randn(shape, device=device).masked_fill(masked, float("-inf"))


def results(module, tensors, training=True, **options):
    """Return outputs, and gradients of inputs, masks and parameters, in the module's dtype."""
    dtype = module.out_proj.weight.dtype
    memo = {}

    def leaf(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        if id(t) not in memo:  # A tensor that is passed twice stays one leaf.
            memo[id(t)] = t.detach().to(dtype, copy=True).requires_grad_()
        return memo[id(t)]

    module.train(training)
    options = {k: leaf(v) for k, v in options.items()}
    outputs = [o for o in module(*map(leaf, tensors), **options) if o is not None]
    wanted = {f"leaf {i}": t for i, t in enumerate(memo.values())} | dict(module.named_parameters())
    gradients = [g.to(dtype) for g in make_gradients([o.float() for o in outputs])]
    grads = torch.autograd.grad(outputs, list(wanted.values()), gradients, materialize_grads=True)
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | dict(zip(wanted, grads, strict=True))


def check(ours, theirs, tensors, **options):
    actual = results(ours, tensors, **options)
    eager = results(theirs, tensors, **options)
    exact = results(copy.deepcopy(theirs).double(), tensors, **options)
    assert list(actual) == list(eager)
    for name, value in actual.items():
        assert_accurate(value, exact[name], eager[name], name)
    wide = results(copy.deepcopy(ours).double(), tensors, **options)
    for name, value in wide.items():
        torch.testing.assert_close(value, exact[name], msg=name)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "shared_kv", "cross"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
        {"kdim": 6, "vdim": 9},
        {"kdim": 6, "add_bias_kv": True, "bias": False},
    ],
    ids=str,
)
def test_constructor_arguments(options, kind, batch_first, device):
    if "kdim" in options and kind != "cross":
        pytest.skip("one tensor cannot have two widths")
    ours, theirs = pair(device=device, batch_first=batch_first, **options)
    tensors = inputs(ours, kind, device=device)
    k_len = L if kind == "self" else S
    for need_weights in (False, True):
        masks = {
            "attn_mask": mask("bool", L, k_len, device=device),
            "key_padding_mask": mask("bool", N, k_len, device=device),
        }
        check(ours, theirs, tensors, need_weights=need_weights, **masks)


@mixed
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_masks(training, need_weights, batched, device):
    ours, theirs = pair(device=device)
    tensors = inputs(ours, batched=batched, device=device)
    batch = (N,) if batched else ()
    heads = HEADS * N if batched else HEADS
    kinds = (None, "bool", "float")
    for padding, attn, shape in itertools.product(kinds, kinds, [(), (heads,)]):
        check(
            ours,
            theirs,
            tensors,
            training=training,
            need_weights=need_weights,
            average_attn_weights=attn != "bool",
            key_padding_mask=mask(padding, *batch, S, device=device),
            attn_mask=mask(attn, *shape, L, S, device=device),
        )


@mixed
@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize(
    "kinds", [(a, b) for a in ("bool", "float") for b in ("bool", "float")], ids=str
)
def test_masks_grow_with_the_keys(options, kinds):
    torch.manual_seed(0)
    ours, theirs = pair(**options)
    masks = {"key_padding_mask": mask(kinds[0], N, S), "attn_mask": mask(kinds[1], L, S)}
    for need_weights in (False, True):
        check(ours, theirs, inputs(ours), need_weights=need_weights, **masks)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=str)
def test_is_causal(options, padded, need_weights):
    torch.manual_seed(0)
    ours, theirs = pair(**options)
    tensors = inputs(ours, "self")
    for kind in (torch.bool, torch.float32):
        causal = torch.ones(L, L, dtype=torch.bool).triu(1)
        if kind != torch.bool:
            causal = torch.zeros(L, L).masked_fill(causal, float("-inf"))
        padding = mask("bool", N, L) if padded else None
        padding = causal.new_zeros(N, L) if padded and kind != torch.bool else padding
        call = {"attn_mask": causal, "key_padding_mask": padding, "need_weights": need_weights}
        check(ours, theirs, tensors, is_causal=True, **call)
    with pytest.raises(RuntimeError, match="attn_mask"):
        ours(*tensors, is_causal=True)


def test_fast_path_of_torch():
    """Results agree where torch takes its inference fast path: eval mode without gradients."""
    torch.manual_seed(0)
    ours, theirs = (m.eval() for m in pair(batch_first=True, dropout=0.5))
    (x, *_) = inputs(ours, "self")
    wide = copy.deepcopy(theirs).double()
    modules = ((ours, x), (wide, x.double()), (theirs, x))
    with torch.no_grad():
        for average in (True, False):
            made = [m(t, t, t, average_attn_weights=average) for m, t in modules]
            for name, values in zip(("out", "weights"), zip(*made, strict=True), strict=True):
                assert_accurate(*values, name)
        made = [m(t, t, t, need_weights=False) for m, t in modules]
        assert made[0][1] is made[2][1] is None
        assert_accurate(*(out for out, _ in made), "out")


def test_dropout_in_training_alone(device):
    ours, theirs = pair(device=device, dropout=0.5, batch_first=True)
    x = torch.randn(8, 64, E, device=device)
    _, whole = theirs.eval()(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(ours.eval()(x, x, x, average_attn_weights=False)[1], whole)
    ours.train()
    out, dropped = ours(x, x, x, average_attn_weights=False)
    kept = dropped != 0
    assert abs(kept.float().mean().item() - 0.5) < 0.01
    torch.testing.assert_close(dropped, whole * 2 * kept)
    value = torch.nn.functional.linear(
        x, *(p[-E:] for p in (ours.in_proj_weight, ours.in_proj_bias))
    )
    expected = (
        (dropped @ value.unflatten(-1, (HEADS, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    )
    torch.testing.assert_close(out, ours.out_proj(expected), atol=1e-5, rtol=1e-4)
    first = [torch.manual_seed(3) and ours(x, x, x)[0] for _ in range(2)]
    assert torch.equal(*first) and not torch.equal(ours(x, x, x)[0], first[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_masked_rows_are_zero(kind, need_weights, device):
    ours, _ = pair(device=device, batch_first=True)
    attn_mask = mask(kind, L, S, device=device)
    attn_mask[2] = True if kind == "bool" else float("-inf")
    found = results(
        ours, inputs(ours, device=device), attn_mask=attn_mask, need_weights=need_weights
    )
    assert all(t.isfinite().all() for t in found.values())
    torch.testing.assert_close(found["output 0"][:, 2], ours.out_proj.bias.expand(N, E))
    assert not need_weights or not found["output 1"][:, 2].any()


def test_padding_does_not_leak(device):
    ours, _ = pair(device=device, batch_first=True)
    query, key, value = inputs(ours, device=device)
    padding = torch.zeros(N, S, dtype=torch.bool, device=device)
    padding[:, 4:] = True
    out, _ = ours(query, key, value, padding)
    key[:, 4:] = value[:, 4:] = float("nan")
    assert torch.equal(ours(query, key, value, padding)[0], out)


@pytest.mark.parametrize("batch_first", [False, True])
def test_layout_of_the_output(batch_first):
    ours, _ = pair(batch_first=batch_first)
    for kind in ("self", "cross"):
        out, weights = ours(*inputs(ours, kind))
        assert out.is_contiguous() and weights.is_contiguous()


def test_drop_in():
    ours, theirs = pair(kdim=6, add_bias_kv=True)
    assert inspect.signature(nn.MultiheadAttention) == inspect.signature(
        torch.nn.MultiheadAttention
    )
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    assert isinstance(ours, torch.nn.MultiheadAttention) and repr(ours) == repr(theirs)
    assert set(ours.__dict__) == set(theirs.__dict__)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    tensors = inputs(ours)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(*tensors)[0], ours(*tensors)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    torch.manual_seed(0)
    ours, theirs = pair(dtype, batch_first=True)
    x = torch.randn(N, L, E, dtype=dtype)
    exact = copy.deepcopy(theirs).double()(*[x.double()] * 3)
    for actual, wide, eager in zip(ours(x, x, x), exact, theirs(x, x, x), strict=True):
        assert_accurate(actual, wide, eager, str(dtype))


def test_empty():
    ours, theirs = pair()
    for shape in ((0, N, E), (L, 0, E)):
        x = torch.randn(shape)
        out, weights = ours(x, x, x)
        assert out.shape == x.shape and weights.numel() == 0
    del theirs


def test_errors_are_those_of_torch():
    ours, theirs = pair(batch_first=True)
    q, k, v = inputs(ours)
    wide = torch.randn(N, L, 2 * E)
    calls = [
        ((q[0], k, v), {}),
        ((q[None], k[None], v[None]), {}),
        ((wide, k, v), {}),
        ((q, k, v[:, 1:]), {}),
        ((q[:1], k, v), {}),
        ((q, k, v), {"key_padding_mask": torch.zeros(N, S + 1, dtype=torch.bool)}),
        ((q, k, v), {"key_padding_mask": torch.zeros(N, S, dtype=torch.int64)}),
        ((q, k, v), {"key_padding_mask": torch.zeros(S)}),
        ((q, k, v), {"attn_mask": torch.zeros(L, S + 1)}),
        ((q, k, v), {"attn_mask": torch.zeros(N, L, S)}),
        ((q, k, v), {"attn_mask": torch.zeros(N, HEADS, L, S)}),
        ((q, k, v), {"attn_mask": torch.zeros(L, S, dtype=torch.uint8)}),
        ((q[0], k[0], v[0]), {"attn_mask": torch.zeros(N, L, S)}),
        ((q, k, v), {"is_causal": True}),
    ]
    for args, options in calls:
        with pytest.raises(Exception) as expected:
            theirs(*args, **options)
        with pytest.raises(expected.type) as actual:
            ours(*args, **options)
        assert actual.type is expected.type and str(actual.value)
    with pytest.raises(ValueError, match="1"):
        nn.MultiheadAttention(E, HEADS, dropout=1.0)(q.transpose(0, 1), *[k.transpose(0, 1)] * 2)
    with pytest.raises(ValueError, match="512"):
        nn.MultiheadAttention(512, 1)(*[torch.randn(3, 1, 512)] * 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    torch.manual_seed(0)
    ours, theirs = (m.eval() for m in pair(batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad():
        a, b = (m(x, x, x, need_weights=False)[0] for m in (ours, theirs))
        exact = [theirs.double()(t[None], t[None], t[None])[0][0] for t in x.double().unbind()]
    for mine, other, right in zip(a.unbind(), b.unbind(), exact, strict=True):
        assert_accurate(mine, right, other, "nested")


@pytest.mark.parametrize("kind", ["self", "shared_kv", "cross"])
def test_compile(kind):
    torch.manual_seed(0)
    ours, _ = pair(batch_first=True, add_zero_attn=True)
    tensors = inputs(ours, kind)
    k_len = L if kind == "self" else S
    call = {"attn_mask": mask("bool", L, k_len), "key_padding_mask": mask("bool", N, k_len)}
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with override(dict.fromkeys(DIRECTIONS, OURS)):  # Whatever was measured.
        a, b = (results(f, tensors, need_weights=False, **call) for f in (compiled, ours))
        for name, value in a.items():
            torch.testing.assert_close(value, b[name.removeprefix("_orig_mod.")])
        with torch.no_grad():
            a, b = (f(*tensors, **call) for f in (compiled, ours))
            torch.testing.assert_close(a, b)


def test_inside_torchs_own_layers():
    """It works inside torch's layers, which read its attributes and call it in training."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True)
    swapped = copy.deepcopy(layer)
    swapped.self_attn.__class__ = nn.MultiheadAttention
    x, padding = torch.randn(N, L, E), mask("bool", N, L)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(L)
    for training in (False, True):
        for call in ({"src_key_padding_mask": padding}, {"src_mask": causal, "is_causal": True}):
            a, b = (m.train(training)(x, **call) for m in (swapped, layer))
            torch.testing.assert_close(a, b)
    layer.eval(), swapped.eval()
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), layer(x))
