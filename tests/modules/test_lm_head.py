"""`replace_lm_head` against the logits of the same model: values, gradients, and what must not change."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from spear_kernels import (
    PolicyHead,
    PolicyInputs,
    PolicyLossConfig,
    covariance_select,
    policy_loss,
    replace_lm_head,
    restore_lm_head,
)
from spear_kernels.modules.logit_scale import LogitScale, found, probe_logits
from spear_kernels.testing import OperationRecorder
from tests.modules.tiny_models import FAMILIES, MIXTURE, VOCAB, batch, scored, tiny_model


def gradients(loss, model):
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same(ours, truth, rtol=1e-6):
    """Tensors by name; tolerances relative to the largest of each."""
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=rtol * value.abs().max().item() + 1e-12, msg=name)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != MIXTURE])
def test_logp_and_entropy_are_those_of_the_models_own_logits(family):
    model = tiny_model(family, torch.float64)
    ids, labels = batch(seed=int(torch.randint(1000, ())))
    logits = model(input_ids=ids).logits
    logp, entropy = scored(logits.double(), labels, 0.7)
    weight = torch.randn_like(logp)
    truth = gradients((weight * logp).sum() + 0.3 * entropy.sum(), model)

    assert replace_lm_head(model, temperature=0.7) is model
    out = model(input_ids=ids, logp_labels=labels)
    assert out.loss is None and out.metrics is None
    assert_same({"logp": out.logp.detach(), "entropy": out.entropy.detach()},
                {"logp": logp.detach(), "entropy": entropy.detach()})  # fmt: skip
    assert_same(gradients((weight * out.logp).sum() + 0.3 * out.entropy.sum(), model), truth)
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=0)


def test_a_temperature_for_each_token_or_row_replaces_the_models():
    model, (ids, labels) = replace_lm_head(tiny_model(dtype=torch.float64), temperature=3.0), batch()
    logits = model(input_ids=ids).logits
    for temperature in (0.5 + torch.rand(3, 7), 0.5 + torch.rand(3), torch.tensor(0.6), 0.6):
        out = model(input_ids=ids, policy_inputs=PolicyInputs(labels, temperature=temperature))
        by_token = (
            temperature[:, None] if isinstance(temperature, torch.Tensor) and temperature.dim() == 1 else temperature
        )
        assert_same({"logp": out.logp}, {"logp": scored(logits, labels, by_token)[0]}, rtol=1e-6)


def test_only_labelled_rows_reach_the_head():
    model, (ids, labels) = replace_lm_head(tiny_model("untied")), batch()
    num_labels = int((labels[:, 1:] != -100).sum())
    with OperationRecorder() as backbone:
        model.model(input_ids=ids)
    model(input_ids=ids, logp_labels=labels)
    with OperationRecorder() as seen, torch.no_grad():
        model(input_ids=ids, logp_labels=labels)
    assert seen.matrix_flops - backbone.matrix_flops == 2 * num_labels * VOCAB * 16


TERMS: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.2, "kl_coef": 0.2, "entropy_coef": 0.03, "tis_cap": 1.1}
CONFIGS = [
    PolicyLossConfig("ppo", **TERMS, dual_clip=2.0),
    PolicyLossConfig("gspo", **TERMS, aggregation="seq-mean-token-mean"),
    PolicyLossConfig("clip_cov", **TERMS, cov_ratio=0.3, cov_lower=-0.1, aggregation="seq-mean-token-sum"),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.kind)
def test_the_policy_loss_is_that_of_the_models_own_logits(cfg):
    model, (ids, labels) = tiny_model(dtype=torch.float64), batch()
    logp, entropy = scored(model(input_ids=ids).logits, labels, 0.8)
    at = (labels != -100) & (torch.arange(7) > 0)
    old, ref, sampler = (torch.where(at, logp.detach() + 0.3 * torch.randn_like(logp), torch.nan) for _ in range(3))
    advantages, row_weight = torch.randn(3).double(), 0.5 + torch.rand_like(logp)
    row, column = at.nonzero(as_tuple=True)
    given: Any = {"ref_logp": ref[at], "row_weight": row_weight[at], "sampler_logp": sampler[at]}
    tokens = logp[at], old[at], advantages[row], None, cfg, row, entropy[at]
    result = policy_loss(*tokens, **given, seed=5, positions=column, num_tokens=20, num_seqs=4)
    truth = gradients(result.loss, model)

    inputs = PolicyInputs(labels, old, advantages, cfg, temperature=0.8, ref_logp=ref, row_weight=row_weight,
                          sampler_logp=sampler, seed=5, num_tokens=20, num_seqs=4)  # fmt: skip
    out = replace_lm_head(model)(input_ids=ids, policy_inputs=inputs)
    assert_same(gradients(out.loss, model), truth)
    assert_same({"loss": out.loss.detach(), **out.metrics}, {"loss": result.loss.detach(), **result.metrics})
    assert_same({"logp": out.logp, "entropy": out.entropy}, {"logp": logp.detach(), "entropy": entropy.detach()})
    assert not out.logp.requires_grad


def test_a_choice_of_tokens_made_elsewhere_and_packed_sequences_are_honoured():
    model, (ids, labels) = replace_lm_head(tiny_model()), batch()
    cfg = PolicyLossConfig("clip_cov", cov_ratio=0.5, cov_lower=-9, aggregation="seq-mean-token-mean")
    old, advantages = model(input_ids=ids, logp_labels=labels).logp.detach(), torch.randn(3, 7)
    seq_ids = torch.arange(21).view(3, 7) // 3
    at = (labels != -100) & (torch.arange(7) > 0)
    selected = torch.zeros(3, 7, dtype=torch.bool)
    tokens = old[at], old[at], advantages[at], None, cfg, seq_ids[at]
    selected[at] = covariance_select(*tokens, 3, positions=torch.arange(21).view(3, 7)[at])
    inputs = PolicyInputs(labels, old, advantages, cfg, seq_ids=seq_ids, selected=selected)
    out = model(input_ids=ids, policy_inputs=inputs)
    assert selected.any() and out.metrics["dropped_tokens"] == selected.sum()
    result = policy_loss(*tokens, selected=selected[at])
    torch.testing.assert_close(out.loss, result.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_loss", [False, True])
def test_a_batch_without_labels_gives_every_weight_a_gradient_of_zero(with_loss):
    """Else DDP and FSDP2 would wait for gradients on the other ranks."""
    model, (ids, labels) = replace_lm_head(tiny_model("untied")), batch()
    inputs = PolicyInputs(torch.full_like(labels, -100))
    if with_loss:
        inputs = PolicyInputs(inputs.labels, torch.zeros(3, 7), torch.ones(3), PolicyLossConfig())
    out = model(input_ids=ids, policy_inputs=inputs)
    grads = gradients(out.loss if with_loss else out.logp.sum() + out.entropy.sum(), model)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert not any(grad.any() for grad in grads.values())


def test_names_weights_generation_and_signature_stay_and_restore_undoes_it():
    model, (ids, labels) = tiny_model(), batch()
    head: Any = model.lm_head
    names, tied = list(model.state_dict()), model.model.embed_tokens.weight
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    signature = inspect.signature(model.forward)
    replace_lm_head(model)
    assert isinstance(model.lm_head, PolicyHead) and model.lm_head.weight is tied
    assert head.weight is None, "a second reference keeps whole weights alive beside FSDP2's shards"
    assert list(model.state_dict()) == names and inspect.signature(model.forward) == signature
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(tied + 1)
    restore_lm_head(model)
    assert model.lm_head is head and "forward" not in model.__dict__
    torch.testing.assert_close(model.lm_head.weight, nn.Parameter(tied + 1))
    assert not hasattr(model(input_ids=ids, logp_labels=labels), "logp")


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_on_its_own_weights(twin):
    model, (ids, labels) = replace_lm_head(tiny_model()), batch()
    other = twin(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    expected = scored(other(input_ids=ids).logits, labels)[0]
    torch.testing.assert_close(other(input_ids=ids, logp_labels=labels).logp, expected, rtol=1e-5, atol=1e-5)


def test_padded_rows_of_the_head_are_left_out():
    model, (ids, labels) = replace_lm_head(tiny_model(), vocab_size=VOCAB - 3), batch()
    labels = labels.clamp(max=VOCAB - 4)
    logp, entropy = scored(model(input_ids=ids).logits[..., : VOCAB - 3], labels)
    out = model(input_ids=ids, logp_labels=labels)
    assert_same({"logp": out.logp, "entropy": out.entropy}, {"logp": logp, "entropy": entropy}, rtol=1e-5)


def compiled_backbone(model):
    model.model.compile(backend="eager")
    return model


def compiled_whole(model):
    ids, _ = batch()
    one_graph = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(one_graph(input_ids=ids).logits, model(input_ids=ids).logits)
    return torch.compile(model, backend="eager")


def checkpointed(model):
    model.gradient_checkpointing_enable()
    return model.train()


@pytest.mark.parametrize("change", [compiled_backbone, compiled_whole, checkpointed])
def test_compiled_and_checkpointed_models_give_the_same(change):
    model, (ids, labels) = replace_lm_head(tiny_model("untied")), batch()
    truth_out = model(input_ids=ids, logp_labels=labels)
    truth = gradients(truth_out.logp.sum(), model)
    out = change(model)(input_ids=ids, logp_labels=labels)
    assert_same({"logp": out.logp}, {"logp": truth_out.logp}, rtol=1e-5)
    assert_same(gradients(out.logp.sum(), model), truth, rtol=1e-4)


def test_under_autocast_the_head_takes_its_type_and_keeps_float32_logits():
    model, (ids, labels) = replace_lm_head(tiny_model("untied")), batch()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids).last_hidden_state
        out = model(input_ids=ids, logp_labels=labels)
    logits = hidden.bfloat16().double() @ model.lm_head.weight.bfloat16().double().T
    assert out.logp.dtype == torch.float32
    assert_same({"logp": out.logp.double()}, {"logp": scored(logits, labels)[0]}, rtol=1e-5)


def test_the_load_balancing_loss_is_handed_on():
    model, (ids, labels) = replace_lm_head(tiny_model(MIXTURE)), batch()
    out = model(input_ids=ids, logp_labels=labels, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, model(input_ids=ids, output_router_logits=True).aux_loss)
    assert out.aux_loss.requires_grad and model(input_ids=ids, logp_labels=labels).aux_loss is None
    dense = replace_lm_head(tiny_model())
    with pytest.raises(ValueError, match="returned no aux_loss"):
        dense(input_ids=ids, logp_labels=labels, output_router_logits=True)


@pytest.mark.parametrize("first", ["head", "adapter"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft_models(first, saved):
    peft = pytest.importorskip("peft")
    model, (ids, labels) = tiny_model("untied"), batch()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False)
    adapted: Any
    if first == "head":
        adapted = peft.get_peft_model(replace_lm_head(model), config)
    elif saved is None:
        adapted = replace_lm_head(peft.get_peft_model(model, config))
    else:
        with pytest.raises(ValueError, match="modules_to_save only after replace_lm_head"):
            replace_lm_head(peft.get_peft_model(model, config))
        return
    if saved:
        with torch.no_grad():
            adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    logp = scored(adapted(input_ids=ids).logits, labels)[0]
    truth = gradients(logp.sum(), adapted)
    out = adapted(input_ids=ids, logp_labels=labels)
    assert_same({"logp": out.logp}, {"logp": logp}, rtol=1e-5)
    assert_same(gradients(out.logp.sum(), adapted), truth, rtol=1e-4)


def test_an_adapter_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapters on the head itself"):
        replace_lm_head(peft.get_peft_model(tiny_model("untied"), config))
    ids, labels = batch()
    adapted = peft.get_peft_model(replace_lm_head(tiny_model("untied")), config)
    with pytest.raises(ValueError, match="no longer the PolicyHead"):
        adapted(input_ids=ids, logp_labels=labels)


class Config:
    """What a model's configuration says about its logits."""

    output_multiplier = 0.5
    final_logit_softcapping = 20.0


def test_factor_and_soft_cap_are_found_together_and_what_nothing_explains_is_refused():
    probe = probe_logits(2, torch.device("cpu"))
    both = 20 * torch.tanh(probe * 0.5 / 20)
    assert found(Config, both) == LogitScale(0.5, 20.0)
    assert found(Config, both.bfloat16()) == LogitScale(0.5, 20.0)
    assert found(Config, probe) == LogitScale(1.0, None)
    for other in (probe * 0.3, probe.clamp(max=20), probe + 1, probe[..., :3]):
        with pytest.raises(ValueError, match="pass logit_scale and softcap"):
            found(Config, other)


def test_factor_and_soft_cap_can_be_given():
    """They are applied in the order factor, soft-cap, temperature."""
    model, (ids, labels) = tiny_model(dtype=torch.float64), batch()
    logits = model(input_ids=ids).logits
    replace_lm_head(model, temperature=0.7, logit_scale=0.4, softcap=1.5)
    out = model(input_ids=ids, logp_labels=labels)
    assert_same({"logp": out.logp}, {"logp": scored(1.5 * torch.tanh(0.4 * logits / 1.5), labels, 0.7)[0]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"chunk_bytes": 0}, "chunk_bytes=0"),
        ({"vocab_size": VOCAB + 1}, f"vocab_size={VOCAB + 1}"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        replace_lm_head(model, **arguments)
    assert type(model.lm_head) is nn.Linear


def test_models_that_cannot_be_changed_are_refused():
    with pytest.raises(ValueError, match="no get_output_embeddings"):
        replace_lm_head(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not replaced"):
        restore_lm_head(tiny_model())
    with pytest.raises(ValueError, match="replaced already"):
        replace_lm_head(replace_lm_head(tiny_model()))
    hooked = tiny_model()
    hooked.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks of its own"):
        replace_lm_head(hooked)
    seen = tiny_model()
    seen.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="encoder-decoder"):
        replace_lm_head(seen)


def test_wrong_calls_are_named():
    model, (ids, labels) = replace_lm_head(tiny_model()), batch()
    cfg = PolicyLossConfig()
    calls = [
        ({"logp_labels": labels, "labels": labels}, "leave it out"),
        ({"logp_labels": labels, "policy_inputs": PolicyInputs(labels)}, "both logp_labels and policy_inputs"),
        ({"logp_labels": labels[:, 1:]}, r"labels have shape \(3, 6\)"),
        ({"logp_labels": labels, "logits_to_keep": 2}, "logits_to_keep must be left out"),
        ({"logp_labels": labels.float()}, "pass int64"),
    ]
    for arguments, message in calls:
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, **arguments)
    assert isinstance(model.lm_head, PolicyHead)
    for arguments, message in [
        ({"old_logp": torch.zeros(3, 7)}, "old_logp given without cfg"),
        ({"cfg": cfg, "advantages": torch.zeros(3)}, "old_logp is needed"),
        ({"cfg": cfg, "old_logp": torch.zeros(3, 7)}, "advantages is needed"),
        ({"cfg": cfg, "old_logp": torch.zeros(3, 6), "advantages": torch.zeros(3)}, r"old_logp has shape \(3, 6\)"),
        ({"cfg": cfg, "old_logp": torch.zeros(()), "advantages": torch.zeros(3)}, "old_logp is a single number"),
    ]:
        with pytest.raises(ValueError, match=message):
            PolicyInputs(labels, **arguments)
