"""tokens.py: nothing is lost on the way to tokens and back, and each number stands where it should."""

import pytest
import torch
from torch import nn

from pdiff_lib.generators.tokens import Tokens

SHAPES = {
    "mlp": [(10, 64), (10,), (10, 10), (10,)],
    "convolutions": [(8, 1, 5, 5), (8,), (6, 8, 5, 5), (6,), (10, 36), (10,)],
    "no bias, norms": [(4, 3, 3, 3), (4,), (4,), (2, 4)],
    "a number": [(3, 7), (), (3,)],
}


def theta(shapes, k=3):
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    return torch.randn(k, numel, generator=torch.Generator().manual_seed(0))


def sizes(shapes):
    return [torch.Size(shape).numel() for shape in shapes]


@pytest.mark.parametrize("length", [1, 4, 65, 1000])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("way", ["cut", "rows"])
def test_tokens_hold_every_number_once_and_padding_is_zero(way, shapes, length):
    tokens = Tokens.cut(sizes(shapes), length) if way == "cut" else Tokens.rows(shapes, length)
    v = theta(shapes)
    encoded = tokens.encode(v)
    assert encoded.shape == (3, len(tokens), length) and tokens.numel == v.shape[1]
    assert (encoded[:, ~tokens.mask] == 0).all() and tokens.mask.any(dim=1).all()  # no token is all padding
    assert torch.equal(tokens.decode(encoded), v)
    assert torch.equal(encoded[:, tokens.mask].sort(dim=1).values, v.sort(dim=1).values)
    assert torch.equal(tokens.decode(encoded.masked_fill(~tokens.mask, torch.nan)), v)  # what stands on padding is left out


@pytest.mark.parametrize("length", [3, 8, 100])
def test_a_tensor_is_cut_as_it_is(length):
    shapes = SHAPES["convolutions"]
    tokens, v = Tokens.cut(sizes(shapes), length), theta(shapes)
    pieces = [piece for tensor in v.split(sizes(shapes), dim=1) for piece in tensor.split(length, dim=1)]
    assert len(tokens) == len(pieces)
    for token, piece in zip(tokens.encode(v).unbind(1), pieces):
        assert torch.equal(token[:, :piece.shape[1]], piece)
    assert tokens.tensor.bincount().tolist() == [-(-size // length) for size in sizes(shapes)]


@pytest.mark.parametrize("net", [nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.Linear(2, 1)], ids=str)
def test_a_row_is_what_an_output_is_computed_from_with_its_bias_last(net):
    w, b = net.weight.detach(), net.bias.detach()
    tokens = Tokens.rows([tuple(w.shape), tuple(b.shape)], 40)
    rows = tokens.encode(torch.cat([w.flatten(), b])[None])[0]
    width = w[0].numel()
    assert torch.equal(rows[:, :width], w.flatten(1)) and torch.equal(rows[:, width], b) and (rows[:, width + 1:] == 0).all()
    assert tokens.tensor.tolist() == [0] * len(w) and tokens.within.tolist() == list(range(len(w)))


def test_a_long_row_goes_on_in_the_next_token():
    tokens = Tokens.rows([(2, 5), (2,)], 4)
    assert tokens.positions.tolist() == [[0, 1, 2, 3], [4, 10, -1, -1], [5, 6, 7, 8], [9, 11, -1, -1]]
    assert tokens.within.tolist() == [0, 1, 2, 3]


def test_a_vector_of_another_length_is_no_bias():
    tokens = Tokens.rows([(4, 3), (3,)], 9)
    assert tokens.tensor.tolist() == [0] * 4 + [1] * 3 and tokens.mask.sum(1).tolist() == [3] * 4 + [1] * 3


def test_tokens_of_a_batch_are_those_of_each_vector():
    tokens, v = Tokens.rows(SHAPES["mlp"], 65), theta(SHAPES["mlp"], 4)
    assert torch.equal(tokens.encode(v), torch.stack([tokens.encode(row[None])[0] for row in v]))


def test_what_is_no_place_or_no_vector_is_refused():
    for positions in ([[0, 2]], [[0, 0]], [[1, 2]]):
        with pytest.raises(ValueError, match="expected 0 to 1, each once"):
            Tokens(torch.tensor(positions), torch.zeros(1, dtype=torch.long))
    for made in (lambda: Tokens.cut((3,), 0), lambda: Tokens.rows(((3, 2),), -1)):
        with pytest.raises(ValueError, match="expected at least 1"):
            made()
    with pytest.raises(ValueError, match="vectors of 4 numbers: expected 5"):
        Tokens.cut((5,), 2).encode(torch.zeros(1, 4))
