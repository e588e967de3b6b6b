"""Factorization: scores, mapping over clients."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedpers.cohort.modules import prepare
from fedpers.models import ModelConfig, build_model


def table(seed=0, **options):
    return build_model(ModelConfig("factorization", **options), (), 1, seed, num_items=50)


def test_scores_are_inner_products_of_item_and_user():
    model, items = table(), torch.tensor([3, 0, 49, 3])
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        "body.weight": (50, 32),
        "head.weight": (1, 32),
        "head.bias": (1,),
    }
    expected = model.body.weight[items] @ model.head.weight[0] + model.head.bias
    torch.testing.assert_close(model(items), expected[:, None])
    assert set(table(bias=False, dim=4).state_dict()) == {"body.weight", "head.weight"}


def test_items_start_standard_normal():
    weight = build_model(ModelConfig("factorization"), (), 1, 0, num_items=2000).body.weight.detach()
    assert abs(float(weight.mean())) < 0.02
    assert abs(float(weight.std()) - 1) < 0.02


def test_clients_under_vmap_equal_one_by_one():
    models = [table(seed).double() for seed in range(3)]
    base = prepare(table(9).double())
    params, _ = stack_module_state(models)
    items, y = torch.randint(0, 50, (3, 20)), torch.rand(3, 20, dtype=torch.float64).round()  # items repeat

    def loss(params, items, y):
        return nn.functional.binary_cross_entropy_with_logits(functional_call(base, params, items)[:, 0], y)

    scores = vmap(lambda p, i: functional_call(base, p, i))(params, items)
    grads = vmap(grad(loss))(params, items, y)
    for k, model in enumerate(models):
        torch.testing.assert_close(scores[k], model(items[k]), rtol=0, atol=1e-10)
        nn.functional.binary_cross_entropy_with_logits(model(items[k])[:, 0], y[k]).backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(grads[name][k], value.grad, rtol=0, atol=1e-10)
