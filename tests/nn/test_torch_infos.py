"""torch's own samples of its functions and modules, OpInfo and ModuleInfo, run with ours.

torch tests itself with them. Outputs and gradients are compared by the error budget, in float64 by
torch's tolerances. Calls beyond these samples that torch refuses are in
``tests/ops/test_errors.py``.
"""

import copy

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

import llmos_kernels as lk
from llmos_kernels._core import numerics
from llmos_kernels.testing import assert_errors_within_budget, make_gradients

FUNCTIONS = {
    "nn.functional.layer_norm": lk.layer_norm,
    "nn.functional.linear": lk.linear,
    "nn.functional.rms_norm": lk.rms_norm,
    "nn.functional.scaled_dot_product_attention": lk.scaled_dot_product_attention,
}
#: OpInfos with calls that raise, and how many there are.
ERRORS = {"native_layer_norm": (lk.layer_norm, 4), "nn.functional.rms_norm": (lk.rms_norm, 3)}
CLASSES = {
    torch.nn.LayerNorm: lk.nn.LayerNorm,
    torch.nn.Linear: lk.nn.Linear,
    torch.nn.MultiheadAttention: lk.nn.MultiheadAttention,
    torch.nn.RMSNorm: lk.nn.RMSNorm,
    torch.nn.TransformerDecoderLayer: lk.nn.TransformerDecoderLayer,
    torch.nn.TransformerEncoderLayer: lk.nn.TransformerEncoderLayer,
}
#: Modules of which we have the parts alone.
WHOLES = (torch.nn.Transformer, torch.nn.TransformerEncoder)
pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors"
)
#: Those with relu.
LAYERS = (*WHOLES, torch.nn.TransformerDecoderLayer, torch.nn.TransformerEncoderLayer)
#: The largest error over budget of one sample.
ALONE = 16
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


@pytest.fixture(scope="module")
def infos():
    """Return OpInfos by name and ModuleInfos by class; importing them takes seconds."""
    import hypothesis
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    # What the import changed for the tests that follow in this process.
    torch.backends.__allow_nonbracketed_mutation_flag = True
    hypothesis.settings.load_profile("default")
    ops = {op.name: op for op in op_db if not op.variant_test_name}
    return ops, {info.module_cls: info for info in module_db}


def as_leaves(arguments, dtype):
    """Return the arguments with new leaves for the floating-point tensors; one tensor stays one."""
    made = {}

    def leaf(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        if id(t) not in made:
            made[id(t)] = t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
        return made[id(t)]

    return tree_map(leaf, arguments)


def results(function, args, kwargs, dtype, parameters=(), gradients=True):
    """Return outputs and gradients by name; ``parameters`` are leaves beside the arguments."""
    args, kwargs = as_leaves((args, kwargs), dtype)
    outputs = [o for o in tree_flatten(function(*args, **kwargs))[0] if o is not None]
    leaves = {f"argument {i}": t for i, t in enumerate(tree_flatten((args, kwargs))[0])}
    leaves |= dict(parameters)
    leaves = {k: t for k, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if not gradients or not any(o.requires_grad for o in outputs):
        return found
    grads = torch.autograd.grad(
        outputs, leaves.values(), make_gradients(outputs), materialize_grads=True
    )
    return found | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}


class Judge:
    """Compares samples with torch: each alone by ``ALONE``, all together by the error budget.

    Of a sample of some ten numbers the ratio of two errors is a matter of luck: 4.6 was seen.
    """

    def __init__(self, dtype):
        self.dtype = dtype
        self.errors = {"output": [], "gradient": []}

    def sample(self, ours, theirs, exact, what):
        """Compare the results of one sample, by name; ``exact`` are torch's in float64."""
        assert ours.keys() == theirs.keys(), what
        if self.dtype == torch.float64:
            torch.testing.assert_close(ours, theirs, msg=lambda message: f"{what}: {message}")
            return
        errors = numerics.errors_in_ulp({k: (t, exact[k], theirs[k]) for k, t in ours.items()})
        for name, error in errors.items():
            over = numerics.over_budgets([{name: error}])[name]
            assert over <= ALONE, f"{what}, {name}: error over budget {over:.3g}"
            self.errors[name.split()[0]].append({name.split()[0]: error})

    def all(self):
        """Assert the error budget of all samples together."""
        for kind, errors in self.errors.items():
            assert_errors_within_budget(errors, f"{len(errors)} of {kind}")


@each_dtype
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, dtype, infos):
    """Each sample of the OpInfo gives torch's output and gradients."""
    op, ours = infos[0][name], FUNCTIONS[name]
    count, judge = 0, Judge(dtype)
    for count, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=True), 1):
        args, kwargs = (sample.input, *sample.args), sample.kwargs
        if kwargs.get("dropout_p"):  # Each has random numbers of its own.
            for function in (ours, op.op):
                shape = function(*args, **kwargs).shape
                assert shape == function(*args, **kwargs | {"dropout_p": 0.0}).shape
            continue
        actual, eager = (results(f, args, kwargs, dtype) for f in (ours, op.op))
        exact = results(op.op, args, kwargs, torch.float64)
        judge.sample(actual, eager, exact, f"sample {count}, {sample.summary()}")
    assert count > 5
    judge.all()


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_functions(name, infos):
    """Each call that the OpInfo says to raise does, with an error of torch's class."""
    ours, count = ERRORS[name]
    samples = list(infos[0][name].error_inputs("cpu"))
    assert len(samples) >= count
    for error in samples:
        sample = error.sample_input
        for function in (infos[0][name].op, ours):
            with pytest.raises(error.error_type):
                function(sample.input, *sample.args, **sample.kwargs)


def swapped(theirs):
    """Return a copy with the class of ours in place of each that we have."""
    ours = copy.deepcopy(theirs)
    for module in ours.modules():
        module.__class__ = CLASSES.get(type(module), type(module))
    return ours


def built(cls, sample, dtype):
    """Return torch's module for a sample and ours, with the same random parameters."""
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    theirs = cls(*args, **kwargs).to(dtype)
    if cls in WHOLES:
        return theirs, swapped(theirs)
    ours = CLASSES[cls](*args, **kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@each_dtype
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("cls", [*CLASSES, *WHOLES], ids=lambda cls: cls.__name__)
def test_modules(cls, training, dtype, infos, one_thread):
    """Each sample of the ModuleInfo gives torch's output and gradients, of parameters too."""
    info = infos[1][cls]
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    assert len(samples) > 2
    judge = Judge(dtype)
    # In 16 bits a pre-activation near 0 may round to either side, where relu's gradient jumps.
    gradients = dtype != torch.bfloat16 or not issubclass(cls, LAYERS)
    for i, sample in enumerate(samples):
        theirs, ours = (m.train(training) for m in built(cls, sample, dtype))
        wide = copy.deepcopy(theirs).double()
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        actual, eager, exact = (
            results(m, args, kwargs, d, m.named_parameters(), gradients)
            for m, d in ((ours, dtype), (theirs, dtype), (wide, torch.float64))
        )
        judge.sample(actual, eager, exact, f"sample {i}, {sample.desc or kwargs}")
    judge.all()
