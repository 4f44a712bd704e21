"""``optimize(freeze_weights=True)``: the same results from packed copies, until training."""

import copy
import pickle

import pytest
import torch
from torch import nn

import llmos_kernels as lk
from llmos_kernels.nn.frozen import panels_of
from llmos_kernels.testing import OpRecorder

pytestmark = pytest.mark.usefixtures("our_forward")


def encoder(kind):
    """Return a model in eval mode, and its input."""
    torch.manual_seed(0)
    if kind == "torch":
        layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, activation="gelu")
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return model.eval(), (torch.randn(2, 9, 64),)
    bert = pytest.importorskip("transformers.models").bert
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = bert.BertConfig(vocab_size=99, num_hidden_layers=2, **sizes)
    return bert.BertModel(config).eval(), (torch.arange(18).view(2, 9),)


def run(model, given):
    with torch.no_grad():
        out = model(*given)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def reads_copies(model, given):
    """Return whether every layer of ``model`` reads copies of its weights."""
    with OpRecorder() as record:
        run(model, given)
    calls = [args for op, args in record.calls if op.name() == "llmos::encoder_layer"]
    read = {bool(args[-1]) for args in calls}
    assert len(calls) == 2 and len(read) == 1
    return read == {True}


def frozen(kind):
    """Return a model that is swapped, one that is frozen too, an input, and the report."""
    model, given = encoder(kind)
    plain = copy.deepcopy(model)
    lk.optimize(plain, verify=False)
    report = lk.optimize(model, verify=False, freeze_weights=True)
    return plain, model, given, report


each_kind = pytest.mark.parametrize("kind", ["torch", "bert"])


@each_kind
def test_same_bits_and_report(kind):
    plain, model, given, report = frozen(kind)
    assert reads_copies(model, given) and not reads_copies(plain, given)
    assert torch.equal(run(model, given), run(plain, given))
    assert report.frozen_weights == {"torch": 8, "bert": 12}[kind]
    assert report.frozen_bytes >= 4 * 2 * (4 * 64 * 64 + 2 * 64 * 96)
    mib = report.frozen_bytes / 2**20
    line = f"packed copies of {report.frozen_weights} weights: {mib:.1f} MiB"
    assert line in str(report) and line in report.details()


@each_kind
def test_writes(kind):
    plain, model, given, _ = frozen(kind)
    for m in (plain, model):
        torch.manual_seed(1)
        with torch.no_grad():
            for p in m.parameters():
                p.add_(torch.randn_like(p) / 8)
    assert torch.equal(run(model, given), run(plain, given))
    other = encoder(kind)[0].state_dict()
    for m in (plain, model):
        m.load_state_dict(other)
    assert torch.equal(run(model, given), run(plain, given))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_an_optimizer(fused):
    plain, model, given, _ = frozen("torch")
    for m in (plain, model):
        optimizer = torch.optim.Adam(m.parameters(), lr=0.1, fused=fused)
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(run(model, given), run(plain, given)) and reads_copies(model, given)


@each_kind
def test_a_write_past_torch_is_not_seen(kind):
    _, model, given, _ = frozen(kind)
    before = run(model, given)
    first = next(m for n, m in model.named_modules() if n.endswith(("linear1", "mediate.dense")))
    first.weight.data.add_(1)
    assert torch.equal(run(model, given), before), "documented: the copy is of before"
    model.train().eval()
    assert not torch.equal(run(model, given), before)


@each_kind
def test_train_and_restore_drop_the_copies(kind):
    _, model, given, _ = frozen(kind)
    model.eval()
    assert reads_copies(model, given)
    model.train()
    assert not any(map(panels_of, model.modules()))
    assert not reads_copies(model.eval(), given)
    _, model, given, _ = frozen(kind)
    lk.restore(model)
    assert not any(map(panels_of, model.modules()))


@each_kind
def test_copies_of_the_model_are_not_frozen(kind):
    plain, model, given, _ = frozen(kind)
    assert vars(model).keys() == vars(plain).keys()
    assert model.state_dict().keys() == plain.state_dict().keys()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not reads_copies(other, given)
        assert torch.equal(run(other, given), run(model, given))


def test_other_dtypes_and_parts():
    _, model, given, _ = frozen("torch")
    half = model.bfloat16()
    assert run(half, (given[0].bfloat16(),)).dtype == torch.bfloat16
    assert reads_copies(half, (given[0].bfloat16(),))
    model, given = encoder("torch")
    model.layers[0].linear1.register_forward_hook(lambda *args: None)
    report = lk.optimize(model, verify=False, freeze_weights=True)
    assert report.frozen_weights == 4, "a layer that calls its parts reads no copies"


def test_wrong_calls():
    model, _ = encoder("torch")
    with pytest.raises(TypeError, match="freeze_weights must be a bool, got 'yes'"):
        lk.optimize(model, freeze_weights="yes")
    with pytest.raises(ValueError, match="the model is in train mode"):
        lk.optimize(model.train(), freeze_weights=True)
    assert type(model.layers[0]) is nn.TransformerEncoderLayer


def test_verified_swap():
    model, given = encoder("torch")
    expected = run(model, given)
    report = lk.optimize(model, inputs=given, always=True, freeze_weights=True)
    assert report.frozen_weights == 8
    torch.testing.assert_close(run(model, given), expected)


@pytest.mark.parametrize("options", [{"batch_first": False}, {"heads": 1, "d": 300}])
def test_no_copies_that_are_not_read(options):
    heads, d = options.pop("heads", 4), options.pop("d", 64)
    layer = nn.TransformerEncoderLayer(d, heads, 96, **{"batch_first": True, **options})
    report = lk.optimize(layer.eval(), verify=False, always=True, freeze_weights=True)
    assert report.frozen_weights == report.frozen_bytes == 0
    assert "no packed copies: no encoder layer runs as one op" in str(report)
