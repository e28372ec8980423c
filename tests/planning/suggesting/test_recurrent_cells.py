"""Recurrent cells whose gates Linen keeps apart, in targets that keep them in one array."""

import numpy as np
import pytest

from orbax_nnx_handler import suggest
from tests.planning.suggesting.proposals import abstract, check, filled, proposed, restored

LSTM, GRU = "ifgo", "rzn"


def lstm(cell, inputs, size):
    """Returns the shapes of a Linen `LSTMCell`: only the layers of the state have a bias."""
    found = {f"{cell}/i{gate}/kernel": (inputs, size) for gate in LSTM}
    found |= {f"{cell}/h{gate}/kernel": (size, size) for gate in LSTM}
    return found | {f"{cell}/h{gate}/bias": (size,) for gate in LSTM}


def gru(cell, inputs, size):
    """Returns the shapes of a Linen `GRUCell`."""
    found = {f"{cell}/i{gate}/kernel": (inputs, size) for gate in GRU}
    found |= {f"{cell}/i{gate}/bias": (size,) for gate in GRU}
    return found | {f"{cell}/h{gate}/kernel": (size, size) for gate in GRU} | {f"{cell}/hn/bias": (size,)}


def fused(stored, cell, side, gates, kind="kernel"):
    return np.concatenate([stored[f"{cell}/{side}{gate}/{kind}"] for gate in gates], axis=-1)


@pytest.mark.parametrize("inputs", [6, 4])
@pytest.mark.parametrize("is_turned", [True, False])
def test_gates_under_names_of_pytorch_are_fused_in_its_order(inputs, is_turned):
    arranged = np.transpose if is_turned else np.asarray
    stored = filled(lstm("OptimizedLSTMCell_0", inputs, 4) | lstm("OptimizedLSTMCell_1", 4, 4))
    expected = {}
    for at in range(2):
        cell = f"OptimizedLSTMCell_{at}"
        expected[f"lstm/weight_ih_l{at}"] = arranged(fused(stored, cell, "i", LSTM))
        expected[f"lstm/weight_hh_l{at}"] = arranged(fused(stored, cell, "h", LSTM))
        expected[f"lstm/bias_hh_l{at}"] = fused(stored, cell, "h", LSTM, "bias")

    found, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)
    assert found.questions == ()


def test_both_directions_of_a_cell_of_pytorch_are_told_by_words():
    stored = filled(lstm("backward_lstm", 6, 4) | lstm("forward_lstm", 6, 4))
    expected = {}
    for cell, end in (("forward_lstm", ""), ("backward_lstm", "_reverse")):
        for side in "ih":
            expected[f"rnn/weight_{side}h_l0{end}"] = fused(stored, cell, side, LSTM).T

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("inputs", [6, 4])
@pytest.mark.parametrize(("cell", "gates"), [(lstm, "ifgo"), (gru, "zrn")])
def test_gates_under_names_of_keras_are_fused_in_its_order(inputs, cell, gates):
    stored = filled(cell("cell", inputs, 4) | {"Dense_0/kernel": (4, 9)})
    expected = {
        "rnn/kernel": fused(stored, "cell", "i", gates),
        "rnn/recurrent_kernel": fused(stored, "cell", "h", gates),
        "rnn/bias": fused(stored, "cell", "h" if cell is lstm else "i", gates, "bias"),
        "head/kernel": stored["Dense_0/kernel"],
    }

    _, values = proposed(stored, {path: value.shape for path, value in expected.items()})

    check(values, expected)


@pytest.mark.parametrize("inputs", [6, 4])
def test_an_order_of_gates_that_no_name_tells_is_asked_about_once_for_all_cells(inputs):
    stored = filled(lstm("lstm_0", inputs, 4) | lstm("lstm_1", 4, 4))
    expected = {}
    for at in range(2):
        expected[f"rnns/{at}/x2h/kernel"] = fused(stored, f"lstm_{at}", "i", "igfo")
        expected[f"rnns/{at}/h2h/kernel"] = fused(stored, f"lstm_{at}", "h", "igfo")
        expected[f"rnns/{at}/h2h/bias"] = fused(stored, f"lstm_{at}", "h", "igfo", "bias")
    wanted = {path: value.shape for path, value in expected.items()}

    found, values = proposed(stored, wanted)

    assert values == {}
    (question,) = found.questions
    assert len(question.choices) == 24
    assert question.choices[0] == "as in PyTorch and Keras: ii, if, ig, io"
    assert question.choices[1] == "as in Haiku and TensorFlow: ii, ig, if, io"
    check(restored(stored, wanted, question.alternatives[1]), expected)


def test_the_bias_of_a_gru_that_only_its_state_has_stays_by_itself():
    stored = filled(gru("GRUCell_0", 6, 4))
    expected = {
        "gru/w_i": fused(stored, "GRUCell_0", "i", "rzn"),
        "gru/b_i": fused(stored, "GRUCell_0", "i", "rzn", "bias"),
        "gru/w_h": fused(stored, "GRUCell_0", "h", "rzn"),
        "gru/b_hn": stored["GRUCell_0/hn/bias"],
    }
    wanted = {path: value.shape for path, value in expected.items()}

    found, values = proposed(stored, wanted)

    check(values, {"gru/b_hn": expected["gru/b_hn"]})
    (question,) = found.questions
    check(restored(stored, wanted, question.alternatives[0]), expected)


def test_a_second_bias_of_pytorch_that_linen_does_not_have_is_left_open():
    stored = filled(lstm("cell", 6, 4))
    wanted = {
        "rnn/weight_ih": (16, 6),
        "rnn/weight_hh": (16, 4),
        "rnn/bias_ih": (16,),
        "rnn/bias_hh": (16,),
    }

    _, values = proposed(stored, wanted)

    assert values.keys() == {"rnn/weight_ih", "rnn/weight_hh", "rnn/bias_hh"}


def test_gates_that_a_target_keeps_apart_too_are_not_fused():
    stored = filled(lstm("lstm", 6, 4))
    wanted = {path.replace("lstm/", "cell/"): value.shape for path, value in stored.items()}

    found = suggest({"params": {}} | {"params": _nested(stored)}, abstract(wanted))

    assert [tuple(rule) for rule in map(_pair, found.renames)] == [("lstm", "cell")]


@pytest.mark.parametrize(("count", "answers"), [(2, 6), (3, 20), (5, 4)])
@pytest.mark.parametrize("is_in_turns", [True, False])
def test_cells_that_linen_counts_through_are_asked_about_where_both_directions_are_lists(
    count, answers, is_in_turns
):
    places = [(at, way) for at in range(count) for way in ("forward", "backward")]
    places = places if is_in_turns else sorted(places, key=lambda place: place[1])
    cells = {f"LSTMCell_{n}": f"{way}_rnn/{at}/cell" for n, (at, way) in enumerate(places)}
    stored = filled({path: x for cell in cells for path, x in lstm(cell, 4, 4).items()})
    expected = {}
    for cell, aim in cells.items():
        expected[f"{aim}/dense_i/kernel"] = fused(stored, cell, "i", LSTM)
        expected[f"{aim}/dense_h/kernel"] = fused(stored, cell, "h", LSTM)
        expected[f"{aim}/dense_h/bias"] = fused(stored, cell, "h", LSTM, "bias")
    wanted = {path: value.shape for path, value in expected.items()}

    found, values = proposed(stored, wanted)

    assert values == {}
    (question,) = found.questions
    made = [restored(stored, wanted, rules) for rules in question.alternatives]
    assert len(made) == answers
    assert any(all(np.array_equal(each[path], expected[path]) for path in expected) for each in made)


def _nested(flat):
    found = {}
    for path, value in flat.items():
        *above, last = path.split("/")
        inside = found
        for name in above:
            inside = inside.setdefault(name, {})
        inside[last] = value
    return found


def _pair(rule):
    return rule.pattern.removeprefix("params/"), rule.replacement.removeprefix("params/")
