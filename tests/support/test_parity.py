"""The comparisons themselves: they fire, and they measure what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.parity import MODULE, ZERO_GRADIENT, absolute_error, apart, assert_close, assert_trees_close, error


def test_error_is_relative_to_the_largest_expected_value() -> None:
    assert error([1.0, 2.0, -4.0], [1.0, 2.0, -5.0]) == pytest.approx(0.2)
    assert error(torch.tensor([0.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx(0.5)
    assert absolute_error([1.0, 2.0], [1.5, 2.0]) == pytest.approx(0.5)


def test_assert_close_fires() -> None:
    want = np.linspace(-1, 1, 9)
    assert_close(want + 0.9 * MODULE, want, MODULE)
    for wrong in (want + 1.1 * MODULE, want.astype(np.float16) * 1.001, np.where(want == 0, np.nan, want)):
        with pytest.raises(AssertionError):
            assert_close(wrong, want, MODULE)


def test_shapes_must_be_equal_not_broadcastable() -> None:
    with pytest.raises(AssertionError, match="shape"):
        error(np.ones((3, 1)), np.ones((1, 3)))


def test_nothing_is_relative_to_zeros() -> None:
    with pytest.raises(AssertionError, match="all zero"):
        error(np.zeros(3), np.zeros(3))


@pytest.mark.parametrize(("path", "keys"), [("c_attn/bias", [2, 3]), ("qkv/bias", [1, 4])])
def test_key_biases_are_set_apart(path: str, keys: list[int]) -> None:
    """Two heads of width one: c_attn is q q k k v v, qkv is q k v q k v."""
    name, part = path.split("/")
    rest, found = apart({name: {part: np.arange(6.0)}}, heads=2)
    assert sorted(found[path].ravel()) == keys
    assert sorted(rest[path].ravel()) == sorted(set(range(6)) - set(keys))


@pytest.mark.parametrize("path", ["c_attn", "qkv"])
def test_trees_fire_for_each_array_and_for_key_biases(path: str) -> None:
    want = {path: {"bias": np.arange(1.0, 7.0), "kernel": np.ones((2, 6))}}
    assert_trees_close(want, want, MODULE, heads=2)
    for place in range(6):
        bias = want[path]["bias"].copy()
        bias[place] += 10 * max(ZERO_GRADIENT, 6 * MODULE)
        with pytest.raises(AssertionError, match=f"{path}/bias"):
            assert_trees_close({path: {**want[path], "bias": bias}}, want, MODULE, heads=2)
    with pytest.raises(AssertionError, match="kernel"):
        assert_trees_close({path: {**want[path], "kernel": want[path]["kernel"] * 1.001}}, want, MODULE, heads=2)
    with pytest.raises(AssertionError):
        assert_trees_close({path: {"bias": want[path]["bias"]}}, want, MODULE, heads=2)
