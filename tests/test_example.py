"""The example in ``examples/``: what it trains on, that it trains right, and what it shows."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example import (
    SMALL,
    DenseMoE,
    architectures,
    flagsaver,
    meshes,
    model,
    program,
    report,
    text,
    train,
    training,
)
from flax import nnx
from implementations import require

import jax_ep.flax

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("standard_promotion")]


@pytest.fixture(scope="module")
def dense_history():
    return train(model.Config(**SMALL, implementation="dense"))[0]


@pytest.mark.parametrize("name", ["native", "xla"])
def test_training_is_that_of_the_dense_formula(name, dense_history):
    require(name)
    history, _ = train(model.Config(**SMALL, implementation=name))
    np.testing.assert_allclose(history.loss, dense_history.loss, atol=1e-3, rtol=0)
    np.testing.assert_array_equal(history.expert_load[0], dense_history.expert_load[0])
    assert not np.any(history.dropped)
    assert history.loss[-1] < history.loss[0] - 1.0


def test_8_bits_on_the_wire_train_as_well(dense_history):
    config = model.Config(**SMALL, implementation="xla", wire="float8_e4m3fn")
    history, trained = train(config)
    assert trained.blocks[0].moe.config.wire_dtype == "float8_e4m3fn"
    np.testing.assert_allclose(history.loss, dense_history.loss, rtol=0.01)
    assert np.any(np.abs(history.loss - dense_history.loss) > 1e-5)


def test_a_small_capacity_drops_and_the_bias_of_a_sigmoid_router_evens_the_load():
    config = model.Config(
        **SMALL | {"num_layers": 1},
        router=architectures.ROUTERS["sigmoid"],
        capacity_factor=0.5,
        implementation="xla",
    )
    history, trained = train(config, num_steps=2)
    # Some device has its fair share or more to receive, and room for half of that.
    assert np.all(history.dropped > 0.1)
    assert np.all(history.expert_load.sum(axis=-1) == 16 * 32 * 2)
    load = history.expert_load[:, 0].astype(np.float64)
    want = training.BIAS_RATE * np.sign(load.mean(axis=1, keepdims=True) - load).sum(axis=0)
    np.testing.assert_allclose(trained.blocks[0].moe.router_bias[...], want, atol=1e-6)
    np.testing.assert_allclose(
        history.busiest_expert[:, 0], load.max(axis=1) / load.mean(axis=1), rtol=1e-5
    )


@pytest.mark.parametrize(
    "options", [{"router": "softmax"}, {"router": "sigmoid", "shared_hidden": 6}], ids=str
)
def test_the_dense_layer_leaves_out_what_is_no_token(options):
    x = jax.random.normal(jax.random.key(0), (3, 5, 16))
    token_mask = jnp.arange(15).reshape(3, 5) % 4 != 1
    x = jnp.where(token_mask[..., None], x, jnp.nan)
    (out, aux), (want, want_aux) = (
        Layer(16, 8, 6, 2, rngs=nnx.Rngs(1), **options).apply_with_aux(x, token_mask=token_mask)
        for Layer in (DenseMoE, jax_ep.flax.MoE)
    )
    np.testing.assert_allclose(out, want, atol=1e-6)
    assert np.sum(aux["expert_load"]) == 2 * np.sum(token_mask)
    for name, value in aux.items():
        np.testing.assert_allclose(value, want_aux[name], rtol=1e-5, err_msg=name)


def write_files(root, contents):
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def test_the_text_is_whole_files_in_order_and_every_16th_is_held_out(tmp_path):
    files = {f"m{i:02}.py": b"%02d;" % i for i in range(20)}
    skipped = {"test/t.py": b"no", "a/site-packages/s.py": b"no", "a.txt": b"no"}
    write_files(tmp_path, files | skipped)
    train_text, held_out = (part.tobytes() for part in text.read_corpus(1000, tmp_path))
    assert held_out == b"15;"
    assert train_text == b"".join(b"%02d;" % i for i in range(20) if i != 15)
    limited = text.read_corpus(3 * 17 + 2, tmp_path)
    assert limited.train.tobytes().endswith(b"14;16;")


def test_too_little_text_is_an_error(tmp_path):
    write_files(tmp_path, {"only.py": b"x = 1"})
    with pytest.raises(FileNotFoundError, match="no text to train on and to hold out"):
        text.read_corpus(1000, tmp_path)
    with pytest.raises(ValueError, match="text must hold at least 6 bytes; got 5"):
        text.draw_windows(np.zeros(5, np.uint8), np.random.default_rng(0), 1, 6)


def test_entropy_and_windows():
    assert text.byte_entropy(np.array([7, 7, 7, 7], np.uint8)) == 0
    assert text.byte_entropy(np.array([1, 2, 3, 3], np.uint8)) == pytest.approx(1.5)
    windows = text.draw_windows(np.arange(9, dtype=np.uint8), np.random.default_rng(0), 200, 7)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows - windows[:, :1], np.tile(np.arange(7), (200, 1)))
    assert set(windows[:, 0]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("mesh", "num_devices", "want"),
    [
        (None, 8, (2, 4)),
        (None, 1, (1, 1)),
        (None, 2, (1, 2)),
        (None, 3, (1, 3)),
        ("4x2", 8, (4, 2)),
    ],
)
def test_mesh(mesh, num_devices, want):
    assert meshes.parse_mesh(mesh, num_devices) == want


@pytest.mark.parametrize("mesh", ["8", "2x-4", "0x8", "2x2x2", "axb"])
def test_a_mesh_that_is_none(mesh):
    with pytest.raises(ValueError, match=f"--mesh must be two positive numbers.*got '{mesh}'"):
        meshes.parse_mesh(mesh, 8)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"mesh": "4x4"}, "--mesh must not exceed the 8 devices; got '4x4'"),
        ({"batch": 12}, "--batch must be a multiple of 8; got 12"),
        ({"num_experts": 6}, "--num_experts must be a multiple of 4; got 6"),
        ({"hidden": 100}, "--hidden must be a multiple of 8; got 100"),
        ({"num_topk": 17}, "--num_topk must be at most 16; got 17"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit(flag, message):
    with flagsaver(**flag), pytest.raises(program.app.UsageError, match=message):
        program.make_mesh(program.make_config())


def test_no_capacity_factor_is_no_limit():
    with flagsaver(capacity_factor=0.0, router="sigmoid"):
        config = program.make_config()
    assert config.capacity_factor is None
    assert config.router == architectures.ROUTERS["sigmoid"]
    assert program.make_config().capacity_factor == 1.25


def test_a_whole_run_shows_what_it_promises(tmp_path, capsys):
    small = SMALL | {"num_layers": 1, "batch": 8, "seq_len": 16, "steps": 3, "sample_bytes": 40}
    with (
        flagsaver(**small, max_bytes=1_000_000, output_dir=str(tmp_path / "new")),
        flagsaver(trace=str(tmp_path / "t.npy"), profile=str(tmp_path / "profile")),
    ):
        program.main(["train_moe_lm.py"])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    shown = {line[:12].strip(): line[12:].split() for line in lines if line.endswith("%")}
    parts = ["balance", "plan", "dispatch", "experts", "combine"]
    assert list(shown) == [*parts, "the rest", "whole step"]
    assert all(float(shown[name][0]) > 0 for name in parts)
    figures = [float(line.split()[-1]) for line in lines if line.startswith("byte entropy")]
    assert figures == [
        pytest.approx(text.byte_entropy(text.read_corpus(1_000_000).train), abs=1e-3)
    ]
    assert "loss 8.0" in err
    assert re.findall(r"dropped (\S+%), busiest expert [0-9.]+, device (\S+) of", err)[-1] == (
        "0.0%",
        "1.00",
    )
    assert np.load(tmp_path / "t.npy").shape == (1, 8 * 16, 2)
    trace = jax_ep.Trace.load(tmp_path / "new" / "train_moe_lm.npz")
    assert {"make_plan", "dispatch", "combine", "dispatch (gradient)"} <= set(trace.ops)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert (tmp_path / "new" / "train_moe_lm.png").read_bytes().startswith(b"\x89PNG")


def test_shares_add_up():
    table = report.format_shares({"plan": 0.01, "experts": 0.05}, 0.2)
    rows = [line.rsplit(maxsplit=2) for line in table.splitlines()[1:]]
    assert rows == [
        ["plan", "10.0", "5.0%"],
        ["experts", "50.0", "25.0%"],
        ["the rest", "140.0", "70.0%"],
        ["whole step", "200.0", "100.0%"],
    ]


def test_a_sample_cannot_upset_a_terminal():
    assert (
        report.format_text(b"a\n\x1b[2J\xff")
        == "a\n\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}"
    )


def test_an_untrained_model_knows_nothing(dense_history):
    assert dense_history.loss[0] == pytest.approx(math.log2(256), abs=1e-4)
