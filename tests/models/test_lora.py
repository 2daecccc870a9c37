"""Low-rank adapters: they start as nothing, add (x a) b, merge into the weights, and cost no gradient of these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.support import small
from tests.support.parity import assert_close
from tortoise_jax.models.layers import REMAT, Compute
from tortoise_jax.models.lora import LORA, PRODUCTS, LoraConfig, inserted, merged, with_adapters
from tortoise_jax.models.unified_voice import UnifiedVoice

CONFIG = LoraConfig(rank=4, alpha=8.0)
PLAIN = Compute()
SAME = 1e-5


def outputs(params: Any, compute: Compute = PLAIN) -> dict[str, Any]:
    batch = small.clips(0, rows=3)
    rows = (batch[name] for name in ("tokens", "token_types", "positions"))
    model = UnifiedVoice(small.CONFIG, compute)
    found: Any = jax.jit(model.apply)({"params": params}, batch["conditioning_mel"], *rows)
    return found


def loss(params: Any, compute: Compute = PLAIN) -> Any:
    found = outputs(params, compute)
    return sum(jnp.mean(jnp.square(found[name])) for name in ("text_logits", "mel_logits"))


def adapted() -> Any:
    """Parameters with adapters that are far from nothing."""
    params, random = with_adapters(small.params(), CONFIG, seed=0), np.random.default_rng(1)
    noise = lambda leaf: 0.2 * random.standard_normal(leaf.shape, np.float32)
    return {**params, LORA: jax.tree.map(noise, params[LORA])}


def test_a_run_starts_as_exactly_the_model_it_began_with() -> None:
    params = with_adapters(small.params(), CONFIG, seed=0)
    start, plain = outputs(inserted(params, CONFIG)), outputs(small.params())
    assert all(np.array_equal(start[name], plain[name]) for name in ("blocks", "text_logits", "mel_logits"))
    jax.tree.map(np.testing.assert_array_equal, merged(params, CONFIG), small.params())
    a = params[LORA]["attn"]["c_attn"]["a"]
    assert 0.9 * small.CONFIG.width**-0.5 < np.abs(a).max() <= small.CONFIG.width**-0.5
    other = with_adapters(small.params(), CONFIG, seed=1)[LORA]["attn"]["c_attn"]["a"]
    assert not np.array_equal(a, other)


def test_without_adapters_nothing_is_other_than_before() -> None:
    assert with_adapters(small.params(), LoraConfig(), seed=0) is small.params()
    assert inserted(small.params(), LoraConfig()) is small.params()
    assert merged(small.params(), LoraConfig()) is small.params()


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_merged_model_computes_the_same(unrolled: bool) -> None:
    params = adapted()
    one = merged(params, CONFIG)
    assert jax.tree.structure(one) == jax.tree.structure(small.params())
    got, want = outputs(inserted(params, CONFIG), Compute(unrolled=unrolled)), outputs(one)
    for name in ("text_logits", "mel_logits"):
        assert_close(got[name], want[name], SAME, name)
        assert np.abs(got[name] - outputs(small.params())[name]).max() > 0.1


def test_every_product_has_its_own_adapter_times_the_scale() -> None:
    params = adapted()
    for module, product in PRODUCTS:
        adapter = params[LORA][module][product]
        before = small.params()["gpt"]["h"][module][product]["kernel"]
        after = merged(params, CONFIG)["gpt"]["h"][module][product]["kernel"]
        for layer in range(small.CONFIG.layers):
            added = 2.0 * (adapter["a"][layer] @ adapter["b"][layer])  # alpha 8, rank 4
            assert_close(after[layer] - before[layer], added, SAME, product)


@pytest.mark.parametrize(("remat", "unrolled"), [*((remat, False) for remat in REMAT), ("full", True)])
def test_gradients_follow_from_those_of_the_merged_weights(remat: str, unrolled: bool) -> None:
    """Of W + s a b: by the chain rule that of a is s W' bT, that of b is s aT W'."""
    params = adapted()
    compute = Compute(remat=remat, unrolled=unrolled)
    got = jax.grad(lambda adapters: loss(inserted({**params, LORA: adapters}, CONFIG), compute))(params[LORA])
    of_weights = jax.grad(loss)(jax.tree.map(jnp.asarray, merged(params, CONFIG)))["gpt"]["h"]
    for module, product in PRODUCTS:
        gradient, adapter = np.asarray(of_weights[module][product]["kernel"]), params[LORA][module][product]
        a, b = adapter["a"], adapter["b"]
        assert_close(got[module][product]["a"], 2.0 * gradient @ b.swapaxes(1, 2), SAME, f"{product} a")
        assert_close(got[module][product]["b"], 2.0 * a.swapaxes(1, 2) @ gradient, SAME, f"{product} b")


def shapes_computed(program: Any) -> Iterator[tuple[int, ...]]:
    """Of every array that a product or a sum anywhere in the program makes."""
    for one in program.eqns:
        if one.primitive.name in ("dot_general", "add_any"):
            yield one.outvars[0].aval.shape
        for inner in jaxprs_in_params(one.params):
            yield from shapes_computed(inner)


@pytest.mark.parametrize(("remat", "unrolled"), [*((remat, unrolled) for remat in REMAT for unrolled in (False, True))])
def test_no_gradient_of_the_frozen_weights_is_computed(remat: str, unrolled: bool) -> None:
    params, compute = adapted(), Compute(remat=remat, unrolled=unrolled)
    width = small.CONFIG.width
    kernels = {(width, 3 * width), (width, 4 * width), (4 * width, width)}

    def computed(trained: str) -> set[tuple[int, ...]]:
        frozen = {name: tree for name, tree in params.items() if name != trained}
        part = lambda tree: loss(inserted({**frozen, trained: tree}, CONFIG), compute)
        return set(shapes_computed(jax.make_jaxpr(jax.grad(part))(params[trained]).jaxpr))

    transposed = {shape[::-1] for shape in kernels}
    assert computed("gpt") & (kernels | transposed), "such products are found where there are some"
    assert not computed(LORA) & (kernels | transposed)
