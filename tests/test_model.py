"""The model against formulas worked by hand and against torch's own modules."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPONENTS, make_model, to_transformers
from torch import nn

import model as parts
from config import ARCHS, GPTConfig
from model import GPT, MLPS, NORMS, POSITIONS, AttentionContext, Block
from sampling.quantize import lower_precision


def causal_mask(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def config(**settings: object) -> GPTConfig:
    defaults = {"vocab_size": 11, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return GPTConfig(**{**defaults, **settings})


def test_queries_and_keys_have_the_norm_of_the_model():
    attention, x = parts.Attention(config(norm="layernorm")), torch.randn(3, 8)
    for norm in (attention.q_norm, attention.k_norm):
        assert torch.allclose(norm(x), torch.nn.functional.layer_norm(x, (8,)), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", [0.0, 0.0, 2.0]),
        ("relu2", [0.0, 0.0, 4.0]),
        ("silu", [-1 / (1 + math.e), 0.0, 2 / (1 + math.exp(-2))]),
        # 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), Hendrycks and Gimpel 2016
        ("gelu", [-0.158808, 0.0, 1.954598]),
    ],
)
def test_activations_by_hand(name: str, expected: list[float]):
    mlp = MLPS[name](config())
    assert torch.allclose(mlp.activation(torch.tensor([-1.0, 0.0, 2.0])), torch.tensor(expected))


def test_sinusoidal_positions_follow_the_paper():
    pos = POSITIONS["sinusoidal"](config(n_embd=4, n_head=1))
    out, rotation = pos(torch.zeros(1, 3, 4), torch.arange(3))
    t = 2  # PE(t, 2i) = sin(t / 10000^(2i/C)), PE(t, 2i+1) = cos of the same
    expected = [math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)]
    assert torch.allclose(out[0, t], torch.tensor(expected)) and rotation is None
    out, _ = pos(torch.ones(1, 1, 4), torch.arange(1))  # section 3.4: embeddings times sqrt(C)
    assert torch.allclose(out[0, 0], torch.tensor([2.0, 3.0, 2.0, 3.0]))


def test_rope_turns_by_one_radian_a_position_in_the_fastest_pair():
    rope = POSITIONS["rope"](config(n_embd=4, n_head=1))
    _, (cos, sin) = rope(torch.zeros(1, 3, 4), torch.arange(3))
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 3, 4)  # pairs (0, 2) and (1, 3)
    expected = [math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]  # 1 and 1/100 a position
    assert torch.allclose(parts.rotate(x, cos, sin)[0, 0, 2], torch.tensor(expected))


def test_token_shift_takes_half_of_the_channels_from_the_token_before():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]]])
    expected = [[1.0, 2.0, 0.0, 0.0], [5.0, 6.0, 3.0, 4.0], [9.0, 10.0, 7.0, 8.0]]
    first = torch.zeros(1, 1, 2)
    assert parts.shift_tokens(x, first)[0].tolist() == expected
    mask = parts.document_mask(torch.tensor([[0, 1, 1]]))  # the second token begins a document
    expected[1][2:] = [0.0, 0.0]
    assert parts.shift_tokens(x, first, mask)[0].tolist() == expected
    assert parts.shift_tokens(x, first + 9)[0, 0].tolist() == [1.0, 2.0, 9.0, 9.0]


@pytest.mark.parametrize("post_norm", [False, True])
def test_block_equals_torch_transformer_layer(post_norm: bool):
    torch.manual_seed(0)
    settings = {"norm": "layernorm", "mlp": "relu", "pos": "learned", "post_norm": post_norm}
    ours = Block(config(**settings, qk_norm=False, bias=True))
    theirs = nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="relu", norm_first=not post_norm, batch_first=True
    )
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    attn = theirs.self_attn
    attn.in_proj_weight.data = ours.attn.qkv.weight.data
    attn.in_proj_bias.data = ours.attn.qkv.bias.data
    attn.out_proj.load_state_dict(ours.attn.proj.state_dict())
    for mine, other in (
        (ours.norm1, theirs.norm1),
        (ours.norm2, theirs.norm2),
        (ours.mlp.fc, theirs.linear1),
        (ours.mlp.proj, theirs.linear2),
    ):
        other.load_state_dict(mine.state_dict())
    x = torch.randn(3, 7, 16)
    expected = theirs(x, src_mask=causal_mask(7), is_causal=True)
    assert torch.allclose(ours(x, AttentionContext()), expected, atol=1e-5)


@pytest.mark.parametrize("settings", COMPONENTS)
def test_fused_attention_equals_plain_attention(settings: dict):
    model = make_model(**settings, n_layer=3)
    idx = torch.randint(11, (2, 12))
    maps: list[torch.Tensor] = []
    plain, _ = model(idx, maps=maps)
    assert torch.allclose(model(idx)[0], plain, atol=1e-4)
    H = model.config.n_head
    assert [m.shape for m in maps] == [(2, H, 12, 12)] * 3
    assert all(torch.allclose(m.sum(-1), torch.ones(2, H, 12)) for m in maps)
    assert all(m[..., causal_mask(12)].eq(0).all() for m in maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_visible_keys_is_zero(dtype: torch.dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4).to(dtype).requires_grad_().unbind()
    visible = parts.document_mask(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])).clone()
    visible[0, 0, 3] = False
    visible[1] = False
    out, weights = parts.plain_attention(q, k, v, visible)
    fused = parts.fused_attention(q, k, v, visible)
    expected = torch.ones(2, 2, 5, dtype=dtype)
    expected[0, :, 3], expected[1] = 0, 0
    assert torch.allclose(weights.sum(dim=-1), expected, atol=1e-2)
    assert out[1].eq(0).all() and out[0, :, 3].eq(0).all()
    assert torch.allclose(fused.float(), out.float(), atol=1e-2 if dtype != torch.float32 else 1e-6)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.isfinite().all()


def test_attention_follows_the_formula():
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    scores = q @ k.transpose(-2, -1) / math.sqrt(4)
    weights = scores.masked_fill(causal_mask(5), float("-inf")).softmax(-1)
    out, plain_weights = parts.plain_attention(q, k, v)
    assert torch.allclose(plain_weights, weights, atol=1e-6)
    assert torch.allclose(out, weights @ v, atol=1e-6)
    assert torch.allclose(parts.fused_attention(q, k, v), weights @ v, atol=1e-6)
    last = parts.fused_attention(q[:, :, 4:], k, v)  # one query, as with a cache
    assert torch.allclose(last, (weights @ v)[:, :, 4:], atol=1e-6)
    visible = torch.eye(5, dtype=torch.bool)  # each token attends to itself only
    assert torch.allclose(parts.fused_attention(q, k, v, visible), v, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("settings", [{"norm_eps": 0.7}, {"rope_theta": 30.0}, {"dropout": 0.4}])
def test_settings_act_as_in_transformers(arch: str, settings: dict):
    """In training mode: equal random numbers are drawn in the same places for dropout."""
    model = make_model(**ARCHS[arch], **settings, block_size=40)
    theirs = to_transformers(model, arch)
    idx = torch.randint(11, (2, 40))
    plain = make_model(**ARCHS[arch], block_size=40)
    if arch == "gpt2" or "dropout" not in settings:  # theirs drop attention weights only
        model.train(), theirs.train()
        torch.manual_seed(1)
        ours = model(idx)[0]
        torch.manual_seed(1)
        assert torch.allclose(ours, theirs(idx).logits, atol=1e-4)
    ignored = arch == "gpt2" and "rope_theta" in settings
    assert torch.allclose(plain(idx)[0], model.train()(idx)[0], atol=1e-2) == ignored


def test_dropout_acts_on_the_embeddings_and_on_both_branches_of_a_block():
    """All else is 0: what is left of the stream shows where values were dropped."""
    model = make_model(dropout=0.5, n_embd=64, n_layer=1).train()
    calls: list[tuple[str, float]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda module, args, out, name=name: calls.append(
                    (name, out.eq(0).float().mean().item() - args[0].eq(0).float().mean().item())
                )
            )
    model(torch.randint(11, (8, 12)))
    assert [name for name, _ in calls] == ["drop", "blocks.0.drop", "blocks.0.drop"]
    assert [share for _, share in calls] == pytest.approx([0.5] * 3, abs=0.05)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_rotations_norms_of_queries_and_the_loss_are_float32(monkeypatch, precision, autocast):
    model, idx = make_model(**ARCHS["qwen3"]), torch.randint(11, (2, 12))
    seen = set()
    rotate = parts.rotate

    def spy(*tensors: torch.Tensor) -> torch.Tensor:
        seen.update(t.dtype for t in tensors)
        return rotate(*tensors)

    monkeypatch.setattr(parts, "rotate", spy)
    model.blocks[0].attn.q_norm.register_forward_pre_hook(lambda m, x: seen.add(x[0].dtype))
    dtype = getattr(torch, precision)
    if not autocast:
        lower_precision(model, precision)
    with torch.autocast("cpu", dtype, enabled=autocast):
        logits, loss = model(idx, idx)
    assert logits.dtype == dtype and loss.dtype == torch.float32 and seen == {torch.float32}
    expected = F.cross_entropy(logits.detach().double().flatten(0, 1), idx.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


NAMES = ("norm", "mlp", "pos", "qk_norm", "tie_weights", "bias")
COMBINATIONS = itertools.product(NORMS, MLPS, POSITIONS, *[(True, False)] * 3)


@pytest.mark.parametrize("values", COMBINATIONS)
def test_a_future_token_changes_no_earlier_logit(values: tuple):
    model = make_model(**dict(zip(NAMES, values, strict=True)))
    idx = torch.randint(11, (1, 12))
    changed = idx.clone()
    changed[0, 7] = (idx[0, 7] + 1) % 11
    with torch.no_grad():
        before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])
    assert not torch.allclose(before[:, 8:], after[:, 8:])  # but later ones see it


@pytest.mark.parametrize(("pos", "n_layer"), [*((pos, 1) for pos in POSITIONS), ("none", 2)])
def test_the_order_of_earlier_tokens_matters_except_to_one_layer_without_positions(pos, n_layer):
    """Attention sums over a set; what a second layer reads has already counted (Haviv 2022)."""
    model = make_model(pos=pos, n_layer=n_layer)
    one, other = model(torch.tensor([[1, 2, 3]]))[0], model(torch.tensor([[2, 1, 3]]))[0]
    unseen = pos == "none" and n_layer == 1
    assert torch.allclose(one[:, -1], other[:, -1], atol=1e-3) == unseen


@pytest.mark.parametrize("arch", ARCHS)
def test_initial_spread_of_every_parameter(arch: str):
    torch.manual_seed(0)
    model = GPT(config(vocab_size=300, n_embd=256, n_layer=8, n_head=4, **ARCHS[arch]))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert p.eq(expected).all(), name
        else:
            # GPT-2: 0.02, and over sqrt(2 x 8 layers) = 4 where the residual stream is written
            std = 0.02 / 4 if name.endswith("proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 0.05 * std, name


def test_loss_is_the_mean_cross_entropy_of_counted_targets():
    model = make_model()
    idx = torch.randint(11, (2, 6))
    targets = torch.tensor([[1, -100, 2, -100, -100, 3], [-100] * 5 + [0]])
    logits, loss = model(idx, targets)
    picked = logits.log_softmax(-1)
    by_hand = -(picked[0, 0, 1] + picked[0, 2, 2] + picked[0, 5, 3] + picked[1, 5, 0]) / 4
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-5)


def test_compiled_forward_and_gradients_equal_eager():
    model = make_model()
    idx = torch.randint(11, (2, 12))
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for forward, loss_only in itertools.product((model, compiled), (False, True)):
        model.zero_grad()
        logits, loss = forward(idx, idx, loss_only=loss_only)
        assert logits.numel() == (0 if loss_only else 2 * 12 * 11)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for tensors in zip(*results, strict=True):
        assert all(torch.allclose(tensors[0], tensor, atol=1e-5) for tensor in tensors)


@pytest.mark.parametrize("settings", COMPONENTS)
def test_packed_documents_do_not_see_each_other(settings: dict):
    model = make_model(**settings)
    docs = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
    idx = torch.randint(11, (1, 8))
    logits, _ = model(idx, docs=docs)
    maps: list[torch.Tensor] = []
    assert torch.allclose(model(idx, docs=docs, maps=maps)[0], logits, atol=1e-4)
    assert maps[0][0, 0, 7].tolist() == [0] * 7 + [1]
    other = idx.clone()
    other[0, :3] = (other[0, :3] + 1) % 11
    changed, _ = model(other, docs=docs)
    assert torch.allclose(changed[0, 3:], logits[0, 3:], atol=1e-5)
    assert not torch.allclose(model(other)[0][0, 3:], model(idx)[0][0, 3:], atol=1e-2)


@pytest.mark.parametrize("pos", ["rope", "none"])  # which depend on distances only
def test_a_packed_document_is_scored_as_if_it_stood_alone(pos: str):
    model = make_model(token_shift=True, pos=pos)
    idx = torch.randint(11, (2, 9))
    packed, _ = model(idx, docs=torch.tensor([[0] * 4 + [1] * 5] * 2))
    alone = torch.cat([model(idx[:, :4])[0], model(idx[:, 4:])[0]], dim=1)
    assert torch.allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize(("field", "mapping"), [("norm", NORMS), ("mlp", MLPS), ("pos", POSITIONS)])
def test_the_choices_of_a_setting_are_the_components_there_are(field: str, mapping: dict):
    assert set(GPTConfig.__dataclass_fields__[field].metadata["choices"]) == set(mapping)


@pytest.mark.parametrize("settings", COMPONENTS)
def test_recomputed_activations_change_no_gradient(settings: dict):
    model, x = make_model(**settings, dropout=0.5).train(), torch.randint(11, (2, 8))
    gradients = []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        torch.manual_seed(0)  # the same dropout
        model(x, x)[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_activations_are_recomputed_in_training_only(grad_checkpoint: bool, training: bool):
    model, x = make_model(), torch.randint(11, (2, 8))
    model.train(training)
    model.grad_checkpoint = grad_checkpoint
    calls: list[nn.Module] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: calls.append(module))
    loss = model(x, x)[1]
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == (4 if grad_checkpoint and training else 2)
