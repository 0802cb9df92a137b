"""The example that serves: its cache, sequences that end, and ways that have to write the same."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytestmark = pytest.mark.long

flagsaver = pytest.importorskip("absl.testing.flagsaver", reason="needs the extra 'examples'")

# A program and its parts, not an installed package.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
program = importlib.import_module("serve_moe")
model, serving = (importlib.import_module(f"moe_lm.{name}") for name in ("model", "serving"))

SMALL = {"num_layers": 2, "hidden": 16, "num_heads": 2, "ffn_hidden": 8, "num_experts": 8}
PROMPT_LEN, MAX_LENGTH = 5, 9
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(scope="module")
def served(mesh):
    """The model with a device's experts on each, prompts, and what the model writes."""
    prompts = jax.random.randint(jax.random.key(0), (8, PROMPT_LEN), 0, model.VOCAB)
    with jax.set_mesh(mesh):
        graph, state = serving.init_state(model.Config(**SMALL), mesh, seed=0)
        prompts = jax.device_put(prompts, jax.NamedSharding(mesh, jax.P("expert")))
        prefill = functools.partial(serving.prefill, graph, state, prompts, max_length=MAX_LENGTH)
        yield graph, state, lambda key=KEY: prefill(key)


def test_the_cache_changes_nothing(served):
    """Each token is what the whole sequence before it, read anew, has drawn."""
    graph, state, prefill = served
    sequences = serving.decode(graph, state, prefill(), KEY)
    assert sequences.length == MAX_LENGTH
    assert not np.any(sequences.has_ended)
    logits = jax.jit(lambda tokens: nnx.merge(graph, state)(tokens))(sequences.tokens)
    for length in range(PROMPT_LEN, MAX_LENGTH):
        key = jax.random.fold_in(KEY, length)
        want = jax.random.categorical(key, logits[:, length - 1] / serving._TEMPERATURE)
        np.testing.assert_array_equal(sequences.tokens[:, length], want)


def test_steps_write_what_the_loop_does(served):
    graph, state, prefill = served
    want = serving.decode(graph, state, prefill(), KEY)
    sequences = prefill()
    for _ in range(PROMPT_LEN + 1, MAX_LENGTH):
        sequences = serving.step(graph, state, sequences, KEY)
    jax.tree.map(np.testing.assert_array_equal, sequences, want)


def test_sequences_that_have_ended_write_no_more(served):
    graph, state, prefill = served
    want = serving.decode(graph, state, prefill(), KEY).tokens
    has_ended = jnp.arange(8) % 3 == 1
    sequences = serving.decode(graph, state, prefill()._replace(has_ended=has_ended), KEY)
    written = sequences.tokens[:, PROMPT_LEN + 1 :]
    np.testing.assert_array_equal(written[has_ended], serving.END)
    np.testing.assert_array_equal(written[~has_ended], want[:, PROMPT_LEN + 1 :][~has_ended])


def test_sequences_that_have_ended_go_to_no_expert(served):
    """Experts that only make NaN are not asked: the next layer finds numbers."""
    graph, state, prefill = served
    has_ended = jnp.arange(8) % 3 == 1
    sequences = prefill()._replace(has_ended=has_ended)
    broken = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    w_down = broken.blocks[0].moe.w_down
    w_down[...] = jnp.nan * w_down[...]
    sequences = serving.step(graph, nnx.state(broken), sequences, KEY)
    keys = sequences.caches[1].keys[:, PROMPT_LEN]
    np.testing.assert_array_equal(np.any(np.isnan(keys), axis=(1, 2)), ~has_ended)


def test_it_ends_with_the_last_sequence(served):
    graph, state, prefill = served
    runs = ((key, prefill(key)) for key in jax.random.split(KEY, 1000))
    key, sequences = next((key, run) for key, run in runs if np.any(run.has_ended))
    np.testing.assert_array_equal(
        sequences.has_ended, sequences.tokens[:, PROMPT_LEN] == serving.END
    )
    assert serving.num_written(sequences, PROMPT_LEN) == 8
    others = jnp.arange(8) != np.argmax(sequences.has_ended)
    sequences = sequences._replace(has_ended=sequences.has_ended | others)
    assert serving.decode(graph, state, sequences, key).length == PROMPT_LEN + 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"sequences": 12}, "--sequences must be a multiple of 8; got 12"),
        ({"num_experts": 12}, "--num_experts must be a multiple of 8; got 12"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit(flag, message):
    program.flags.FLAGS(["serve_moe.py"])
    with flagsaver.flagsaver(**flag), pytest.raises(program.app.UsageError, match=message):
        program.main(["serve_moe.py"])


def test_a_whole_run_shows_what_it_promises(capsys):
    program.flags.FLAGS(["serve_moe.py"])
    small = SMALL | {
        "num_layers": 1,
        "ffn_hidden": 256,
        "prompt_len": 8,
        "num_tokens": 5,
        "repeats": 1,
    }
    with flagsaver.flagsaver(**small):
        program.main(["serve_moe.py"])
    out = capsys.readouterr().out
    assert "8 prompts of 8 bytes on 8 cpu devices, at most 5 bytes written" in out
    assert re.search(r"both wrote the same (3[2-9]|40) bytes; \d of 8", out)
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines()[-2:]]
    assert [row[0] for row in rows] == list(program._AXES)
    figures = np.array([[float(cell.replace(",", "")) for cell in row[1:]] for row in rows])
    assert np.all(figures > 0)
    # Three matrices of 8 experts in 4 bytes, or of one.
    np.testing.assert_allclose(figures[:, -1], [0.05, 0.39], atol=5e-3)


def test_text_that_differs_is_an_error(monkeypatch):
    program.flags.FLAGS(["serve_moe.py"])
    tokens = np.zeros((2, 8, 4), np.int32)
    tokens[1, 5, 3] = 1
    written = iter(tokens)

    class Way:
        def serve(self):
            return serving.Sequences(next(written), 4, np.zeros(8, bool), ())

    monkeypatch.setattr(program, "make_way", lambda *_: Way())
    message = "'each device all' must write what .*experts' does; from byte 3 of sequence 5 on"
    with pytest.raises(RuntimeError, match=message):
        program.main(["serve_moe.py"])
